"""ReLU linear attention in Triton, forward and backward; defined by `reference.relu_linear_attention`.

ReLU, casts, tails and division happen inside. Per head the forward pass sums a state over the tokens,
S = V1 Kᵀ (D + 1, D), whose last row belongs to the ones below V, and reads it with Q. The backward pass sums
the state's gradient in the same way. Sums over tokens are made per chunk, and the chunks are added in their
order; nothing is atomic, and chunks depend on N alone: the same inputs give the same bytes, in any batch.
"""

# what comes from triton and autograd has no types
# mypy: allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import check_kernel
from sana_edge.kernels.triton.linear_attention_kernels import (
    linear_attention_grad_kv_kernel,
    linear_attention_grad_q_kernel,
    linear_attention_read_kernel,
    linear_attention_state_kernel,
    linear_attention_sum_kernel,
)


class Tile(NamedTuple):
    """Tokens at a time where sums over tokens are made, and where states are read; warps of a program."""

    summed: int
    read: int
    warps: int


# By head dim. Each product of fp32 factors is three of TF32, whose parts take registers: these are the
# largest tiles that compile without spilling any, but for q's gradient at 64, which SANA has not. One stage:
# an SM has several programs, and they hide each other's loads. Reasoned and compiled, not measured.
TILES = {16: Tile(64, 64, 4), 32: Tile(32, 64, 4), 64: Tile(32, 32, 8)}
# Tokens whose state is summed by one program: with 256 and 36 heads a picture of 1024 px is 144 programs.
# From 4096 tokens on there are at most 16 chunks, of multiples of 64 tokens. At D = 32 a chunk's state has at
# most 13 % of the bytes of its K and V.
CHUNK_TOKENS = 256
MOST_CHUNKS = 16
CHUNK_MULTIPLE = 64
BLOCK_STATE = 512

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float = 1e-15) -> Tensor:
    """ReLU linear attention with a gradient; see `reference.relu_linear_attention`.

    Args:
        q, k, v: (B, N, heads · d), d of 16, 32 or 64, fp32, fp16 or bf16, on one CUDA device; the last
            dimension is contiguous, the others need not be: slices of a fused tensor are read in place.
        eps: added to the divisor.

    Returns:
        (B, N, C) in q's dtype, contiguous; fp32 inside. Gradients are in the inputs' dtype.

    Raises:
        InvalidInput: shapes, dtypes or strides that the kernels do not take.
        UnsupportedDevice: a tensor is not on a CUDA device.
    """
    _check(q, k, v, heads)
    return cast(Tensor, _ReluLinearAttention.apply(q, k, v, heads, eps))


class _ReluLinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float) -> Tensor:
        out, state = _attend(q, k, v, heads, eps)
        ctx.save_for_backward(q, k, v, state)
        ctx.heads, ctx.eps = heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, state = ctx.saved_tensors
        return *_gradients(q, k, v, state, grad, ctx.heads, ctx.eps), None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float) -> tuple[Tensor, Tensor]:
    """Outputs (B, N, C), and the state (B · heads, D + 1, D) that the gradient needs."""
    B, N, C = q.shape
    D = C // heads
    out = torch.empty(B, N, C, dtype=q.dtype, device=q.device)
    chunk, parts = state_parts(q, heads)
    if not out.numel():
        return out, parts.sum(1)
    tile = TILES[D]
    widen = q.dtype == torch.bfloat16 and _interpreted()
    with torch.cuda.device_of(q):
        linear_attention_state_kernel[parts.shape[:2]](
            k, v, parts, *k.stride()[:2], *v.stride()[:2], N, chunk, heads,
            D=D, BLOCK_N=tile.summed, WIDEN=widen, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        state = add_chunks(parts)
        linear_attention_read_kernel[(B * heads, triton.cdiv(N, tile.read))](
            q, state, out, *q.stride()[:2], N, heads, eps, D=D, BLOCK_N=tile.read, num_warps=tile.warps
        )
    return out, state


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, grad: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, (B, N, C) each and contiguous."""
    B, N, C = q.shape
    D = C // heads
    if grad.stride(2) != 1:
        grad = grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(B, N, C, dtype=q.dtype, device=q.device) for _ in range(3))
    if not grad_q.numel():
        return grad_q, grad_k, grad_v
    tile = TILES[D]
    chunk, parts = state_parts(q, heads)
    with torch.cuda.device_of(q):
        linear_attention_grad_q_kernel[parts.shape[:2]](
            q, grad, state, grad_q, parts, *q.stride()[:2], *grad.stride()[:2], N, chunk, heads, eps,
            D=D, BLOCK_N=tile.summed, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
        linear_attention_grad_kv_kernel[(B * heads, triton.cdiv(N, tile.read))](
            k, v, add_chunks(parts), grad_k, grad_v, *k.stride()[:2], *v.stride()[:2], N, heads,
            D=D, BLOCK_N=tile.read, num_warps=tile.warps,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def state_parts(q: Tensor, heads: int) -> tuple[int, Tensor]:
    """Tokens of a chunk, and room for the states of all chunks: (B · heads, chunks, D + 1, D) fp32."""
    B, N, C = q.shape
    D = C // heads
    chunk = max(CHUNK_TOKENS, triton.cdiv(N, MOST_CHUNKS * CHUNK_MULTIPLE) * CHUNK_MULTIPLE)
    shape = (B * heads, triton.cdiv(N, chunk), D + 1, D)
    return chunk, torch.empty(shape, dtype=torch.float32, device=q.device)


def add_chunks(parts: Tensor) -> Tensor:
    """States (rows, height, width) from chunks' (rows, chunks, height, width), added in order."""
    rows, chunks, height, width = parts.shape
    state = torch.empty(rows, height, width, dtype=torch.float32, device=parts.device)
    size = height * width
    linear_attention_sum_kernel[(rows, triton.cdiv(size, BLOCK_STATE))](
        parts, state, chunks, SIZE=size, BLOCK=BLOCK_STATE
    )
    return state


def _interpreted() -> bool:
    return not isinstance(linear_attention_state_kernel, triton.runtime.JITFunction)


def _check(q: Tensor, k: Tensor, v: Tensor, heads: int) -> None:
    check_kernel("relu_linear_attention", linear_attention_state_kernel, q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 3 or x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            found = f"{name} is {tuple(x.shape)} {x.dtype} on {x.device}"
            raise InvalidInput(
                f"{found}, q is {tuple(q.shape)} {q.dtype} on {q.device}",
                "give q, k and v of one shape (B, N, C), dtype and device",
            )
        if x.stride(2) != 1:
            raise InvalidInput(f"{name}'s channels are {x.stride(2)} elements apart", "call contiguous()")
    if q.dtype not in DTYPES:
        raise InvalidInput(f"q is {q.dtype}", "cast q, k and v to float32, bfloat16 or float16")
    _, N, C = q.shape
    if heads < 1 or C % heads or C // heads not in TILES:
        hint = f"heads of {tuple(TILES)} channels work; use the torch backend"
        raise InvalidInput(f"{C} channels in {heads} heads", hint)
    if N * C >= 2**31:
        raise InvalidInput(f"{N} tokens of {C} channels", "a picture has less than 2^31 elements")
