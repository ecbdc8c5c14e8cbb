"""`reference_fused.velocity_head` in Triton. Products are of fp32 factors, each three of TF32."""

# kernels have no types, nor has what comes from triton
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.triton.checks import check_kernel, check_tensor, check_vector
from sana_edge.kernels.triton.patch_embed import MOST_CHANNELS, padded

# Tokens and channels of a program: few tokens, so that one picture fills the SMs. Reasoned and compiled, not
# measured.
TILE = (16, 64)


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


def velocity_head(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    guidance: Tensor | None,
    size: tuple[int, int],
) -> Tensor:
    """`reference_fused.velocity_head`.

    Args:
        x: (B, H · W, C), contiguous, the unguided images first where there is a guidance; float, as are all.
        scale, shift: (C,) or (B, 1, C), of any stride along B.
        weight: (channels, C), contiguous, up to 64 channels.
        bias: (channels,).
        guidance: () fp32, or None.
        size: H and W.

    Returns:
        (B, channels, H, W) fp32, of half as many images with guidance.

    Raises:
        InvalidInput: types, shapes, devices or memory layouts other than these.
        UnsupportedDevice: not a CUDA device (unless Triton interprets).
    """
    op = "velocity_head"
    check_kernel(op, velocity_head_kernel, x)
    if x.ndim != 3 or x.shape[1] != size[0] * size[1] or (guidance is not None and len(x) % 2):
        raise InvalidInput(
            f"x of {op} has shape {tuple(x.shape)} for {size}", "give (B, H · W, C), B even if guided"
        )
    if weight.ndim != 2 or not 1 <= len(weight) <= MOST_CHANNELS:
        raise InvalidInput(
            f"weight of {op} has shape {tuple(weight.shape)}",
            f"give (channels, C), up to {MOST_CHANNELS} channels",
        )
    B, N, C = x.shape
    check_tensor(op, "x", x, x, (B, N, C))
    check_tensor(op, "weight", weight, x, (len(weight), C))
    check_tensor(op, "bias", bias, x, (len(weight),))
    strides = check_vector(op, "scale", scale, x), check_vector(op, "shift", shift, x)
    if guidance is not None:
        check_tensor(op, "guidance", guidance, x, ())
    images = B if guidance is None else B // 2
    out = torch.empty(images, len(weight), *size, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    with torch.cuda.device_of(x):
        velocity_head_kernel[(triton.cdiv(N, TILE[0]), images)](
            *(x, scale, shift, weight, bias, guidance, out, images, N, *strides, eps),
            C=C,
            CHANNELS=len(weight),
            WIDTH=padded(len(weight)),
            BLOCK_N=TILE[0],
            BLOCK_C=TILE[1],
        )
    return out
