"""The kernels of `ends`. Products are of fp32 factors, each three of TF32."""

# kernels have no types
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def patch_embed_kernel(
    p_latent, p_weight, p_bias, p_positions, p_out, images, cells,
    CHANNELS: tl.constexpr, DEPTH: tl.constexpr, C: tl.constexpr, COPIES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens (COPIES · images, cells, C) of a latent (images, CHANNELS, cells), a tile of one image each."""
    i_b = tl.program_id(2).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_k = tl.arange(0, DEPTH)
    m_n, m_c, m_k = o_n < cells, o_c < C, o_k < CHANNELS
    # (DEPTH, BLOCK_N)
    o_latent = i_b * CHANNELS * cells + (o_k[:, None] * cells + o_n[None, :])
    b_latent = tl.load(p_latent + o_latent, mask=m_k[:, None] & m_n[None, :], other=0.0)
    b_latent = b_latent.to(p_out.dtype.element_ty).to(tl.float32)
    o_weight = o_k[:, None] * C + o_c[None, :]
    b_weight = tl.load(p_weight + o_weight, mask=m_k[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    b_out = tl.dot(tl.trans(b_latent), b_weight, input_precision="tf32x3")
    b_out += tl.load(p_bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    m_out = m_n[:, None] & m_c[None, :]
    o_out = o_n[:, None] * C + o_c[None, :]
    if p_positions is not None:
        b_out += tl.load(p_positions + o_out, mask=m_out, other=0.0).to(tl.float32)
    b_out = b_out.to(p_out.dtype.element_ty)
    for i_copy in tl.static_range(COPIES):
        tl.store(p_out + (i_copy * images + i_b) * cells * C + o_out, b_out, mask=m_out)


@triton.jit
def _velocity(
    p_x, p_scale, p_shift, p_weight, p_bias, i_b, tokens, o_n, m_n, stride_scale, stride_shift, eps,
    C: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One image's last layer at tokens o_n: (BLOCK_N, WIDTH). Three passes over the rows, which L2 keeps."""
    o_k, o_c = tl.arange(0, WIDTH), tl.arange(0, BLOCK_C)
    o_rows = (i_b * tokens + o_n)[:, None] * C
    b_sum = tl.zeros((o_n.shape[0],), tl.float32)
    for start in range(0, C, BLOCK_C):
        m_x = m_n[:, None] & (start + o_c < C)[None, :]
        b_sum += tl.sum(tl.load(p_x + o_rows + (start + o_c)[None, :], mask=m_x, other=0.0).to(tl.float32), 1)
    b_mean = (b_sum / C)[:, None]
    # squares of what is centred, which do not cancel where the mean is large
    b_squares = tl.zeros((o_n.shape[0],), tl.float32)
    for start in range(0, C, BLOCK_C):
        m_x = m_n[:, None] & (start + o_c < C)[None, :]
        b_x = tl.load(p_x + o_rows + (start + o_c)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, b_x - b_mean, 0.0)
        b_squares += tl.sum(b_x * b_x, 1)
    b_root = tl.div_rn(tl.full((o_n.shape[0],), 1.0, tl.float32), tl.sqrt_rn(b_squares / C + eps))[:, None]
    b_out = tl.zeros((o_n.shape[0], WIDTH), tl.float32)
    for start in range(0, C, BLOCK_C):
        m_c = start + o_c < C
        m_x = m_n[:, None] & m_c[None, :]
        b_x = tl.load(p_x + o_rows + (start + o_c)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_scale = tl.load(p_scale + i_b * stride_scale + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_shift = tl.load(p_shift + i_b * stride_shift + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_x = tl.where(m_x, (b_x - b_mean) * b_root * b_scale[None, :] + b_shift[None, :], 0.0)
        # (BLOCK_C, WIDTH)
        m_weight = m_c[:, None] & (o_k < CHANNELS)[None, :]
        o_weight = o_k[None, :] * C + (start + o_c)[:, None]
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0).to(tl.float32)
        b_out = tl.dot(b_x, b_weight, b_out, input_precision="tf32x3")
    return b_out + tl.load(p_bias + o_k, mask=o_k < CHANNELS, other=0.0).to(tl.float32)[None, :]


@triton.jit
def velocity_head_kernel(
    p_x, p_scale, p_shift, p_weight, p_bias, p_guidance, p_out, images, tokens, stride_scale, stride_shift,
    eps, C: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Velocities p_out (images, CHANNELS, tokens) of one block of tokens of one image, guided or not."""
    i_b = tl.program_id(1).to(tl.int64)
    o_n, o_k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    m_n = o_n < tokens
    b_out = _velocity(
        p_x, p_scale, p_shift, p_weight, p_bias, i_b, tokens, o_n, m_n, stride_scale, stride_shift, eps,
        C, CHANNELS, WIDTH, BLOCK_C,
    )  # fmt: skip
    if p_guidance is not None:
        b_prompted = _velocity(
            p_x, p_scale, p_shift, p_weight, p_bias, i_b + images, tokens, o_n, m_n, stride_scale,
            stride_shift, eps, C, CHANNELS, WIDTH, BLOCK_C,
        )  # fmt: skip
        b_out = b_out + tl.load(p_guidance) * (b_prompted - b_out)
    o_out = (i_b * CHANNELS + o_k[None, :]) * tokens + o_n[:, None]
    tl.store(p_out + o_out, b_out, mask=m_n[:, None] & (o_k < CHANNELS)[None, :])
