"""What each operation computes: slow, in fp32 or exact integers, one formula after the other.

These functions define the operations; `sana_edge.int8.ops` and every kernel are tested against them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import quant


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float = 1e-15) -> Tensor:
    """ReLU linear attention (arXiv 2410.10629, section 2.2): O = (V1 Kᵀ) Q, divided by its ones row.

    Args:
        q, k, v: (B, N, C), C = heads × head dim. V1 is v with a row of ones below.
        eps: added to the divisor, which is zero where every ReLU(q) or ReLU(k) is.

    Returns:
        (B, N, C) in q's dtype; everything inside is fp32, without a 1/sqrt(d) scale.
    """
    B, N, C = q.shape
    # (B, heads, d, N)
    q32, k32, v32 = (t.float().transpose(1, 2).reshape(B, heads, C // heads, N) for t in (q, k, v))
    v1 = torch.cat([v32, torch.ones_like(v32[:, :, :1])], dim=2)
    out = (v1 @ F.relu(k32).transpose(2, 3)) @ F.relu(q32)
    out = out[:, :, :-1] / (out[:, :, -1:] + eps)
    return out.reshape(B, C, N).transpose(1, 2).to(q.dtype)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of image tokens on text tokens, scaled by 1/sqrt(d).

    Args:
        q: (R, heads, N, d).
        k, v: (R, heads, L, d).
        mask: (R, 1, 1, L) bool, True on the tokens that count; None where all do.

    Returns:
        (R, heads, N, d) in q's dtype, fp32 inside.
    """
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    output: Tensor = scores.softmax(-1) @ v.float()
    return output.to(q.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (B, N, in) times weight (out, in) transposed, plus bias (out,), fp32 inside; x's dtype out."""
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without weights, then · scale + shift (adaLN).

    Args:
        x: (B, N, C).
        scale, shift: (C,) for all rows or (B, 1, C); ``scale`` already contains the 1 of 1 + scale.

    Returns:
        (B, N, C) in x's dtype, fp32 inside.
    """
    x32 = x.float()
    centred = x32 - x32.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * scale.float() + shift.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, fp32 inside; x's dtype out."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """The middle of the Mix-FFN: SiLU, 3×3 depthwise convolution, value · SiLU(gate).

    Args:
        x: (B, N, 2h) with N = height × width in row-major order.
        weight: (2h, 1, 3, 3); the image is padded with zeros, after the SiLU.
        bias: (2h,).

    Returns:
        (B, N, h) in x's dtype, fp32 inside; the first h channels are the value, the others the gate.
    """
    image = F.silu(x.float()).transpose(1, 2).reshape(len(x), -1, height, width)
    mixed = F.conv2d(image, weight.float(), bias.float(), padding=1, groups=image.shape[1])
    value, gate = mixed.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    return (value * F.silu(gate)).to(x.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token INT8: values (..., C) int8 and scales (...,) fp32, absmax of the row / 127.

    Values are x · (1 / scale) in fp32, rounded half to even, within ±127; rows of zeros have scale 1. The
    scale of a row with NaN or infinity is NaN, its values are anything.
    """
    values, rows = quant.quantize_rows(x)
    return values, torch.where(rows.isfinite(), rows, torch.nan)


def norm_modulate_quantize(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of `norm_modulate`, not rounded to x's dtype in between: (B, N, C) and (B, N)."""
    return quantize_rows(norm_modulate(x.float(), scale, shift, eps))


def quantize_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """INT8 values of x with one given scale, () fp32; what lies beyond ±127 steps is clipped.

    Implementations give every row this scale, or NaN as in `quantize_rows`.
    """
    return quant.quantize(x, scale)


def quantize_map(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A map (B, C, H, W) with one scale: values int8 of its shape, scale () fp32, that of its absmax if None.

    The scale is NaN where x has NaN or infinity, and the values are anything.
    """
    given = quant.tensor_scale(x) if scale is None else scale
    return quant.quantize(x, given), torch.where(x.isfinite().all(), given, torch.nan)


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
) -> Tensor:
    """INT8 activations times INT8 weights, accumulated exactly as integers.

    Args:
        values: (..., in) int8.
        scales: (...,) fp32 of the rows, or () of the whole tensor.
        weight: (out, in) int8.
        weight_scales: (out,) fp32.
        bias: (out,), added after the scales.
        silu: apply SiLU after the bias.
        limit: clip to ±limit after that.
        gate: (out,) or (B, 1, out), multiplies what was clipped.
        residual: (..., out), added last.

    Returns:
        (..., out): float(sum) · row scale · column scale + bias, in that order in fp32, then what is asked
        for of SiLU, clip, gate and residual; then ``dtype``.
    """
    sums = (values.double() @ weight.double().T).float()
    rows = scales if scales.ndim == 0 else scales.unsqueeze(-1)
    out = sums * rows * weight_scales
    out = out if bias is None else out + bias.float()
    out = F.silu(out) if silu else out
    out = out if limit is None else out.clamp(-limit, limit)
    out = out if gate is None else out * gate.float()
    return (out if residual is None else residual.float() + out).to(dtype)


def w8a8_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """INT8 convolution, stride 1, zero padding, accumulated exactly as integers.

    Args:
        values: (B, in, H, W) int8.
        scale: () fp32 of the whole map.
        weight: (out, in, kh, kw) int8.
        weight_scales: (out,) fp32.
        bias: (out,), added after the scales.

    Returns:
        (B, out, H', W') in ``dtype``, fp32 until then.
    """
    sums = F.conv2d(values.double(), weight.double(), padding=padding).float()
    out = sums * scale * weight_scales[:, None, None]
    return (out if bias is None else out + bias.float()[:, None, None]).to(dtype)
