"""The fused operations of INT8 models, known to torch as ``sana_edge::...``; defined by `reference_fused`.

Every operation takes the ``backend`` that computes it, "cuda", "triton" or "torch", whose module is imported
when it is first used. None has a gradient.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import library as registry

from sana_edge.fused import shapes
from sana_edge.kernels.cuda import library

# the module of sana_edge.kernels that has an operation
_CUDA = {
    "quantize_rows": "cuda.rows",
    "norm_modulate_quantize": "cuda.rows",
    "dwconv_glu_quantize": "cuda.rows",
    "w8a8_linear": "cuda.linear",
    "qkv_linear_attention": "cuda.linear_attention",
    "qk_norm_linear_attention": "cuda.linear_attention",
    "linear_attention_finish": "cuda.linear_attention",
    "cross_attention_quantize": "cuda.cross_attention",
    "patch_embed": "cuda.ends",
    "velocity_head": "cuda.ends",
    "w8a8_conv2d": "cuda.conv",
}
# the decoder's convolutions are torch's where the CUDA library is not there
_TRITON = {
    "quantize_rows": "triton.quantize_rows",
    "norm_modulate_quantize": "triton.norm_quantize",
    "dwconv_glu_quantize": "triton.mix_ffn",
    "w8a8_linear": "triton.w8a8_linear",
    "qkv_linear_attention": "triton.attention",
    "qk_norm_linear_attention": "triton.attention",
    "linear_attention_finish": "triton.attention",
    "cross_attention_quantize": "triton.attention",
    "patch_embed": "triton.ends",
    "velocity_head": "triton.ends",
}
_HOMES = {
    "cuda": _CUDA,
    "triton": _TRITON,
    "torch": {**dict.fromkeys(_CUDA, "reference_fused"), "w8a8_conv2d": "reference_conv"},
}

_PRODUCT = "Tensor values, Tensor scales, Tensor weight, Tensor weight_scales, Tensor? bias"
_SCHEMAS = {
    "quantize_rows": "(Tensor x, Tensor? static_scale, str backend) -> (Tensor, Tensor)",
    "norm_modulate_quantize": "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor? static_scale, "
    "str backend) -> (Tensor, Tensor)",
    "dwconv_glu_quantize": "(Tensor x, Tensor weight, Tensor bias, int height, int width, "
    "Tensor? static_scale, str backend) -> (Tensor, Tensor)",
    "w8a8_linear": f"({_PRODUCT}, ScalarType dtype, bool silu, str backend) -> Tensor",
    "w8a8_linear_add_": f"(Tensor(a!) x, {_PRODUCT}, float? limit, Tensor? gate, Tensor? constant, "
    "str backend) -> ()",
    "qkv_linear_attention": f"({_PRODUCT}, ScalarType dtype, int heads, Tensor(a!)? workspace, str backend) "
    "-> (Tensor, Tensor)",
    "qk_norm_linear_attention": "(Tensor qkv, Tensor norm_k, int heads, float norm_eps, "
    "Tensor(a!)? workspace, str backend) -> (Tensor, Tensor)",
    "linear_attention_finish": "(Tensor q, Tensor state, float eps, Tensor? roots, Tensor? norm_q, "
    "Tensor? static_scale, str backend) -> (Tensor, Tensor)",
    "cross_attention_quantize": "(Tensor q, Tensor keys, Tensor values_transposed, Tensor lengths, "
    "Tensor? norm_q, float norm_eps, Tensor? static_scale, str backend) -> (Tensor, Tensor)",
    "patch_embed": "(Tensor latent, Tensor weight, Tensor bias, Tensor? positions, int copies, "
    "ScalarType dtype, str backend) -> Tensor",
    "velocity_head": "(Tensor x, Tensor scale, Tensor shift, float eps, Tensor weight, Tensor bias, "
    "Tensor? guidance, int height, int width, str backend) -> Tensor",
    "w8a8_conv2d": "(Tensor values, Tensor scale, Tensor weight, Tensor weight_scales, Tensor? bias, "
    "ScalarType dtype, str upsample, str activation, Tensor? shortcut, int repeats, Tensor? out_scale, "
    "str backend) -> Tensor",
    "w8a8_conv2d_add_": "(Tensor(a!) x, Tensor values, Tensor scale, Tensor weight, Tensor weight_scales, "
    "Tensor? bias, Tensor norm_weight, Tensor? norm_bias, float norm_eps, str backend) -> ()",
}

OPERATIONS = tuple(_SCHEMAS)
# that Triton has none of
CUDA_ONLY = tuple(name for name in _SCHEMAS if "conv2d" in name)
_LIBRARY = registry.Library("sana_edge", "DEF")  # type: ignore[no-untyped-call]


def workspace(backend: str, images: int, tokens: int, heads: int, device: torch.device) -> Tensor | None:
    """What `qkv_linear_attention` and `qk_norm_linear_attention` need on a backend; not for two at once."""
    if backend != "cuda":
        return None
    size = library.load().workspace(images, tokens, heads)
    return torch.zeros(size, dtype=torch.uint8, device=device)


@functools.cache
def _implementation(backend: str, name: str) -> Callable[..., Any]:
    module = importlib.import_module(f"sana_edge.kernels.{_HOMES[backend][name]}")
    function: Callable[..., Any] = getattr(module, name)
    return function


def _call(name: str, *arguments: Any) -> Any:
    """An operation whose arguments are those of `reference_fused`, with the backend as the last."""
    *arguments_, backend = arguments
    return _implementation(backend, name)(*arguments_)


def _w8a8_linear(*arguments: Any) -> Tensor:
    *product, silu, backend = arguments
    out: Tensor = _implementation(backend, "w8a8_linear")(*product, silu=silu)
    return out


def _w8a8_linear_add_(x: Tensor, *arguments: Any) -> None:
    """x + gate · clipped product + constant, in place: a kernel writes each number where it read it."""
    *product, limit, gate, constant, backend = arguments
    options = {"limit": limit, "gate": gate, "residual": x, "constant": constant}
    function = _implementation(backend, "w8a8_linear")
    if backend == "torch":
        x.copy_(function(*product, x.dtype, **options))
    else:
        function(*product, x.dtype, **options, out=x)


def _w8a8_conv2d(*arguments: Any) -> Tensor:
    *product, upsample, activation, shortcut, repeats, out_scale, backend = arguments
    out: Tensor = _implementation(backend, "w8a8_conv2d")(
        *product,
        upsample=upsample,
        activation=activation,
        shortcut=shortcut,
        repeats=repeats,
        out_scale=out_scale,
    )
    return out


def _w8a8_conv2d_add_(x: Tensor, *arguments: Any) -> None:
    """x + the convolution, RMS-normalised over its channels, in place."""
    *product, norm_weight, norm_bias, norm_eps, backend = arguments
    options = {"norm_weight": norm_weight, "norm_bias": norm_bias, "norm_eps": norm_eps, "residual": x}
    function = _implementation(backend, "w8a8_conv2d")
    if backend == "torch":
        x.copy_(function(*product, x.dtype, **options))
    else:
        function(*product, x.dtype, **options, out=x)


def _with_workspace(name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    *operands, space, backend = arguments
    options = {"workspace": space} if backend == "cuda" else {}
    result: tuple[Tensor, Tensor] = _implementation(backend, name)(*operands, **options)
    return result


def _velocity_head(*arguments: Any) -> Tensor:
    *operands, height, width, backend = arguments
    velocity: Tensor = _implementation(backend, "velocity_head")(*operands, (height, width))
    return velocity.contiguous()


_OWN = {
    "w8a8_linear": _w8a8_linear,
    "w8a8_linear_add_": _w8a8_linear_add_,
    "velocity_head": _velocity_head,
    "w8a8_conv2d": _w8a8_conv2d,
    "w8a8_conv2d_add_": _w8a8_conv2d_add_,
}


def _register() -> None:
    for name, schema in _SCHEMAS.items():
        shared = _with_workspace if "workspace" in schema else _call
        function = _OWN.get(name, functools.partial(shared, name))
        _LIBRARY.define(name + schema)  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        registry.register_fake(f"sana_edge::{name}", shapes.SHAPES.get(name, shapes.rows), lib=_LIBRARY)


_register()

quantize_rows = torch.ops.sana_edge.quantize_rows.default
norm_modulate_quantize = torch.ops.sana_edge.norm_modulate_quantize.default
dwconv_glu_quantize = torch.ops.sana_edge.dwconv_glu_quantize.default
w8a8_linear = torch.ops.sana_edge.w8a8_linear.default
w8a8_linear_add_ = torch.ops.sana_edge.w8a8_linear_add_.default
qkv_linear_attention = torch.ops.sana_edge.qkv_linear_attention.default
qk_norm_linear_attention = torch.ops.sana_edge.qk_norm_linear_attention.default
linear_attention_finish = torch.ops.sana_edge.linear_attention_finish.default
cross_attention_quantize = torch.ops.sana_edge.cross_attention_quantize.default
patch_embed = torch.ops.sana_edge.patch_embed.default
velocity_head = torch.ops.sana_edge.velocity_head.default
w8a8_conv2d = torch.ops.sana_edge.w8a8_conv2d.default
w8a8_conv2d_add_ = torch.ops.sana_edge.w8a8_conv2d_add_.default
