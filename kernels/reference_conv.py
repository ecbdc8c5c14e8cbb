"""What the decoder's fused convolution computes, composed of `reference`; maps are (B, H, W, C)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.kernels import reference

Upsampling = Literal["none", "phases", "shuffle"]
Activation = Literal["identity", "relu", "silu"]


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
    norm_eps: float = 1e-5,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    repeats: int = 1,
    out_scale: Tensor | None = None,
) -> Tensor:
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
        out_scale: () fp32; the output is INT8 of this scale, quantized without rounding to ``dtype`` first.

    Returns:
        (B, H, W, out), or (B, 2 H, 2 W, out), in ``dtype`` or int8.
    """
    columns = _convolve(values, scale, weight, weight_scales, bias, upsample)
    # (corners, B, H, W, out)
    out = {"identity": lambda y: y, "relu": F.relu, "silu": F.silu}[activation](columns)
    if norm_weight is not None:
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.float()
        out = out if norm_bias is None else out + norm_bias.float()
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
    return merged.to(dtype) if out_scale is None else reference.quantize_tensor(merged, out_scale)


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
