"""Attention of the GPU path in Triton, by the names of `reference_fused`.

Sums over tokens are made per chunk and added in the chunks' order, as in `linear_attention`: the same inputs
give the same bytes, in any batch.
"""

# what comes from triton has no types
# mypy: allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton import int8_tile, linear_attention
from sana_edge.kernels.triton.attention_kernels import (
    cross_attention_kernel,
    kv_state_kernel,
    linear_attention_finish_kernel,
    rms_roots_kernel,
)
from sana_edge.kernels.triton.checks import (
    FLOATS,
    check_kernel,
    check_rows,
    check_static_scale,
    check_tensor,
    empty_rows,
)
from sana_edge.kernels.triton.linear_attention import add_chunks, state_parts
from sana_edge.kernels.triton.quantize_rows import quantize_rows
from sana_edge.kernels.triton.w8a8_linear import w8a8_linear


class CrossTile(NamedTuple):
    """Tokens and keys that a program has at a time, and its warps."""

    tokens: int
    keys: int
    warps: int


# Tokens of a program that finishes linear attention: it reads the state of all heads twice, so that many are
# better, and few fill more SMs. Reasoned and compiled, not measured.
FINISHED = 16
FINISHED_WARPS = 2
# by bytes of an element
CROSS = {2: CrossTile(64, 64, 8), 4: CrossTile(16, 32, 4)}
WIDEST_HEAD = 128


def qkv_linear_attention(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.qkv_linear_attention`: one product, then a kernel that sums k and v.

    Args:
        values, scales, weight, weight_scales, bias, dtype: as `w8a8_linear` takes them, of (B, N, in) tokens
            and a weight (3 C, in); heads of 16, 32 or 64 channels.

    Returns:
        ReLU(q), (B, N, C) of what is stored as (B, N, 3 C), and the state (B, heads, d + 1, d) fp32.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device of compute capability 8.0 or later (unless Triton interprets).
    """
    if values.ndim != 3 or weight.ndim != 2 or len(weight) % 3:
        shapes = f"values {tuple(values.shape)} and weight {tuple(weight.shape)}"
        raise InvalidInput(f"qkv_linear_attention has {shapes}", "give (B, N, in) and (3 C, in)")
    C = len(weight) // 3
    _check_heads("qkv_linear_attention", C, heads)
    qkv = w8a8_linear(values, scales, weight, weight_scales, bias, dtype, relu=C)
    return qkv[..., :C], _state(qkv, None, None, heads)


def qk_norm_linear_attention(
    qkv: Tensor, norm_k: Tensor, heads: int, norm_eps: float
) -> tuple[Tensor, Tensor]:
    """`reference_fused.qk_norm_linear_attention`.

    Args:
        qkv: (B, N, 3 C) fp32, fp16 or bf16, contiguous; heads of 16, 32 or 64 channels.
        norm_k: (C,), float.

    Returns:
        roots (B, N, 2) and the state (B, heads, d + 1, d), both fp32.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "qk_norm_linear_attention"
    check_kernel(op, kv_state_kernel, qkv)
    if qkv.ndim != 3 or qkv.shape[2] % 3 or qkv.dtype not in FLOATS or not qkv.is_contiguous():
        raise InvalidInput(
            f"qkv of {op} is {tuple(qkv.shape)} {qkv.dtype}",
            "give (B, N, 3 C) in fp32, fp16 or bf16, contiguous",
        )
    C = qkv.shape[2] // 3
    _check_heads(op, C, heads)
    check_tensor(op, "norm_k", norm_k, qkv, (C,))
    roots = _roots(qkv, C, 2, norm_eps)
    return roots, _state(qkv, roots, norm_k, heads)


def linear_attention_finish(
    q: Tensor,
    state: Tensor,
    eps: float,
    roots: Tensor | None = None,
    norm_q: Tensor | None = None,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.linear_attention_finish` in one kernel.

    Args:
        q: (B, N, C) fp32, fp16 or bf16, with contiguous channels: a part of (B, N, 3 C) is read in place.
        state: (B, heads, d + 1, d) fp32, contiguous, d of 16, 32 or 64.
        roots: (B, N, 2) fp32, contiguous, with norm_q (C,), float; or both None.
        static_scale: () fp32, of all rows; each has its own where this is None.

    Returns:
        values (B, N, C) int8 and scales (B, N) fp32; 0 and NaN in rows with NaN or infinity.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "linear_attention_finish"
    check_kernel(op, linear_attention_finish_kernel, q)
    check_static_scale(op, static_scale, q)
    if q.ndim != 3 or q.dtype not in FLOATS or q.stride(2) != 1:
        raise InvalidInput(
            f"q of {op} is {tuple(q.shape)} {q.dtype}",
            "give (B, N, C) in fp32, fp16 or bf16, channels contiguous",
        )
    B, N, C = q.shape
    heads = state.shape[1] if state.ndim == 4 else 0
    _check_heads(op, C, heads)
    D = C // heads
    check_tensor(op, "state", state, q, (B, heads, D + 1, D), dtypes=(torch.float32,))
    if (roots is None) != (norm_q is None):
        raise InvalidInput(f"{op} has one of roots and norm_q", "give both or none")
    if roots is not None and norm_q is not None:
        check_tensor(op, "roots", roots, q, (B, N, 2), dtypes=(torch.float32,))
        check_tensor(op, "norm_q", norm_q, q, (C,))
    values, scales = empty_rows(q)
    if not values.numel():
        return values, scales
    with torch.cuda.device_of(q):
        linear_attention_finish_kernel[(B, triton.cdiv(N, FINISHED))](
            *(q, state, roots, norm_q, static_scale, values, scales, *q.stride()[:2], N, heads, eps),
            D=D,
            BLOCK_N=FINISHED,
            num_warps=FINISHED_WARPS,
        )
    return values, scales


def cross_attention_quantize(
    q: Tensor,
    keys: Tensor,
    values_transposed: Tensor,
    lengths: Tensor,
    norm_q: Tensor | None = None,
    norm_eps: float = 1e-5,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.cross_attention_quantize`: a kernel per head, then `quantize_rows`.

    A row's scale needs all heads, which together fill too few programs; so the result is written in q's dtype
    in between. Softmax's weights are rounded to that dtype before they multiply the values.

    Args:
        q: (R, T, C) fp32, fp16 or bf16, contiguous.
        keys: (R, heads, capacity, d) in q's dtype, contiguous, d up to 128.
        values_transposed: (R, heads, d, capacity) in q's dtype, contiguous.
        lengths: (R,) int32, at least 1; read on the device. What lies behind them is not read.
        norm_q: (C,), float.
        static_scale: () fp32, of all rows; each has its own where this is None.

    Returns:
        values (R, T, C) int8 and scales (R, T) fp32; 0 and NaN in rows with NaN or infinity.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    _check_cross(q, keys, values_transposed, lengths, norm_q, static_scale)
    (R, T, C), (heads, capacity, D) = q.shape, keys.shape[1:]
    read = torch.empty_like(q)
    if q.numel():
        roots = None if norm_q is None else _roots(q, C, 1, norm_eps)
        tile = CROSS[q.element_size()]
        with torch.cuda.device_of(q):
            cross_attention_kernel[(R * heads, triton.cdiv(T, tile.tokens))](
                *(q, keys, values_transposed, lengths, roots, norm_q, read, T, heads, capacity, D**-0.5),
                D=D,
                BLOCK_D=max(triton.next_power_of_2(D), 16),
                BLOCK_N=tile.tokens,
                BLOCK_L=tile.keys,
                WIDEN=_widen(q),
                num_warps=tile.warps,
                num_stages=1,
            )
    return quantize_rows(read, static_scale)


def _state(qkv: Tensor, roots: Tensor | None, norm_k: Tensor | None, heads: int) -> Tensor:
    """The state of k and v in (B, N, 3 C)."""
    B, N, width = qkv.shape
    C = width // 3
    D = C // heads
    _, k, v = qkv.chunk(3, dim=-1)
    chunk, parts = state_parts(k, heads)
    if not qkv.numel():
        return torch.zeros(B, heads, D + 1, D, dtype=torch.float32, device=qkv.device)
    tile = linear_attention.TILES[D]
    with torch.cuda.device_of(qkv):
        kv_state_kernel[parts.shape[:2]](
            *(k, v, roots, norm_k, parts, *k.stride()[:2], N, chunk, heads),
            D=D,
            BLOCK_N=tile.summed,
            WIDEN=_widen(qkv),
            num_warps=tile.warps,
            num_stages=1,
        )
        return add_chunks(parts).view(B, heads, D + 1, D)


def _roots(x: Tensor, C: int, parts: int, eps: float) -> Tensor:
    """1 / RMS of the first ``parts`` parts, C wide, of contiguous x (B, N, ...): (B, N, parts) fp32."""
    roots = torch.empty(*x.shape[:2], parts, dtype=torch.float32, device=x.device)
    M, tile = x.shape[0] * x.shape[1], int8_tile.pick_tile(C)
    if M:
        with torch.cuda.device_of(x):
            rms_roots_kernel[(triton.cdiv(M, tile.rows), parts)](
                *(x, roots, x.shape[2], M, eps),
                C=C,
                PARTS=parts,
                ROWS=tile.rows,
                BLOCK=tile.block,
                num_warps=tile.warps,
            )
    return roots


def _widen(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and not isinstance(kv_state_kernel, triton.JITFunction)


def _check_heads(op: str, C: int, heads: int) -> None:
    if heads < 1 or C % heads or C // heads not in linear_attention.TILES:
        widths = tuple(linear_attention.TILES)
        raise InvalidInput(f"{C} channels in {heads} heads for {op}", f"heads have {widths} channels")


def _check_cross(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    norm_q: Tensor | None,
    static_scale: Tensor | None,
) -> None:
    op = "cross_attention_quantize"
    check_rows(op, cross_attention_kernel, q)
    check_static_scale(op, static_scale, q)
    if q.ndim != 3 or keys.ndim != 4:
        raise InvalidInput(
            f"q of {op} has shape {tuple(q.shape)}, keys {tuple(keys.shape)}",
            "give (R, T, C) and (R, heads, capacity, d)",
        )
    (R, _, C), (_, heads, capacity, D) = q.shape, keys.shape
    if D > WIDEST_HEAD or capacity < 1 or heads * D != C:
        raise InvalidInput(
            f"keys of {op} have shape {tuple(keys.shape)} for {C} channels",
            f"give heads of at most {WIDEST_HEAD} channels, and a capacity",
        )
    check_tensor(op, "keys", keys, q, (R, heads, capacity, D), dtypes=(q.dtype,))
    check_tensor(op, "values_transposed", values, q, (R, heads, D, capacity), dtypes=(q.dtype,))
    check_tensor(op, "lengths", lengths, q, (R,), dtypes=(torch.int32,))
    if norm_q is not None:
        check_tensor(op, "norm_q", norm_q, q, (C,))
