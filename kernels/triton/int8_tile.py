"""`sana_edge.int8.quant` for the rows of a Triton program, and what launchers of such kernels check."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# A program reads its rows once and keeps them in registers, since a row's scale is known only at its end. Of
# narrow rows it takes several, up to _ELEMENTS in all; a warp gets at least 512 elements, 16 per thread: two
# 16-byte loads of a 16-bit dtype in flight. The widest row, 16384, then has 32 registers' worth in 16 warps.
# Reasoned, not measured.
_ELEMENTS = 2048
_PER_WARP = 512
_MOST_WARPS = 16
WIDEST = 16384


class Tile(NamedTuple):
    """Rows and columns (powers of 2) that a program holds, and its warps."""

    rows: int
    block: int
    warps: int


def pick_tile(C: int) -> Tile:
    """The tile for rows of C elements, 1 to `WIDEST`."""
    block = triton.next_power_of_2(C)
    rows = max(_ELEMENTS // block, 1)
    return Tile(rows, block, min(max(rows * block // _PER_WARP, 1), _MOST_WARPS))


@triton.jit
def round_half_even(b_x):
    """The integer nearest to b_x, ties to even, for |b_x| below 2^22; as a float.

    From 2^23 to 2^24 fp32 numbers are the integers: the sum with 1.5 · 2^23 lies there, and is rounded to one
    of them by the addition, ties to even, as 1.5 · 2^23 is even itself. Taking it away again is exact. Not to
    be given a bare product: with the sum it would be contracted to a fused multiply-add, which rounds once.
    """
    return (b_x + 12582912.0) - 12582912.0


@triton.jit
def magnitude_bits(b_x):
    """|b_x| of fp32 as integers that are ordered as the numbers are, with infinity and then NaN behind them.

    Maxima of floats would drop NaN.
    """
    return b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_scales(b_bits, p_static):
    """Of rows whose largest `magnitude_bits` are b_bits (ROWS,): the reciprocals of their scales, and these.

    p_static is one fp32 scale for all of them, or None. The reciprocal of a row with NaN or infinity is 0,
    its scale NaN, as in `sana_edge.int8.ops`.
    """
    b_finite = b_bits < 0x7F800000
    # divisions are correctly rounded, as torch's; below 2^-126 there is no reciprocal
    if p_static is not None:
        b_steps = tl.full(b_bits.shape, 1.0, tl.float32) * tl.load(p_static)
    else:
        b_absmax = tl.where(b_finite, b_bits, 0).to(tl.float32, bitcast=True)
        b_steps = tl.div_rn(b_absmax, tl.full(b_bits.shape, 127.0, tl.float32))
        b_steps = tl.where(b_steps < 1.1754943508222875e-38, 1.0, b_steps)
    b_inverse = tl.div_rn(tl.full(b_bits.shape, 1.0, tl.float32), b_steps)
    return tl.where(b_finite, b_inverse, 0.0), tl.where(b_finite, b_steps, float("nan"))


@triton.jit
def quantize_with(b_x, b_inverse):
    """Int8 values of fp32 (ROWS, BLOCK) by the reciprocals (ROWS,) of `row_scales`, 0 where these are 0."""
    # clipped first, which gives the same, and keeps the product apart from the sum in round_half_even
    b_clipped = tl.minimum(tl.maximum(b_x * b_inverse[:, None], -127.0), 127.0)
    return tl.where(b_inverse[:, None] != 0.0, round_half_even(b_clipped), 0.0).to(tl.int8)


@triton.jit
def quantize_tile(b_x, p_static):
    """`reference_fused.quantize_rows` of fp32 (ROWS, BLOCK), padded with 0: int8 and scales (ROWS,)."""
    b_inverse, b_scales = row_scales(tl.max(magnitude_bits(b_x), axis=1), p_static)
    return quantize_with(b_x, b_inverse), b_scales


def check_kernel(op: str, kernel: object, x: Tensor) -> None:
    """That x is where a kernel can run.

    Raises:
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    if x.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise UnsupportedDevice(
            f"the Triton kernel {op} runs on CUDA devices, not on {x.device.type}", "use the torch backend"
        )


def check_rows(op: str, kernel: object, x: Tensor) -> None:
    """That a kernel of this module's kind can read x (..., C).

    Raises:
        InvalidInput: another dtype than `FLOATS`, no or too many columns, or gaps in memory.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    check_kernel(op, kernel, x)
    if x.dtype not in FLOATS:
        raise InvalidInput(f"x of {op} is {x.dtype}", "give float32, bfloat16 or float16")
    if x.ndim < 1 or not 1 <= x.shape[-1] <= WIDEST:
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)}", f"give (..., C), C from 1 to {WIDEST}, or use torch"
        )
    if not x.is_contiguous():
        raise InvalidInput(f"x of {op} is not contiguous", "call x.contiguous()")


def check_static_scale(op: str, static_scale: Tensor | None, x: Tensor) -> None:
    """That ``static_scale`` is None, or () fp32 where x is.

    Raises:
        InvalidInput: anything else.
    """
    if static_scale is None:
        return
    if static_scale.ndim or static_scale.dtype != torch.float32 or static_scale.device != x.device:
        found = f"{tuple(static_scale.shape)} {static_scale.dtype} on {static_scale.device}"
        raise InvalidInput(f"static_scale of {op} is {found}", f"give one float32 number, (), on {x.device}")


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """For x (..., C): values (..., C) int8 and scales (...,) fp32, to be filled."""
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
