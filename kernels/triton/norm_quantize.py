"""`reference_fused.norm_modulate_quantize` in Triton: LayerNorm, adaLN and per-token INT8 in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import check_rows, check_static_scale, check_vector, empty_rows
from sana_edge.kernels.triton.int8_tile import pick_tile, quantize_tile


@triton.jit
def norm_modulate_quantize_kernel(
    p_x,
    p_scale,
    p_shift,
    p_static,
    p_values,
    p_scales,
    M,
    tokens,
    stride_scale,
    stride_shift,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_columns = tl.arange(0, BLOCK)
    m_rows = o_rows < M
    m_columns = (o_columns < C)[None, :]
    m_tile = m_rows[:, None] & m_columns
    # 64 bit, since a batch of large pictures has more than 2^31 elements
    o_tile = o_rows.to(tl.int64)[:, None] * C + o_columns[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)

    # two sums rather than one of squares, which would cancel where the mean is large
    b_centred = tl.where(m_columns, b_x - (tl.sum(b_x, axis=1) / C)[:, None], 0.0)
    b_variance = tl.sum(b_centred * b_centred, axis=1) / C
    b_normed = b_centred * tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), tl.sqrt_rn(b_variance + eps))[:, None]

    # rows of a picture share their vectors; the stride is 0 where all pictures do
    o_batch = (o_rows // tokens).to(tl.int64)[:, None]
    o_scale = o_batch * stride_scale + o_columns[None, :]
    o_shift = o_batch * stride_shift + o_columns[None, :]
    b_scale = tl.load(p_scale + o_scale, mask=m_tile, other=0.0).to(tl.float32)
    b_shift = tl.load(p_shift + o_shift, mask=m_tile, other=0.0).to(tl.float32)
    b_values, b_scales = quantize_tile(b_normed * b_scale + b_shift, p_static)
    tl.store(p_values + o_tile, b_values, mask=m_tile)
    tl.store(p_scales + o_rows, b_scales, mask=m_rows)


def norm_modulate_quantize(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference_fused.norm_modulate_quantize`, up to the order of the sums in the mean and the variance.

    Args:
        x: (B, N, C) fp32, bf16 or fp16, contiguous, C up to 16384.
        scale, shift: (C,) or (B, 1, C), float, of any stride along B; ``scale`` contains the 1 of 1 + scale.
        static_scale: () fp32, of all rows; each has its own where this is None.

    Returns:
        values (B, N, C) int8 and scales (B, N) fp32; 0 and NaN in rows with NaN or infinity.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "norm_modulate_quantize"
    check_rows(op, norm_modulate_quantize_kernel, x)
    if x.ndim != 3:
        raise InvalidInput(f"x of {op} has shape {tuple(x.shape)}", "give (B, N, C)")
    strides = check_vector(op, "scale", scale, x), check_vector(op, "shift", shift, x)
    check_static_scale(op, static_scale, x)
    values, scales = empty_rows(x)
    if x.numel() == 0:
        return values, scales
    M, C = scales.numel(), x.shape[-1]
    tile = pick_tile(C)
    with torch.cuda.device_of(x):
        norm_modulate_quantize_kernel[(triton.cdiv(M, tile.rows),)](
            *(x, scale, shift, static_scale, values, scales, M),
            *(x.shape[1], *strides, eps),
            C=C,
            ROWS=tile.rows,
            BLOCK=tile.block,
            num_warps=tile.warps,
        )
    return values, scales
