"""The kernels of `linear_attention`, which describes how they work together.

Heads are numbered through the batch, i_head of B · heads. Tensors (B, N, C) come with the strides of rows of
the batch and of tokens; those that are written are contiguous. A state (D + 1, D) holds values by keys, and
its last row, b_ones, belongs to the row of ones below V.
"""

# kernels have no types
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def relu(x):
    # maximum() would lose NaN
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def head_tile(i_head, heads, row_stride, token_stride, o_n, D: tl.constexpr):
    """Offsets (BLOCK_N, D) of one head's tokens o_n in (B, N, heads · D); 64 bit, for large batches."""
    o_row = (i_head // heads).to(tl.int64) * row_stride + (i_head % heads) * D
    return o_row + o_n.to(tl.int64)[:, None] * token_stride + tl.arange(0, D)[None, :]


@triton.jit
def linear_attention_state_kernel(
    p_k, p_v, p_parts, k_row, k_token, v_row, v_token, tokens, chunk, heads,
    D: tl.constexpr, BLOCK_N: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One chunk's state of one head, V1 Kᵀ: p_parts (B · heads, chunks, D + 1, D) fp32.

    Factors of 16 bits are multiplied as such: their products are exact in fp32. WIDEN makes them fp32 first,
    for the interpreter, which has no arithmetic in bf16.
    """
    i_head, i_chunk = tl.program_id(0), tl.program_id(1)
    b_state = tl.zeros((D, D), tl.float32)
    b_ones = tl.zeros((D,), tl.float32)
    for first in range(i_chunk * chunk, tl.minimum((i_chunk + 1) * chunk, tokens), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = (o_n < tokens)[:, None]
        b_k = tl.load(p_k + head_tile(i_head, heads, k_row, k_token, o_n, D), mask=m_n, other=0.0)
        b_v = tl.load(p_v + head_tile(i_head, heads, v_row, v_token, o_n, D), mask=m_n, other=0.0)
        b_k = relu(b_k.to(tl.float32))
        if WIDEN:
            b_v = b_v.to(tl.float32)
        b_state = tl.dot(tl.trans(b_v), b_k.to(b_v.dtype), b_state, input_precision="tf32x3")
        b_ones += tl.sum(b_k, 0)
    store_part(p_parts, b_state, b_ones, i_head, i_chunk, D)


@triton.jit
def linear_attention_sum_kernel(p_parts, p_state, chunks, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the chunks of p_parts (B · heads, chunks, SIZE), first to last: p_state (B · heads, SIZE)."""
    i_head, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_s = i_block * BLOCK + tl.arange(0, BLOCK)
    m_s = o_s < SIZE
    b_state = tl.zeros((BLOCK,), tl.float32)
    for i_chunk in range(chunks):
        b_state += tl.load(p_parts + (i_head * chunks + i_chunk) * SIZE + o_s, mask=m_s, other=0.0)
    tl.store(p_state + i_head * SIZE + o_s, b_state, mask=m_s)


@triton.jit
def linear_attention_read_kernel(
    p_q, p_state, p_out, q_row, q_token, tokens, heads, eps, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Outputs of one block of tokens of one head, (S Q) / (ones row of S Q + eps); p_out (B, N, C)."""
    i_head, i_block = tl.program_id(0), tl.program_id(1)
    o_n, o_d = i_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_n = (o_n < tokens)[:, None]
    p_state += i_head.to(tl.int64) * (D + 1) * D
    # (key, value)
    b_state = tl.load(p_state + o_d[None, :] * D + o_d[:, None])
    b_ones = tl.load(p_state + D * D + o_d)
    b_q = tl.load(p_q + head_tile(i_head, heads, q_row, q_token, o_n, D), mask=m_n, other=0.0)
    b_q = relu(b_q.to(tl.float32))
    b_divisor = tl.sum(b_q * b_ones[None, :], 1) + eps
    b_out = tl.div_rn(tl.dot(b_q, b_state, input_precision="tf32x3"), b_divisor[:, None])
    width = heads * D
    p_out += head_tile(i_head, heads, tokens * width, width, o_n, D)
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_n)


@triton.jit
def linear_attention_grad_q_kernel(
    p_q, p_grad, p_state, p_grad_q, p_parts, q_row, q_token, grad_row, grad_token,
    tokens, chunk, heads, eps, D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk's Q, p_grad_q (B, N, C), and of the state, p_parts as in the state's kernel.

    With t = Sᵀ grad over V's rows, z the state's ones row, w = z·q + eps and r = q·t / w: the output is
    S q / w, so that q's gradient is (t - r z) / w, the state's (grad / w) qᵀ and its ones row's -r / w · q.
    """
    i_head, i_chunk = tl.program_id(0), tl.program_id(1)
    o_d = tl.arange(0, D)
    p_state += i_head.to(tl.int64) * (D + 1) * D
    # (value, key)
    b_state = tl.load(p_state + o_d[:, None] * D + o_d[None, :])
    b_ones = tl.load(p_state + D * D + o_d)
    b_grad_state = tl.zeros((D, D), tl.float32)
    b_grad_ones = tl.zeros((D,), tl.float32)
    width = heads * D
    for first in range(i_chunk * chunk, tl.minimum((i_chunk + 1) * chunk, tokens), BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < tokens
        b_q = tl.load(p_q + head_tile(i_head, heads, q_row, q_token, o_n, D), mask=m_n[:, None], other=0.0)
        o_grad = head_tile(i_head, heads, grad_row, grad_token, o_n, D)
        b_grad = tl.load(p_grad + o_grad, mask=m_n[:, None], other=0.0).to(tl.float32)
        b_q = relu(b_q.to(tl.float32))
        # 1 beyond the last token: eps may be 0
        b_divisor = tl.where(m_n, tl.sum(b_q * b_ones[None, :], 1) + eps, 1.0)
        b_t = tl.dot(b_grad, b_state, input_precision="tf32x3")
        b_ratio = tl.div_rn(tl.sum(b_q * b_t, 1), b_divisor)
        b_grad_q = tl.div_rn(b_t - b_ratio[:, None] * b_ones[None, :], b_divisor[:, None])
        o_grad_q = head_tile(i_head, heads, tokens * width, width, o_n, D)
        b_grad_q = tl.where(b_q <= 0, 0.0, b_grad_q).to(p_grad_q.dtype.element_ty)
        tl.store(p_grad_q + o_grad_q, b_grad_q, mask=m_n[:, None])
        b_grad = tl.trans(tl.div_rn(b_grad, b_divisor[:, None]))
        b_grad_state = tl.dot(b_grad, b_q, b_grad_state, input_precision="tf32x3")
        b_grad_ones -= tl.sum(tl.div_rn(b_ratio, b_divisor)[:, None] * b_q, 0)
    store_part(p_parts, b_grad_state, b_grad_ones, i_head, i_chunk, D)


@triton.jit
def linear_attention_grad_kv_kernel(
    p_k, p_v, p_grad_state, p_grad_k, p_grad_v, k_row, k_token, v_row, v_token, tokens, heads,
    D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of tokens' K and V, both (B, N, C), from the state's (D + 1, D)."""
    i_head, i_block = tl.program_id(0), tl.program_id(1)
    o_n, o_d = i_block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, D)
    m_n = (o_n < tokens)[:, None]
    p_grad_state += i_head.to(tl.int64) * (D + 1) * D
    # (value, key)
    b_state = tl.load(p_grad_state + o_d[:, None] * D + o_d[None, :])
    b_ones = tl.load(p_grad_state + D * D + o_d)
    b_k = tl.load(p_k + head_tile(i_head, heads, k_row, k_token, o_n, D), mask=m_n, other=0.0)
    b_v = tl.load(p_v + head_tile(i_head, heads, v_row, v_token, o_n, D), mask=m_n, other=0.0)
    b_k = relu(b_k.to(tl.float32))
    width = heads * D
    o_grad = head_tile(i_head, heads, tokens * width, width, o_n, D)
    b_grad_k = tl.dot(b_v.to(tl.float32), b_state, input_precision="tf32x3") + b_ones[None, :]
    b_grad_k = tl.where(b_k <= 0, 0.0, b_grad_k).to(p_grad_k.dtype.element_ty)
    tl.store(p_grad_k + o_grad, b_grad_k, mask=m_n)
    b_grad_v = tl.dot(b_k, tl.trans(b_state), input_precision="tf32x3")
    tl.store(p_grad_v + o_grad, b_grad_v.to(p_grad_v.dtype.element_ty), mask=m_n)


@triton.jit
def store_part(p_parts, b_state, b_ones, i_head, i_chunk, D: tl.constexpr):
    o_d = tl.arange(0, D)
    p_parts += (i_head.to(tl.int64) * tl.num_programs(1) + i_chunk) * ((D + 1) * D)
    tl.store(p_parts + o_d[:, None] * D + o_d[None, :], b_state)
    tl.store(p_parts + D * D + o_d, b_ones)
