"""`reference_fused.patch_embed` in Triton. Products are of fp32 factors, each three of TF32."""

# kernels have no types, nor has what comes from triton
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import FLOATS, check_kernel, check_tensor

# Tokens and channels of a program; the latent's channels, 32 in SANA, are multiplied in one piece. Reasoned
# and compiled, not measured.
TILE = (32, 64)
MOST_CHANNELS = 64


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


def patch_embed(
    latent: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor | None,
    copies: int,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_fused.patch_embed`.

    Args:
        latent: (B, channels, H, W), contiguous, up to 64 channels; float, as are all.
        weight: (channels, C), contiguous.
        bias: (C,).
        positions: (H · W, C), contiguous, or None.
        dtype: of the result, fp32, fp16 or bf16.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "patch_embed"
    check_kernel(op, patch_embed_kernel, latent)
    if latent.ndim != 4 or weight.ndim != 2 or not 1 <= latent.shape[1] <= MOST_CHANNELS:
        raise InvalidInput(
            f"latent of {op} has shape {tuple(latent.shape)}, weight {tuple(weight.shape)}",
            f"give (B, channels, H, W) and (channels, C), up to {MOST_CHANNELS} channels",
        )
    if dtype not in FLOATS or copies < 1:
        raise InvalidInput(
            f"{op} cannot give {copies} copies of {dtype}", "ask for one or more in a float dtype"
        )
    B, channels, H, W = latent.shape
    C = weight.shape[1]
    check_tensor(op, "latent", latent, latent, tuple(latent.shape))
    check_tensor(op, "weight", weight, latent, (channels, C))
    check_tensor(op, "bias", bias, latent, (C,))
    if positions is not None:
        check_tensor(op, "positions", positions, latent, (H * W, C))
    out = torch.empty(copies * B, H * W, C, dtype=dtype, device=latent.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(latent):
        patch_embed_kernel[(triton.cdiv(H * W, TILE[0]), triton.cdiv(C, TILE[1]), B)](
            *(latent, weight, bias, positions, out, B, H * W),
            CHANNELS=channels,
            DEPTH=padded(channels),
            C=C,
            COPIES=copies,
            BLOCK_N=TILE[0],
            BLOCK_C=TILE[1],
        )
    return out


def padded(channels: int) -> int:
    """What tensor cores multiply."""
    return max(int(triton.next_power_of_2(channels)), 16)
