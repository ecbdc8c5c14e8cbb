"""The middle of the Mix-FFN in Triton: for training with its gradient, for inference down to INT8 rows."""

# what comes from triton and autograd has no types
# mypy: allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import WIDEST, check_kernel, check_static_scale, check_tensor, empty_rows
from sana_edge.kernels.triton.linear_attention import add_chunks
from sana_edge.kernels.triton.mix_ffn_kernels import (
    dwconv_glu_quantize_kernel,
    glu_depthwise_grad_kernel,
    glu_depthwise_kernel,
)


class Tile(NamedTuple):
    """Rows and columns of pixels, or tokens and 1, and channels of a program; its warps."""

    rows: int
    columns: int
    channels: int
    warps: int


# 64 channels of 16 bits are a line of 128 bytes. Of ten rows that the convolution of eight reads, two belong
# to neighbours. Sums of ten gradients take 40 registers of a thread. Reasoned and compiled, not measured.
CONVOLUTION = Tile(8, 16, 64, 4)
GRADIENT = Tile(8, 1, 64, 4)
# tokens whose weight gradients are summed by one program
CHUNK_TOKENS = 256
# sums of value and gate in registers, for each thread of at most 16 warps
_ELEMENTS = 16
_MOST_WARPS = 16


def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """`reference.glu_depthwise` with gradients of x, weight and bias; the same bytes every time.

    Args:
        x: (B, height · width, 2h) fp32, fp16 or bf16, contiguous.
        weight: (2h, 1, 3, 3) of any of these types, contiguous.
        bias: (2h,) of any of these types.

    Returns:
        (B, N, h) in x's dtype; fp32 inside. Gradients are in the inputs' dtypes. For the gradient 8h bytes
        per token are allocated for a moment, and nothing but x is kept.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    _check("glu_depthwise", x, weight, bias, (x.shape[-1], 1, 3, 3), height, width)
    return cast(Tensor, _GluDepthwise.apply(x, weight, bias, height, width))


class _GluDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.size = height, width
        out = torch.empty(*x.shape[:2], x.shape[2] // 2, dtype=x.dtype, device=x.device)
        _convolve(x, weight, bias, None, out, height, width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, bias = ctx.saved_tensors
        return *_gradients(x, weight, bias, grad.contiguous(), *ctx.size), None, None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor | None, out: Tensor, height: int, width: int
) -> None:
    if not x.numel():
        return
    rows, columns, channels, warps = CONVOLUTION
    hidden = x.shape[2] // 2
    places = len(x) * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    with torch.cuda.device_of(x):
        glu_depthwise_kernel[(places, triton.cdiv(hidden, channels))](
            *(x, weight, bias, grad, out, height, width),
            HIDDEN=hidden,
            ROWS=rows,
            BLOCK_X=columns,
            BLOCK_C=channels,
            num_warps=warps,
        )


def _gradients(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, N, C = x.shape
    grad_x = torch.empty_like(x)
    if not x.numel():
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    mixed = torch.empty(B, N, C, dtype=torch.float32, device=x.device)
    _convolve(x, weight, bias, grad, mixed, height, width)
    programs = B * triton.cdiv(N, CHUNK_TOKENS)
    parts = torch.empty(1, programs, 10, C, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        glu_depthwise_grad_kernel[(programs, triton.cdiv(C, GRADIENT.channels))](
            *(x, weight, mixed, grad_x, parts, height, width, CHUNK_TOKENS),
            CHANNELS=C,
            BLOCK_N=GRADIENT.rows,
            BLOCK_C=GRADIENT.channels,
            num_warps=GRADIENT.warps,
        )
        sums = add_chunks(parts)[0]
    grad_weight = sums[:9].T.contiguous().view(weight.shape)
    return grad_x, grad_weight.to(weight.dtype), sums[9].to(bias.dtype)


def dwconv_glu_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    width: int,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.dwconv_glu_quantize`, up to the order of the sums and the approximate exp of SiLU.

    Args:
        x: (B, height · width, 2h) fp32, fp16 or bf16, contiguous, SiLU applied; h up to 16384.
        weight: (3, 3, 2h) of any of these types, contiguous.
        bias: (2h,) of any of these types.
        static_scale: () fp32, of all rows; each has its own where this is None.

    Returns:
        values (B, N, h) int8 and scales (B, N) fp32; 0 and NaN in rows with NaN or infinity.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    _check("dwconv_glu_quantize", x, weight, bias, (3, 3, x.shape[-1]), height, width)
    check_static_scale("dwconv_glu_quantize", static_scale, x)
    hidden = x.shape[2] // 2
    values, scales = empty_rows(x, hidden)
    if not values.numel():
        return values, scales
    M, tile = scales.numel(), pick_tile(hidden)
    with torch.cuda.device_of(x):
        dwconv_glu_quantize_kernel[(triton.cdiv(M, tile.rows),)](
            *(x, weight, bias, static_scale, values, scales, M, height, width),
            HIDDEN=hidden,
            ROWS=tile.rows,
            BLOCK=tile.channels,
            num_warps=tile.warps,
        )
    return values, scales


def pick_tile(hidden: int) -> Tile:
    """Tokens that `dwconv_glu_quantize` has at a time, as many as share a weight and fit into registers."""
    block = triton.next_power_of_2(hidden)
    rows = min(max(_ELEMENTS * 32 * _MOST_WARPS // block, 1), 4)
    return Tile(rows, 1, block, min(max(rows * block // (32 * _ELEMENTS), 1), _MOST_WARPS))


def _check(
    op: str, x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], height: int, width: int
) -> None:
    check_kernel(op, glu_depthwise_kernel, x)
    if x.ndim != 3 or x.shape[1] != height * width or x.shape[2] % 2 or not 2 <= x.shape[2] <= 2 * WIDEST:
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)} for {height} by {width} pixels",
            f"give (B, height · width, 2h), h from 1 to {WIDEST}",
        )
    if height * width * x.shape[2] >= 2**31:
        raise InvalidInput(
            f"{height} by {width} pixels of {x.shape[2]} channels", "give less than 2^31 elements"
        )
    check_tensor(op, "x", x, x, tuple(x.shape))
    check_tensor(op, "weight", weight, x, shape)
    check_tensor(op, "bias", bias, x, (x.shape[2],))
