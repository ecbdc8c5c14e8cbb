"""Operations of csrc/ that end in INT8 rows, by the names of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.checks import same_stride, suits
from sana_edge.kernels.cuda.library import TYPES


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference_fused.quantize_rows` of contiguous x (..., C), C a multiple of 16."""
    suits("x", x, x.shape, tuple(TYPES))
    _check_static(static_scale)
    values, scales = _rows_like(x)
    library.load().call(
        "quantize_rows",
        x.device,
        x=x,
        static_scale=static_scale,
        values=values,
        scales=scales,
        rows=scales.numel(),
        columns=x.shape[-1],
        type=TYPES[x.dtype],
    )
    return values, scales


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference_fused.norm_modulate_quantize` of contiguous x (B, N, C), C a multiple of 16.

    Scale and shift are fp32, (C,) or (B, 1, C), parts of one table or alike: of the same stride.
    """
    suits("x", x, _three("x", x), tuple(TYPES))
    _check_static(static_scale)
    images, tokens, columns = x.shape
    values, scales = _rows_like(x)
    library.load().call(
        "norm_modulate_quantize",
        x.device,
        x=x,
        scale=scale,
        shift=shift,
        static_scale=static_scale,
        values=values,
        scales=scales,
        rows=images * tokens,
        columns=columns,
        tokens=tokens,
        stride=same_stride(scale, shift, images, columns),
        eps=eps,
        type=TYPES[x.dtype],
    )
    return values, scales


def dwconv_glu_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.dwconv_glu_quantize` of contiguous fp16 or bf16 x; weight and bias fp32."""
    images, _, channels = _three("x", x)
    suits("x", x, (images, height * width, channels), (torch.float16, torch.bfloat16))
    suits("weight", weight, (3, 3, channels), torch.float32)
    suits("bias", bias, (channels,), torch.float32)
    _check_static(static_scale)
    hidden, odd = divmod(channels, 2)
    if odd:
        raise InvalidInput(f"x: {channels} channels, not as many values as gates", "give an even number")
    values, scales = _rows_like(x[..., :hidden])
    library.load().call(
        "dwconv_glu_quantize",
        x.device,
        x=x,
        weight=weight,
        bias=bias,
        static_scale=static_scale,
        values=values,
        scales=scales,
        images=images,
        height=height,
        width=width,
        hidden=hidden,
        type=TYPES[x.dtype],
    )
    return values, scales


def _three(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim != 3:
        raise InvalidInput(
            f"{name}: {tuple(x.shape)}, not (images, tokens, channels)", "give three dimensions"
        )
    images, tokens, channels = x.shape
    return images, tokens, channels


def _check_static(static_scale: Tensor | None) -> None:
    if static_scale is not None:
        suits("static_scale", static_scale, (), torch.float32)


def _rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )
