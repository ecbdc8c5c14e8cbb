"""What the decoder's fused operations compute, composed of `reference`; maps are (B, H, W, C)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import quant
from sana_edge.kernels import reference, reference_fused

Upsampling = Literal["none", "phases", "shuffle"]
Activation = Literal["identity", "relu", "silu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.clone,
    "relu": F.relu,
    "silu": F.silu,
}


def w8a8_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    upsample: Upsampling = "none",
    activation: Activation = "identity",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    out_norm_weight: Tensor | None = None,
    out_norm_bias: Tensor | None = None,
    out_activation: Activation = "relu",
    norm_eps: float = 1e-5,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    repeats: int = 1,
    out_scale: Tensor | None = None,
    next_scale: Tensor | None = None,
    finite: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """INT8 convolution of stride 1 with zero padding, and what follows it in the decoder, fp32 in between.

    Args:
        values: (B, H, W, in) int8.
        scale: () fp32 of the whole map.
        weight: (out, k, k, in) int8 with k 1 or 3. With upsampling by "phases" (4, out, 2, 2, in), the
            kernels of `conv_layers.phase_kernels`; by "shuffle" (4 out, k, k, in), channel 4 c + n goes to
            corner n of 2x2 pixels.
        weight_scales: fp32, of each of weight's output channels.
        bias: (out,), of "shuffle" (4 out,).
        activation: applied after the bias.
        norm_weight: (out,); the output is RMS-normalised over its channels, · norm_weight + norm_bias.
        residual: like the output, added after that; without upsampling only.
        shortcut: (B, H, W, 4 out / repeats), of the pixel that an upsampled one came from channel
            (4 c + corner) // repeats is added; with upsampling only.
        out_norm_weight: (out,); then the output is RMS-normalised over its channels, · out_norm_weight +
            out_norm_bias, and goes through out_activation.
        out_scale: () fp32; the output is INT8 of this scale, quantized without rounding to ``dtype`` first.
        next_scale: () fp32; the output, rounded to ``dtype``, is returned in INT8 of this scale as well.
        finite: () fp32, becomes NaN where the output is not finite.

    Returns:
        (B, H, W, out), or (B, 2 H, 2 W, out), in ``dtype`` or int8; with ``next_scale`` two of them.
    """
    columns = _convolve(values, scale, weight, weight_scales, bias, upsample)
    # (corners, B, H, W, out)
    out = _ACTIVATIONS[activation](columns)
    if norm_weight is not None:
        out = _normalised(out, norm_weight, norm_bias, norm_eps)
    if shortcut is not None:
        repeated = shortcut.float().repeat_interleave(repeats, dim=-1)
        out = out + torch.stack([repeated[..., n::4] for n in range(4)])
    merged = out[0]
    if upsample != "none":
        _, batch, height, width, channels = out.shape
        # (2, 2, B, H, W, out) to (B, H, 2, W, 2, out)
        merged = out.unflatten(0, (2, 2)).permute(2, 3, 0, 4, 1, 5)
        merged = merged.reshape(batch, 2 * height, 2 * width, channels)
    merged = merged if residual is None else merged + residual.float()
    if out_norm_weight is not None:
        normed = _normalised(merged, out_norm_weight, out_norm_bias, norm_eps)
        merged = _ACTIVATIONS[out_activation](normed)
    if finite is not None:
        finite.copy_(torch.where(merged.isfinite().all(), finite, torch.nan))
    if out_scale is not None:
        return reference.quantize_tensor(merged, out_scale)
    rounded = merged.to(dtype)
    return rounded if next_scale is None else (rounded, reference.quantize_tensor(rounded, next_scale))


def _normalised(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`reference.rms_norm` + bias."""
    out = reference.rms_norm(x, weight, eps)
    return out if bias is None else out + bias.float()


def _convolve(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    upsample: Upsampling,
) -> Tensor:
    """Sums with scales and bias of each corner: (1 or 4, B, H, W, out) fp32."""
    image, height, width = values.permute(0, 3, 1, 2), values.shape[1], values.shape[2]
    if upsample != "phases":
        kernels = weight.permute(0, 3, 1, 2)
        padding = weight.shape[1] // 2
        out = reference.w8a8_conv2d(image, scale, kernels, weight_scales, bias, padding).permute(0, 2, 3, 1)
        corners = [out[..., n::4] for n in range(4)] if upsample == "shuffle" else [out]
        return torch.stack(corners)
    phases = []
    for n, (kernel, scales) in enumerate(zip(weight, weight_scales.view(4, -1), strict=True)):
        out = reference.w8a8_conv2d(image, scale, kernel.permute(0, 3, 1, 2), scales, bias, padding=1)
        # output t of a padded 2x2 convolution covers samples t - 1 and t; odd phases want t and t + 1
        top, left = n // 2, n % 2
        phases.append(out[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1))
    return torch.stack(phases)


def norm_add_quantize(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of y (..., C), · weight + bias, + x, rounded to x's dtype; then `quantize_rows`.

    Returns:
        (..., C) in x's dtype, the same in INT8, and its scales (...,).
    """
    out = (_normalised(y.float(), weight, bias, eps) + x.float()).to(x.dtype)
    return (out, *reference_fused.quantize_rows(out, static_scale))


def tensor_scale(x: Tensor) -> Tensor:
    """One dynamic scale of a map (..., C), () fp32: absmax / 127, NaN where x is not finite; 0 of nothing."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    scale = quant.tensor_scale(x)
    return torch.where(scale.isfinite(), scale, torch.nan)


def multiscale_linear_attention(
    qkv: Tensor, depthwise: Tensor | None, pointwise: Tensor | None, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """q and the sums of EfficientViT's linear attention (arXiv 2205.14756), of the map and of a second scale.

    The second scale is a depthwise 5x5 convolution with zero padding, then a 32x32 product within each head's
    q, k and v; nothing of it is rounded but its q.

    Args:
        qkv: (B, height · width, 96 heads), the q, k and v of a head side by side.
        depthwise: (5, 5, 96 heads) fp32; None: there is no second scale.
        pointwise: (96 heads, 32) fp32: output channel, input channel within the output's 32.

    Returns:
        q without ReLU, (B, height · width, scales · heads · 32), the map's first; and the
        `reference_fused.linear_attention_state` of both, (B, scales · heads, 33, 32).
    """
    scales = [qkv.float()]
    if depthwise is not None and pointwise is not None:
        image = scales[0].transpose(1, 2).unflatten(2, (height, width))
        channels = image.shape[1]
        kernels = depthwise.permute(2, 0, 1).unsqueeze(1)
        mixed = F.conv2d(image, kernels, padding=2, groups=channels)
        mixed = F.conv2d(mixed, pointwise[..., None, None], groups=channels // 32)
        scales.append(mixed.flatten(2).transpose(1, 2))
    # (B, N, heads of all scales, 3, 32)
    heads = torch.cat(scales, dim=-1).unflatten(-1, (-1, 3, 32))
    q, k, v = (part.flatten(2) for part in heads.unbind(3))
    return q.to(qkv.dtype), reference_fused.linear_attention_state(k, v, heads.shape[2])
