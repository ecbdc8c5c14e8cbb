"""The INT8 linear layer of csrc/, by the name and arguments of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.library import TYPES


def w8a8_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    silu: bool = False,
    limit: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference_fused.w8a8_linear`: equal to it bit for bit without ``silu``.

    Args:
        values: (B, tokens, K) or (M, K) int8, contiguous, K a multiple of 16.
        scales: (B, tokens) or (M,) fp32.
        weight: (N, K) int8, contiguous, N a multiple of 8.
        weight_scales: (N,) fp32.
        bias: (N,) fp32.
        dtype: of the result and of ``residual``, fp16 or bf16.
        silu: apply SiLU after the bias; exp and the quotient are to a few units in the last place of fp32.
        limit: clip to ±limit after that, more than 0; NaN stays.
        gate: (N,), or (B, 1, N) with any stride along B, fp32; multiplies the clipped.
        residual: (..., N), contiguous; added.
        constant: like ``gate``; added last.
        out: what the result is written to, which may be ``residual``; a new tensor where it is None.

    Raises:
        InvalidInput: shapes or types that do not suit each other, a matrix that is not contiguous.
        SanaError: the library refused.
    """
    if values.ndim not in (2, 3) or weight.ndim != 2 or values.shape[-1] != weight.shape[1]:
        shapes = f"values {tuple(values.shape)} and weight {tuple(weight.shape)}"
        raise InvalidInput(f"{shapes} have no product", "give (B, tokens, K) or (M, K), and (N, K)")
    if dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInput(f"w8a8_linear cannot give {dtype}", "ask for float16 or bfloat16")
    if limit is not None and not limit > 0:
        raise InvalidInput(f"w8a8_linear cannot clip to ±{limit}", "give a limit above 0")
    rows, columns = values.shape[:-1], weight.shape[0]
    if out is None:
        out = torch.empty(*rows, columns, dtype=dtype, device=values.device)
    fp32 = torch.float32
    _check("values", values, torch.int8, values.shape)
    _check("scales", scales, fp32, rows)
    _check("weight", weight, torch.int8, weight.shape)
    for name, vector in (("weight_scales", weight_scales), ("bias", bias)):
        _check(name, vector, fp32, (columns,))
    for name, matrix in (("residual", residual), ("out", out)):
        _check(name, matrix, dtype, (*rows, columns))
    library.load().call(
        "w8a8_linear",
        values.device,
        values=values,
        scales=scales,
        weight=weight,
        weight_scales=weight_scales,
        bias=bias,
        gate=gate,
        residual=residual,
        constant=constant,
        out=out,
        rows=rows.numel(),
        columns=columns,
        depth=values.shape[-1],
        # rows of an image
        tokens=max(rows[-1], 1),
        type=TYPES[dtype],
        gate_stride=_image_stride("gate", gate, rows, columns),
        constant_stride=_image_stride("constant", constant, rows, columns),
        limit=limit or 0.0,
        silu=int(silu),
    )
    return out


def _check(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise InvalidInput(
            f"{name} of w8a8_linear is {tensor.dtype} {tuple(tensor.shape)}{layout}",
            f"give contiguous {dtype} {tuple(shape)}",
        )


def _image_stride(name: str, vector: Tensor | None, rows: tuple[int, ...], columns: int) -> int:
    """How many numbers apart the vectors of two images are, 0 where there is one."""
    if vector is None:
        return 0
    one = vector.shape in ((columns,), (1, 1, columns))
    each = len(rows) == 2 and vector.shape == (rows[0], 1, columns)
    if vector.dtype != torch.float32 or not (one or each) or vector.stride(-1) != 1:
        raise InvalidInput(
            f"{name} of w8a8_linear is {vector.dtype} {tuple(vector.shape)}, strides {vector.stride()}",
            f"give float32 ({columns},) or (B, 1, {columns}) without gaps between channels",
        )
    return 0 if one else vector.stride(0)
