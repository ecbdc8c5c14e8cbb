"""`reference_fused.w8a8_linear` in Triton: INT8 tensor-core products and what follows them in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import FLOATS, check_tensor
from sana_edge.kernels.triton.linear_tiles import device_of, pick_tile

# so many products of two int8 add up within int32: 131071 · 128² < 2^31
_EXACT_DEPTH = 131071
# one row of channels, or one for each picture
_VECTORS = ("gate", "constant")
# rows of tiles that share their columns of the weight while these are in L2
_GROUP = 8


@triton.jit
def _vector(p_vector, stride, o_m, first, tokens, o_n, m_out, m_n, PER_TOKEN: tl.constexpr):
    """Channels o_n of a vector, one per picture of ``tokens`` rows, for the tile's rows first + o_m.

    PER_TOKEN: the tile reaches into several pictures.
    """
    # one return: Triton visits all of a function's, and wants one shape of them
    if PER_TOKEN:
        o_vector = ((first + o_m) // tokens)[:, None] * stride + o_n[None, :]
        b_vector = tl.load(p_vector + o_vector, mask=m_out, other=0.0).to(tl.float32)
    else:
        b_vector = tl.load(p_vector + first // tokens * stride + o_n, mask=m_n, other=0.0)
        b_vector = b_vector.to(tl.float32)[None, :]
    return b_vector


@triton.jit
def _epilogue(
    b_out,
    p_bias,
    p_gate,
    p_residual,
    p_constant,
    tokens,
    stride_gate,
    stride_constant,
    first,
    start,
    o_m,
    o_n,
    o_out,
    m_out,
    m_n,
    SILU: tl.constexpr,
    LIMIT: tl.constexpr,
    RELU: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """What follows the scales, in the order of the definition.

    The tile's rows are first + o_m; its elements are at start + o_out in the residual.
    """
    if p_bias is not None:
        b_out += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if SILU:
        b_out = b_out / (1.0 + tl.exp(-b_out))
    # comparisons with NaN are false, so that NaN stays
    if LIMIT is not None:
        b_out = tl.where(b_out > LIMIT, LIMIT, tl.where(b_out < -LIMIT, -LIMIT, b_out))
    if RELU > 0:
        b_out = tl.where((o_n < RELU)[None, :] & (b_out <= 0), 0.0, b_out)
    if p_gate is not None:
        b_out *= _vector(p_gate, stride_gate, o_m, first, tokens, o_n, m_out, m_n, PER_TOKEN)
    if p_residual is not None:
        b_out = tl.load(p_residual + start + o_out, mask=m_out, other=0.0).to(tl.float32) + b_out
    if p_constant is not None:
        if p_residual is not None:
            # else it is loaded with the residual, and large tiles have no registers for both
            tl.debug_barrier()
        b_out += _vector(p_constant, stride_constant, o_m, first, tokens, o_n, m_out, m_n, PER_TOKEN)
    return b_out


@triton.jit
def w8a8_linear_kernel(
    p_values,
    p_scales,
    p_weight,
    p_columns,
    p_bias,
    p_gate,
    p_residual,
    p_constant,
    p_out,
    M,
    N,
    K,
    tokens,
    stride_gate,
    stride_constant,
    PER_ROW: tl.constexpr,
    SILU: tl.constexpr,
    LIMIT: tl.constexpr,
    RELU: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # down GROUP tiles, then one to the right, so that programs at work together share rows and columns in L2
    i_p = tl.program_id(0)
    width = GROUP * tl.cdiv(N, BLOCK_N)
    first = i_p // width * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    i_m = first + i_p % width % height
    i_n = i_p % width // height

    # 64 bits for where a tile starts, since (8 · 2 · 16384 tokens) · 11200 channels exceed 2^31; 32 within it
    i_row, i_column = (i_m * BLOCK_M).to(tl.int64), (i_n * BLOCK_N).to(tl.int64)
    o_m, o_b, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    o_n = i_n * BLOCK_N + o_b
    m_m, m_n = o_m < M - i_m * BLOCK_M, o_n < N
    # beyond the edge the last row is read again: no masks over rows in the loop, and nothing of it is written
    p_a = p_values + i_row * K + (tl.minimum(o_m, M - 1 - i_m * BLOCK_M)[:, None] * K + o_k[None, :])
    p_b = p_weight + i_column * K + (tl.minimum(o_b, N - 1 - i_n * BLOCK_N)[None, :] * K + o_k[:, None])
    b_sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_a = tl.load(p_a)
            b_b = tl.load(p_b)
        else:
            b_a = tl.load(p_a, mask=o_k[None, :] < K - k, other=0)
            b_b = tl.load(p_b, mask=o_k[:, None] < K - k, other=0)
        b_sums = tl.dot(b_a, b_b, b_sums, out_dtype=tl.int32)
        p_a += BLOCK_K
        p_b += BLOCK_K

    if PER_ROW:
        b_rows = tl.load(p_scales + i_row + o_m, mask=m_m, other=0.0)[:, None]
    else:
        b_rows = tl.load(p_scales)
    b_out = b_sums.to(tl.float32) * b_rows * tl.load(p_columns + o_n, mask=m_n, other=0.0)[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    p_out += i_row * N
    o_out = o_m[:, None] * N + o_n[None, :]
    b_out = _epilogue(
        b_out, p_bias, p_gate, p_residual, p_constant, tokens, stride_gate, stride_constant,
        i_m * BLOCK_M, i_row * N, o_m, o_n, o_out, m_out, m_n, SILU, LIMIT, RELU, PER_TOKEN,
    )  # fmt: skip
    b_out = tl.cast(b_out, p_out.dtype.element_ty, fp_downcast_rounding="rtne")
    tl.store(p_out + o_out, b_out, mask=m_out)


def w8a8_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    silu: bool = False,
    limit: float | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    constant: Tensor | None = None,
    relu: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """`reference_fused.w8a8_linear`: equal to it bit for bit without ``silu``, whatever the result's dtype.

    Args:
        values: (..., K) int8, contiguous.
        scales: (...,) fp32 of the rows, contiguous, or () of the whole tensor.
        weight: (N, K) int8, contiguous.
        weight_scales: (N,) fp32.
        bias: (N,).
        dtype: of the result, fp32, fp16 or bf16.
        silu: apply SiLU after the bias; to a few units in the last place of fp32, as exp is approximate.
        limit: clip to ±limit after that; NaN stays.
        gate: (N,), or (B, 1, N) for values (B, tokens, K), with any stride along B; multiplies the clipped.
        residual: (..., N), contiguous; added to that.
        constant: as ``gate``; added last.
        relu: of so many first columns the ReLU is taken, after the clip; NaN stays.
        out: where the result goes, (..., N) in ``dtype``, contiguous; may be ``residual``. New if None.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device of compute capability 8.0 or later (unless Triton interprets).
    """
    optional = {"bias": bias, "gate": gate, "residual": residual, "constant": constant, "out": out}
    _check(values, scales, weight, weight_scales, dtype, optional)
    (N, K), M = weight.shape, values.shape[:-1].numel()
    if out is None:
        out = torch.empty(*values.shape[:-1], N, dtype=dtype, device=values.device)
    if out.numel() == 0:
        return out
    tile = pick_tile(
        M, N, K, *device_of(values.device, not isinstance(w8a8_linear_kernel, triton.JITFunction))
    )
    strides = [
        vector.stride(0) if vector is not None and vector.ndim == 3 else 0 for vector in (gate, constant)
    ]
    tokens = values.shape[1] if any(strides) else M
    with torch.cuda.device_of(values):
        w8a8_linear_kernel[(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)](
            *(values, scales, weight, weight_scales, bias, gate, residual, constant, out),
            *(M, N, K, tokens, *strides),
            PER_ROW=scales.ndim > 0,
            SILU=silu,
            LIMIT=limit,
            RELU=relu,
            # else each tile is within one picture, whose vectors are one row
            PER_TOKEN=any(strides) and tokens % tile.m > 0,
            EVEN_K=K % tile.k == 0,
            GROUP=_GROUP,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            # a · b + c rounded once is not what the reference computes
            enable_fp_fusion=False,
        )
    return out


def _check(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    dtype: torch.dtype,
    optional: dict[str, Tensor | None],
) -> None:
    if dtype not in FLOATS:
        raise InvalidInput(f"w8a8_linear cannot give {dtype}", "ask for float32, float16 or bfloat16")
    if values.ndim < 1 or weight.ndim != 2 or values.shape[-1] != weight.shape[1]:
        shapes = f"values {tuple(values.shape)} and weight {tuple(weight.shape)}"
        raise InvalidInput(f"{shapes} have no product", "give (..., K) and (N, K)")
    rows, (N, K) = tuple(values.shape[:-1]), weight.shape
    if K > _EXACT_DEPTH:
        raise InvalidInput(f"{K} products may overflow int32", f"split a depth beyond {_EXACT_DEPTH}")
    int8, fp32 = (torch.int8,), (torch.float32,)
    vectors: list[tuple[int, ...]] = [(N,), (rows[0], 1, N)] if len(rows) == 2 else [(N,)]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]], Sequence[torch.dtype]]] = [
        ("values", values, [(*rows, K)], int8),
        ("scales", scales, [rows, ()], fp32),
        ("weight", weight, [(N, K)], int8),
        ("weight_scales", weight_scales, [(N,)], fp32),
        ("bias", optional["bias"], [(N,)], FLOATS),
        ("residual", optional["residual"], [(*rows, N)], FLOATS),
        ("out", optional["out"], [(*rows, N)], (dtype,)),
        *((name, optional[name], vectors, FLOATS) for name in _VECTORS),
    ]
    for name, tensor, allowed, dtypes in wanted:
        if tensor is not None:
            spaced = name in _VECTORS
            check_tensor("w8a8_linear", name, tensor, values, *allowed, dtypes=dtypes, spaced=spaced)
    for name in _VECTORS:
        vector = optional[name]
        if vector is not None and vector.ndim == 3 and vector.stride(0) * len(vector) >= 2**31:
            raise InvalidInput(
                f"the rows of {name} are too far apart for 32 bits", f"call {name}.contiguous()"
            )
