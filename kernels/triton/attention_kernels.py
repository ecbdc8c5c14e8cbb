"""The kernels of `attention`.

Tensors of tokens come with the strides of their pictures and tokens, in elements; those that are written are
contiguous. A state (D + 1, D) holds keys by values, its last row the sum of the keys.
"""

# kernels have no types
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from sana_edge.kernels.triton.int8_tile import magnitude_bits, quantize_with, row_scales
from sana_edge.kernels.triton.linear_attention_kernels import head_tile, relu, store_part


@triton.jit
def rms_roots_kernel(
    p_x, p_roots, x_token, M, eps,
    C: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean(x²) + eps) of each of the first PARTS parts, C wide, of M tokens: p_roots (M, PARTS)."""
    o_rows, i_part = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    o_c = tl.arange(0, BLOCK)
    m_rows = o_rows < M
    o_tile = o_rows.to(tl.int64)[:, None] * x_token + (i_part * C + o_c)[None, :]
    b_x = tl.load(p_x + o_tile, mask=m_rows[:, None] & (o_c < C)[None, :], other=0.0).to(tl.float32)
    b_root = tl.sqrt_rn(tl.sum(b_x * b_x, 1) / C + eps)
    b_root = tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), b_root)
    tl.store(p_roots + o_rows.to(tl.int64) * PARTS + i_part, b_root, mask=m_rows)


@triton.jit
def kv_state_kernel(
    p_k, p_v, p_roots, p_norm, p_parts, kv_row, kv_token, tokens, chunk, heads,
    D: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One chunk's state of one head, ReLU(K)ᵀ V: p_parts (B · heads, chunks, D + 1, D) fp32.

    Factors of 16 bits are multiplied as such: their products are exact in fp32. Of k · root · norm, with
    p_roots (B, N, 2) for q and k and p_norm (heads · D,), both are fp32. WIDEN makes them so in any case, for
    the interpreter, which has no arithmetic in bf16.
    """
    i_head, i_chunk = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, D)
    b_state = tl.zeros((D, D), tl.float32)
    b_sum = tl.zeros((D,), tl.float32)
    for first in range(i_chunk * chunk, tl.minimum((i_chunk + 1) * chunk, tokens), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        o_tile = head_tile(i_head, heads, kv_row, kv_token, o_n, D)
        b_k = tl.load(p_k + o_tile, mask=m_n[:, None], other=0.0).to(tl.float32)
        b_v = tl.load(p_v + o_tile, mask=m_n[:, None], other=0.0)
        if p_roots is not None:
            o_root = ((i_head // heads).to(tl.int64) * tokens + o_n) * 2 + 1
            b_k = b_k * tl.load(p_roots + o_root, mask=m_n, other=0.0)[:, None]
            b_k = b_k * tl.load(p_norm + (i_head % heads) * D + o_d).to(tl.float32)[None, :]
            b_v = b_v.to(tl.float32)
        elif WIDEN:
            b_v = b_v.to(tl.float32)
        b_k = relu(b_k)
        b_state = tl.dot(tl.trans(b_k.to(b_v.dtype)), b_v, b_state, input_precision="tf32x3")
        b_sum += tl.sum(b_k, 0)
    store_part(p_parts, b_state, b_sum, i_head, i_chunk, D)


@triton.jit
def _read_head(p_q, p_state, p_norm, b_roots, o_token, m_n, i_head, eps, D: tl.constexpr):
    """One head's outputs (BLOCK_N, D), rounded to q's dtype, as fp32."""
    o_d = tl.arange(0, D)
    b_q = tl.load(p_q + (o_token[:, None] + (i_head * D + o_d)[None, :]), mask=m_n[:, None], other=0.0)
    b_q = b_q.to(tl.float32)
    if p_norm is not None:
        b_q = b_q * b_roots[:, None] * tl.load(p_norm + i_head * D + o_d).to(tl.float32)[None, :]
    b_q = relu(b_q)
    p_state += i_head * ((D + 1) * D)
    b_state = tl.load(p_state + (o_d[:, None] * D + o_d[None, :]))
    b_divisor = tl.sum(b_q * tl.load(p_state + D * D + o_d)[None, :], 1) + eps
    b_out = tl.div_rn(tl.dot(b_q, b_state, input_precision="tf32x3"), b_divisor[:, None])
    return b_out.to(p_q.dtype.element_ty).to(tl.float32)


@triton.jit
def linear_attention_finish_kernel(
    p_q, p_state, p_roots, p_norm, p_static, p_values, p_scales, q_row, q_token, tokens, heads, eps,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of int8 of one block of tokens, p_values (B, N, heads · D): all heads are read twice.

    Once for the rows' largest, and once more to be quantized. A block's outputs do not fit into registers,
    and to compute them again costs less than to write and read them.
    """
    i_b, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_n, o_d = i_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_n = o_n < tokens
    o_row = i_b * tokens + o_n
    o_token = i_b * q_row + o_n.to(tl.int64) * q_token
    p_state += i_b * heads * ((D + 1) * D)
    b_roots = tl.zeros((BLOCK_N,), tl.float32)
    if p_roots is not None:
        b_roots = tl.load(p_roots + o_row * 2, mask=m_n, other=0.0)
    b_bits = tl.zeros((BLOCK_N,), tl.int32)
    for i_head in range(heads):
        b_out = _read_head(p_q, p_state, p_norm, b_roots, o_token, m_n, i_head, eps, D)
        b_bits = tl.maximum(b_bits, tl.max(magnitude_bits(b_out), 1))
    b_inverse, b_scales = row_scales(b_bits, p_static)
    tl.store(p_scales + o_row, b_scales, mask=m_n)
    for i_head in range(heads):
        b_out = _read_head(p_q, p_state, p_norm, b_roots, o_token, m_n, i_head, eps, D)
        o_out = (o_row * (heads * D))[:, None] + (i_head * D + o_d)[None, :]
        tl.store(p_values + o_out, quantize_with(b_out, b_inverse), mask=m_n[:, None])


@triton.jit
def cross_attention_kernel(
    p_q, p_keys, p_values, p_lengths, p_roots, p_norm, p_out, tokens, heads, capacity, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Softmax attention of one block of tokens of one head, p_out (R, T, heads · D).

    p_keys (R, heads, capacity, D), p_values (R, heads, D, capacity). The queries times p_roots (R, T) and
    p_norm (heads · D,) are two numbers of the keys' 16 bits, which together have twice the digits.
    """
    i_row, i_block = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(1)
    i_head = tl.program_id(0) % heads
    o_n, o_d, o_l = i_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_L)
    m_n, m_d = o_n < tokens, o_d < D
    o_token = i_row * tokens + o_n
    o_q = (o_token * (heads * D))[:, None] + (i_head * D + o_d)[None, :]
    m_q = m_n[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_q, mask=m_q, other=0.0)
    if WIDEN:
        b_q = b_q.to(tl.float32)
    b_low = b_q
    if p_norm is not None:
        b_exact = b_q.to(tl.float32) * tl.load(p_roots + o_token, mask=m_n, other=0.0)[:, None]
        b_exact = b_exact * tl.load(p_norm + i_head * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        b_q = b_exact.to(b_q.dtype)
        b_low = (b_exact - b_q.to(tl.float32)).to(b_q.dtype)
    length = tl.minimum(tl.load(p_lengths + i_row), capacity)
    start = (i_row * heads + i_head) * capacity * D
    p_keys += start
    p_values += start
    b_most = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_N,), tl.float32)
    b_out = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, length, BLOCK_L):
        o_slot = first + o_l
        m_l = o_slot < length
        # (BLOCK_D, BLOCK_L)
        b_k = tl.load(
            p_keys + (o_slot[None, :] * D + o_d[:, None]), mask=m_l[None, :] & m_d[:, None], other=0.0
        )
        # (BLOCK_L, BLOCK_D)
        b_v = tl.load(
            p_values + (o_d[None, :] * capacity + o_slot[:, None]),
            mask=m_l[:, None] & m_d[None, :],
            other=0.0,
        )
        if WIDEN:
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
        b_scores = tl.dot(b_q, b_k, input_precision="tf32x3")
        if (p_norm is not None) and (b_q.dtype != tl.float32):
            b_scores = tl.dot(b_low, b_k, b_scores, input_precision="tf32x3")
        b_scores = tl.where(m_l[None, :], b_scores * scale, float("-inf"))
        b_new = tl.maximum(b_most, tl.max(b_scores, 1))
        b_weights = tl.exp(b_scores - b_new[:, None])
        b_fade = tl.exp(b_most - b_new)
        b_sum = b_sum * b_fade + tl.sum(b_weights, 1)
        b_out = tl.dot(b_weights.to(b_v.dtype), b_v, b_out * b_fade[:, None], input_precision="tf32x3")
        b_most = b_new
    b_out = tl.div_rn(b_out, b_sum[:, None])
    tl.store(p_out + o_q, b_out.to(p_out.dtype.element_ty), mask=m_q)
