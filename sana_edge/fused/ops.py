"""The fused operations of INT8 models, with the arguments of their definitions in `kernels.reference_*`.

Every operation takes besides:

    backend: what computes it, "cuda", "triton" or "torch", whose module is imported when it is first used.
    out: of `w8a8_linear`, `w8a8_conv2d` and `norm_add_quantize`, what is written and returned; it may be
        their ``residual`` or ``x``, since a kernel writes each number where it read it.
    workspace: of the operations that need a `workspace` on CUDA.

None has a gradient.
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
# what Triton has none of, and its definition: torch's where the CUDA library is not there
_DEFINITIONS = {
    "w8a8_conv2d": "reference_conv",
    "norm_add_quantize": "reference_conv",
    "tensor_scale": "reference_conv",
    "multiscale_linear_attention": "reference_conv",
    "sampler_step": "reference_fused",
    "w8a8_linear_quantize": "reference_fused",
    "quantize_digits": "reference_gemma",
    "add_norm_digits": "reference_gemma",
    "w8a16_linear": "reference_gemma",
    "soft_capped_attention": "reference_gemma",
}
CUDA_ONLY = tuple(_DEFINITIONS)
OPERATIONS = (*_TRITON, *CUDA_ONLY)


def workspace(backend: str, images: int, tokens: int, heads: int, device: torch.device) -> Tensor | None:
    """What blocks of some operations tell each other by on a backend; not for two at once."""
    return launch.workspace(images, tokens, heads, device) if backend == "cuda" else None


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    torch_home = _DEFINITIONS.get(name, "reference_fused")
    home = {"cuda": "cuda.launch", "triton": f"triton.{_TRITON.get(name)}", "torch": torch_home}[backend]
    function: Callable[..., Any] = getattr(importlib.import_module(f"sana_edge.kernels.{home}"), name)
    return function


@torch.no_grad()
def _run(
    name: str,
    *arguments: Any,
    backend: str,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    **options: Any,
) -> Any:
    function = _implementation(backend, name)
    if out is None or backend != "torch":
        memory = {"out": out, "workspace": workspace}
        given = {key: tensor for key, tensor in memory.items() if tensor is not None}
        return function(*arguments, **options, **given)
    found = function(*arguments, **options)
    return (out.copy_(found[0]), *found[1:]) if isinstance(found, tuple) else out.copy_(found)


quantize_rows = functools.partial(_run, "quantize_rows")
norm_modulate_quantize = functools.partial(_run, "norm_modulate_quantize")
dwconv_glu_quantize = functools.partial(_run, "dwconv_glu_quantize")
w8a8_linear = functools.partial(_run, "w8a8_linear")
w8a8_linear_quantize = functools.partial(_run, "w8a8_linear_quantize")
qkv_linear_attention = functools.partial(_run, "qkv_linear_attention")
qk_norm_linear_attention = functools.partial(_run, "qk_norm_linear_attention")
linear_attention_finish = functools.partial(_run, "linear_attention_finish")
cross_attention_quantize = functools.partial(_run, "cross_attention_quantize")
patch_embed = functools.partial(_run, "patch_embed")
velocity_head = functools.partial(_run, "velocity_head")
sampler_step = functools.partial(_run, "sampler_step")
w8a8_conv2d = functools.partial(_run, "w8a8_conv2d")
norm_add_quantize = functools.partial(_run, "norm_add_quantize")
tensor_scale = functools.partial(_run, "tensor_scale")
multiscale_linear_attention = functools.partial(_run, "multiscale_linear_attention")
quantize_digits = functools.partial(_run, "quantize_digits")
add_norm_digits = functools.partial(_run, "add_norm_digits")
w8a16_linear = functools.partial(_run, "w8a16_linear")
soft_capped_attention = functools.partial(_run, "soft_capped_attention")
