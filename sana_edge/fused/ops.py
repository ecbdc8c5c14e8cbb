"""The fused operations of INT8 models, defined by `reference_fused` and `reference_conv`.

Every operation takes what its definition takes, by position, and last the ``backend`` that computes it:
"cuda", "triton" or "torch", whose module is imported when it is first used. None has a gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sana_edge.kernels.cuda import launch

# the module of sana_edge.kernels.triton that has an operation
_TRITON = {
    "quantize_rows": "quantize_rows",
    "norm_modulate_quantize": "norm_quantize",
    "dwconv_glu_quantize": "mix_ffn",
    "w8a8_linear": "w8a8_linear",
    "qkv_linear_attention": "attention",
    "qk_norm_linear_attention": "attention",
    "linear_attention_finish": "attention",
    "cross_attention_quantize": "attention",
    "patch_embed": "patch_embed",
    "velocity_head": "velocity_head",
}
# the decoder's convolutions, which Triton has none of: they are torch's where the CUDA library is not there
CUDA_ONLY = ("w8a8_conv2d", "w8a8_conv2d_add_")
OPERATIONS = (*_TRITON, "w8a8_linear_add_", *CUDA_ONLY)


def workspace(backend: str, images: int, tokens: int, heads: int, device: torch.device) -> Tensor | None:
    """What `qkv_linear_attention` and `qk_norm_linear_attention` need on a backend; not for two at once."""
    return launch.workspace(images, tokens, heads, device) if backend == "cuda" else None


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    torch_home = "reference_conv" if name in CUDA_ONLY else "reference_fused"
    home = {"cuda": "cuda.launch", "triton": f"triton.{_TRITON.get(name)}", "torch": torch_home}[backend]
    function: Callable[..., Any] = getattr(importlib.import_module(f"sana_edge.kernels.{home}"), name)
    return function


@torch.no_grad()
def _run(name: str, *arguments: Any, **options: Any) -> Any:
    """An operation by the arguments of its definition, with the backend as the last of those by position."""
    *operands, backend = arguments
    return _implementation(backend, name)(*operands, **options)


def _run_with_workspace(name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """What needs a `workspace`, the last but one argument, on CUDA."""
    *operands, space, backend = arguments
    result: tuple[Tensor, Tensor] = _run(name, *operands, *([space] if backend == "cuda" else []), backend)
    return result


def _run_into(x: Tensor, name: str, *arguments: Any, **options: Any) -> None:
    """A product added to x in place: a kernel writes each number where it read it."""
    *product, backend = arguments
    if backend == "torch":
        x.copy_(_run(name, *product, x.dtype, backend, residual=x, **options))
    else:
        _run(name, *product, x.dtype, backend, residual=x, out=x, **options)


def w8a8_linear(*arguments: Any) -> Tensor:
    """Of (values, scales, weight, weight_scales, bias, dtype, silu, backend)."""
    *product, silu, backend = arguments
    out: Tensor = _run("w8a8_linear", *product, backend, silu=silu)
    return out


def w8a8_linear_add_(x: Tensor, *arguments: Any) -> None:
    """x + gate · clipped product + constant, in place.

    Of (x, values, scales, weight, weight_scales, bias, limit, gate, constant, backend).
    """
    *product, limit, gate, constant, backend = arguments
    _run_into(x, "w8a8_linear", *product, backend, limit=limit, gate=gate, constant=constant)


def velocity_head(*arguments: Any) -> Tensor:
    """As defined, with height and width in the place of ``size``."""
    *operands, height, width, backend = arguments
    velocity: Tensor = _run("velocity_head", *operands, (height, width), backend)
    return velocity.contiguous()


def w8a8_conv2d(*arguments: Any) -> Tensor:
    """Of (the product and dtype, upsample, activation, shortcut, repeats, out_scale, backend)."""
    *product, upsample, activation, shortcut, repeats, out_scale, backend = arguments
    options = {"upsample": upsample, "activation": activation, "shortcut": shortcut, "repeats": repeats}
    out: Tensor = _run("w8a8_conv2d", *product, backend, **options, out_scale=out_scale)
    return out


def w8a8_conv2d_add_(x: Tensor, *arguments: Any) -> None:
    """x + the convolution, RMS-normalised over its channels, in place.

    Of (x, values, scale, weight, weight_scales, bias, norm_weight, norm_bias, norm_eps, backend).
    """
    *product, norm_weight, norm_bias, norm_eps, backend = arguments
    norm = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps}
    _run_into(x, "w8a8_conv2d", *product, backend, **norm)


quantize_rows = functools.partial(_run, "quantize_rows")
norm_modulate_quantize = functools.partial(_run, "norm_modulate_quantize")
dwconv_glu_quantize = functools.partial(_run, "dwconv_glu_quantize")
qkv_linear_attention = functools.partial(_run_with_workspace, "qkv_linear_attention")
qk_norm_linear_attention = functools.partial(_run_with_workspace, "qk_norm_linear_attention")
linear_attention_finish = functools.partial(_run, "linear_attention_finish")
cross_attention_quantize = functools.partial(_run, "cross_attention_quantize")
patch_embed = functools.partial(_run, "patch_embed")
