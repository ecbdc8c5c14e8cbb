"""`sana_edge.int8.quant` for the rows of a Triton program."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# A program reads its rows once and keeps them in registers, since a row's scale is known only at its end. Of
# narrow rows it takes several, up to _ELEMENTS in all; a warp gets at least 512 elements, 16 per thread: two
# 16-byte loads of a 16-bit dtype in flight. The widest row, 16384, then has 32 registers' worth in 16 warps.
# Reasoned, not measured.
_ELEMENTS = 2048
_PER_WARP = 512
_MOST_WARPS = 16


class Tile(NamedTuple):
    """Rows and columns (powers of 2) that a program holds, and its warps."""

    rows: int
    block: int
    warps: int


def pick_tile(C: int) -> Tile:
    """The tile for rows of C elements, 1 to `checks.WIDEST`."""
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
