"""`reference_fused.quantize_rows` in Triton: per-token INT8, every element read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.kernels.triton.checks import check_rows, check_static_scale, empty_rows
from sana_edge.kernels.triton.int8_tile import pick_tile, quantize_tile


@triton.jit
def quantize_rows_kernel(
    p_x, p_static, p_values, p_scales, M, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_columns = tl.arange(0, BLOCK)
    m_rows = o_rows < M
    m_tile = m_rows[:, None] & (o_columns < C)[None, :]
    # 64 bit, since a batch of large pictures has more than 2^31 elements
    o_tile = o_rows.to(tl.int64)[:, None] * C + o_columns[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_values, b_scales = quantize_tile(b_x, p_static)
    tl.store(p_values + o_tile, b_values, mask=m_tile)
    tl.store(p_scales + o_rows, b_scales, mask=m_rows)


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference_fused.quantize_rows`, equal to it bit for bit in rows that are finite.

    Args:
        x: (..., C) fp32, bf16 or fp16, contiguous, C up to 16384.
        static_scale: () fp32, of all rows; each has its own where this is None.

    Returns:
        values (..., C) int8 and scales (...,) fp32; 0 and NaN in rows with NaN or infinity.

    Raises:
        InvalidInput: types, shapes or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    check_rows("quantize_rows", quantize_rows_kernel, x)
    check_static_scale("quantize_rows", static_scale, x)
    values, scales = empty_rows(x)
    if x.numel() == 0:
        return values, scales
    C, M = x.shape[-1], scales.numel()
    tile = pick_tile(C)
    with torch.cuda.device_of(x):
        quantize_rows_kernel[(triton.cdiv(M, tile.rows),)](
            *(x, static_scale, values, scales, M), C=C, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps
        )
    return values, scales
