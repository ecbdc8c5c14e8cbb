"""The decoder's fused INT8 convolution of csrc/, by the name and arguments of `reference_conv`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.library import TYPES
from sana_edge.kernels.reference_conv import Activation, Upsampling

_UPSAMPLINGS = {"none": 0, "phases": 1, "shuffle": 2}
_ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2}


def w8a8_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    upsample: Upsampling = "none",
    activation: Activation = "identity",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    repeats: int = 1,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference_conv.w8a8_conv2d` of contiguous maps, in a multiple of 16 channels; ``dtype`` has 16 bits.

    Args:
        out: what the result is written to, which may be ``residual``.

    Raises:
        InvalidInput: shapes that do not suit each other, a map that is not contiguous.
        SanaError: the library refused.
    """
    batch, height, width, depth = values.shape
    corners = 1 if upsample == "none" else 4
    shuffled = 4 if upsample == "shuffle" else 1
    columns = weight.shape[-4] // shuffled
    kernel = weight.shape[-2]
    outer = (4, columns) if upsample == "phases" else (shuffled * columns,)
    factor = 1 if upsample == "none" else 2
    shape = (batch, factor * height, factor * width, columns)
    kind = dtype if out_scale is None else torch.int8
    if out is None:
        out = torch.empty(shape, dtype=kind, device=values.device)
    _check("values", values, torch.int8, values.shape)
    _check("weight", weight, torch.int8, (*outer, kernel, kernel, depth))
    _check("weight_scales", weight_scales.flatten(), torch.float32, (corners * columns,))
    _check("bias", bias, torch.float32, (shuffled * columns,))
    _check("residual", residual, dtype, shape)
    _check("shortcut", shortcut, dtype, (batch, height, width, 4 * columns // max(repeats, 1)))
    _check("out", out, kind, shape)
    for name, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _check(name, vector, torch.float32, (columns,))
    for name, number in (("scale", scale), ("out_scale", out_scale)):
        _check(name, number, torch.float32, ())
    library.load().call(
        "w8a8_conv2d",
        values.device,
        values=values,
        scale=scale,
        weight=weight,
        weight_scales=weight_scales,
        bias=bias,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        residual=residual,
        shortcut=shortcut,
        out_scale=out_scale,
        out=out,
        images=batch,
        height=height,
        width=width,
        depth=depth,
        columns=columns,
        kernel=kernel,
        upsample=_UPSAMPLINGS[upsample],
        activation=_ACTIVATIONS[activation],
        repeats=repeats,
        norm_eps=norm_eps,
        type=TYPES[dtype],
    )
    return out


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None or (tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()):
        return
    gaps = "" if tensor.is_contiguous() else f" with gaps, strides {tensor.stride()}"
    raise InvalidInput(
        f"{name} of w8a8_conv2d is {tensor.dtype} {tuple(tensor.shape)}{gaps}",
        f"give contiguous {dtype} {tuple(shape)}",
    )
