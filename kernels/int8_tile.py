"""`sana_edge.quant` for the rows that a Triton program holds, and what launchers of such kernels check."""

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
def quantize_tile(b_x):
    """`quant.quantize_rows` of fp32 (ROWS, BLOCK), padded with 0: int8 values and scales (ROWS,).

    As in `sana_edge.ops`, rows with NaN or infinity have the scale NaN; their values are 0.
    """
    # without the sign, the bits of floats are ordered as the floats, with infinity and then NaN behind them;
    # maxima of floats would drop NaN
    b_bits = tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    b_finite = b_bits < 0x7F800000
    b_absmax = tl.where(b_finite, b_bits, 0).to(tl.float32, bitcast=True)
    # divisions are correctly rounded, as torch's; below 2^-126 there is no reciprocal
    b_steps = tl.div_rn(b_absmax, tl.full(b_absmax.shape, 127.0, tl.float32))
    b_steps = tl.where(b_steps < 1.1754943508222875e-38, 1.0, b_steps)
    b_inverse = tl.div_rn(tl.full(b_steps.shape, 1.0, tl.float32), b_steps)
    # clipped first, which gives the same, and keeps the product apart from the sum in round_half_even
    b_clipped = tl.minimum(tl.maximum(b_x * b_inverse[:, None], -127.0), 127.0)
    b_values = tl.where(b_finite[:, None], round_half_even(b_clipped), 0.0)
    return b_values.to(tl.int8), tl.where(b_finite, b_steps, float("nan"))


def check_rows(op: str, kernel: object, x: Tensor) -> None:
    """That a kernel of this module's kind can read x (..., C).

    Raises:
        InvalidInput: another dtype than `FLOATS`, no or too many columns, or gaps in memory.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    if x.device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise UnsupportedDevice(
            f"the Triton kernel {op} runs on CUDA devices, not on {x.device.type}", "use the torch backend"
        )
    if x.dtype not in FLOATS:
        raise InvalidInput(f"x of {op} is {x.dtype}", "give float32, bfloat16 or float16")
    if x.ndim < 1 or not 1 <= x.shape[-1] <= WIDEST:
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)}", f"give (..., C), C from 1 to {WIDEST}, or use torch"
        )
    if not x.is_contiguous():
        raise InvalidInput(f"x of {op} is not contiguous", "call x.contiguous()")


def empty_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """For x (..., C): values (..., C) int8 and scales (...,) fp32, to be filled."""
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    return values, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
