"""The kernels of `mix_ffn`.

Images (B, N, 2 · HIDDEN) have the value's channels, then the gate's. Nothing is atomic, and no sum depends on
the order of programs.
"""

# kernels have no types
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from sana_edge.kernels.triton.int8_tile import quantize_tile


@triton.jit
def silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def _silu_slope(b_x):
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_x))
    return b_sigmoid * (1.0 + b_x * (1.0 - b_sigmoid))


@triton.jit
def _vector(p_vector, o_c, m_c):
    return tl.load(p_vector + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _add_row(p_row, p_weight, o_x, o_c, m_row, m_c, W, CHANNELS: tl.constexpr, b_above, b_here, b_below):
    """Adds SiLU of one row of pixels to the convolutions of the rows above it, here and below it.

    p_row is the row's start; of one that is outside of the image, m_row is false. p_weight (channels, 3, 3).
    """
    for dx in tl.static_range(3):
        o_column = o_x + (dx - 1)
        m_x = m_row & (o_column >= 0) & (o_column < W)
        o_tile = o_column[:, None] * CHANNELS + o_c[None, :]
        b_x = tl.load(p_row + o_tile, mask=m_x[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        b_x = silu(b_x)
        b_above += b_x * _vector(p_weight + (6 + dx), o_c * 9, m_c)
        b_here += b_x * _vector(p_weight + (3 + dx), o_c * 9, m_c)
        b_below += b_x * _vector(p_weight + dx, o_c * 9, m_c)
    return b_above, b_here, b_below


@triton.jit
def glu_depthwise_kernel(
    p_x, p_weight, p_bias, p_grad, p_out, H, W,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """value · SiLU(gate) of ROWS rows of pixels, p_out (B, N, HIDDEN), from top to bottom.

    Each SiLU is computed for three columns but not for three rows: a row of pixels is added to three rows of
    sums, of which the first is then complete. With the result's gradient, p_grad (B, N, HIDDEN), p_out is the
    convolution's, (B, N, 2 · HIDDEN) fp32.
    """
    CHANNELS: tl.constexpr = 2 * HIDDEN
    columns, segments = tl.cdiv(W, BLOCK_X), tl.cdiv(H, ROWS)
    i_p = tl.program_id(0)
    i_b, first = (i_p // (columns * segments)).to(tl.int64), i_p // columns % segments * ROWS
    o_x = i_p % columns * BLOCK_X + tl.arange(0, BLOCK_X)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < HIDDEN
    m_tile = (o_x < W)[:, None] & m_c[None, :]
    p_x += i_b * H * W * CHANNELS
    last = tl.minimum(first + ROWS, H)
    b_zeros = tl.zeros((BLOCK_X, BLOCK_C), tl.float32)
    b_value_bias = b_zeros + _vector(p_bias, o_c, m_c)
    b_gate_bias = b_zeros + _vector(p_bias + HIDDEN, o_c, m_c)
    b_value, b_value_here, b_gate, b_gate_here = b_value_bias, b_value_bias, b_gate_bias, b_gate_bias
    for y in range(first - 1, last + 1):
        m_row = (y >= 0) & (y < H)
        b_value, b_value_here, b_value_below = _add_row(
            p_x + y * W * CHANNELS, p_weight, o_x, o_c, m_row, m_c, W, CHANNELS,
            b_value, b_value_here, b_value_bias,
        )  # fmt: skip
        b_gate, b_gate_here, b_gate_below = _add_row(
            p_x + (y * W * CHANNELS + HIDDEN), p_weight + 9 * HIDDEN, o_x, o_c, m_row, m_c, W, CHANNELS,
            b_gate, b_gate_here, b_gate_bias,
        )  # fmt: skip
        # the row above has all of its three
        m_out = m_tile & (y > first)
        o_pixel = (i_b * H + (y - 1)) * W + o_x[:, None]
        o_out = o_pixel * HIDDEN + o_c[None, :]
        if p_grad is None:
            b_out = b_value * silu(b_gate)
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
        else:
            b_grad = tl.load(p_grad + o_out, mask=m_out, other=0.0).to(tl.float32)
            o_out = o_pixel * CHANNELS + o_c[None, :]
            tl.store(p_out + o_out, b_grad * silu(b_gate), mask=m_out)
            tl.store(p_out + (o_out + HIDDEN), b_grad * b_value * _silu_slope(b_gate), mask=m_out)
        b_value, b_value_here = b_value_here, b_value_below
        b_gate, b_gate_here = b_gate_here, b_gate_below


@triton.jit
def _add_tap(
    p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, DY: tl.constexpr, DX: tl.constexpr,
    CHANNELS: tl.constexpr, b_silu, b_grad, b_tap,
):  # fmt: skip
    """Adds what the pixels that saw these through tap (DY, DX) give to SiLU's gradient and to the tap's."""
    o_y, o_x = o_n // W - (DY - 1), o_n % W - (DX - 1)
    m_tap = m_n & (o_y >= 0) & (o_y < H) & (o_x >= 0) & (o_x < W)
    o_tile = (o_y * W + o_x)[:, None] * CHANNELS + o_c[None, :]
    b_mixed = tl.load(p_mixed + o_tile, mask=m_tap[:, None] & m_c[None, :], other=0.0)
    b_grad += b_mixed * _vector(p_weight + (3 * DY + DX), o_c * 9, m_c)
    return b_grad, b_tap + b_mixed * b_silu


@triton.jit
def glu_depthwise_grad_kernel(
    p_x, p_weight, p_mixed, p_grad, p_parts, H, W, chunk,
    CHANNELS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the gradient of the convolution's results, p_mixed (B, N, CHANNELS) fp32: that of x, p_grad.

    And what one chunk of tokens adds to those of the weight, nine taps, and of the bias: p_parts
    (B · chunks, 10, CHANNELS) fp32.
    """
    tokens = H * W
    chunks = tl.cdiv(tokens, chunk)
    i_p = tl.program_id(0)
    i_b, first = (i_p // chunks).to(tl.int64), i_p % chunks * chunk
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < CHANNELS
    p_x += i_b * tokens * CHANNELS
    p_grad += i_b * tokens * CHANNELS
    p_mixed += i_b * tokens * CHANNELS
    b_00 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    b_01, b_02, b_10, b_11, b_12, b_20, b_21, b_22, b_bias = (
        b_00, b_00, b_00, b_00, b_00, b_00, b_00, b_00, b_00,
    )  # fmt: skip
    last = tl.minimum(first + chunk, tokens)
    for start in range(first, last, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < last
        m_tile = m_n[:, None] & m_c[None, :]
        o_tile = o_n[:, None] * CHANNELS + o_c[None, :]
        b_x = tl.load(p_x + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_s = silu(b_x)
        b_bias += tl.load(p_mixed + o_tile, mask=m_tile, other=0.0)
        b_g = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        b_g, b_00 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 0, 0, CHANNELS, b_s, b_g, b_00)
        b_g, b_01 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 0, 1, CHANNELS, b_s, b_g, b_01)
        b_g, b_02 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 0, 2, CHANNELS, b_s, b_g, b_02)
        b_g, b_10 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 1, 0, CHANNELS, b_s, b_g, b_10)
        b_g, b_11 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 1, 1, CHANNELS, b_s, b_g, b_11)
        b_g, b_12 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 1, 2, CHANNELS, b_s, b_g, b_12)
        b_g, b_20 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 2, 0, CHANNELS, b_s, b_g, b_20)
        b_g, b_21 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 2, 1, CHANNELS, b_s, b_g, b_21)
        b_g, b_22 = _add_tap(p_mixed, p_weight, o_n, o_c, m_n, m_c, H, W, 2, 2, CHANNELS, b_s, b_g, b_22)
        tl.store(p_grad + o_tile, (b_g * _silu_slope(b_x)).to(p_grad.dtype.element_ty), mask=m_tile)
    p_parts += i_p.to(tl.int64) * (10 * CHANNELS) + o_c
    tl.store(p_parts, tl.sum(b_00, 0), mask=m_c)
    tl.store(p_parts + CHANNELS, tl.sum(b_01, 0), mask=m_c)
    tl.store(p_parts + 2 * CHANNELS, tl.sum(b_02, 0), mask=m_c)
    tl.store(p_parts + 3 * CHANNELS, tl.sum(b_10, 0), mask=m_c)
    tl.store(p_parts + 4 * CHANNELS, tl.sum(b_11, 0), mask=m_c)
    tl.store(p_parts + 5 * CHANNELS, tl.sum(b_12, 0), mask=m_c)
    tl.store(p_parts + 6 * CHANNELS, tl.sum(b_20, 0), mask=m_c)
    tl.store(p_parts + 7 * CHANNELS, tl.sum(b_21, 0), mask=m_c)
    tl.store(p_parts + 8 * CHANNELS, tl.sum(b_22, 0), mask=m_c)
    tl.store(p_parts + 9 * CHANNELS, tl.sum(b_bias, 0), mask=m_c)


@triton.jit
def _depthwise(p_x, p_weight, p_bias, o_rows, o_y, o_x, o_c, m_rows, m_c, H, W, CHANNELS: tl.constexpr):
    """The convolution of channels o_c at tokens o_rows, at (o_y, o_x); p_weight (3, 3, CHANNELS)."""
    b_sum = tl.zeros((o_rows.shape[0], o_c.shape[0]), tl.float32) + _vector(p_bias, o_c, m_c)
    for dy in tl.static_range(3):
        for dx in tl.static_range(3):
            o_top, o_left = o_y + (dy - 1), o_x + (dx - 1)
            m_tap = m_rows & (o_top >= 0) & (o_top < H) & (o_left >= 0) & (o_left < W)
            o_tile = (o_rows + ((dy - 1) * W + (dx - 1)))[:, None] * CHANNELS + o_c[None, :]
            b_x = tl.load(p_x + o_tile, mask=m_tap[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            b_sum += b_x * _vector(p_weight + (3 * dy + dx) * CHANNELS, o_c, m_c)
    return b_sum


@triton.jit
def dwconv_glu_quantize_kernel(
    p_x, p_weight, p_bias, p_static, p_values, p_scales, M, H, W,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of int8 of ROWS tokens at a time, with all of their channels: a scale is known at a row's end."""
    # 64 bit, since a batch of large pictures has more than 2^31 elements
    o_rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_rows, m_c = o_rows < M, o_c < HIDDEN
    o_n = (o_rows % (H * W)).to(tl.int32)
    o_y, o_x = o_n // W, o_n % W
    b_gate = silu(
        _depthwise(
            p_x + HIDDEN,
            p_weight + HIDDEN,
            p_bias + HIDDEN,
            o_rows,
            o_y,
            o_x,
            o_c,
            m_rows,
            m_c,
            H,
            W,
            2 * HIDDEN,
        )
    )
    b_value = _depthwise(p_x, p_weight, p_bias, o_rows, o_y, o_x, o_c, m_rows, m_c, H, W, 2 * HIDDEN)
    m_tile = m_rows[:, None] & m_c[None, :]
    b_out = (b_value * b_gate).to(p_x.dtype.element_ty).to(tl.float32)
    b_values, b_scales = quantize_tile(tl.where(m_tile, b_out, 0.0), p_static)
    tl.store(p_values + o_rows[:, None] * HIDDEN + o_c[None, :], b_values, mask=m_tile)
    tl.store(p_scales + o_rows, b_scales, mask=m_rows)
