"""EfficientViT's block (arXiv 2205.14756) as the DC-AE has it: linear attention, then a gated convolution."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.config import EXPAND_RATIO
from sana_edge.decoding import strip_rows
from sana_edge.int8 import ops
from sana_edge.int8.conv import Conv2d
from sana_edge.int8.feature_maps import ChannelNorm, add, nchw, nhwc, strips
from sana_edge.int8.linear import Linear, W8A8Linear

ATTENTION_EPS = 1e-15


class _MultiscaleProjection(nn.Module):
    """A wider receptive field for q, k and v: depthwise k x k, then a 1x1 within each head's q, k or v."""

    def __init__(self, channels: int, groups: int, kernel: int) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.proj_out = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj_out(self.proj_in(x))
        return result


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ReLU linear attention of (..., tokens, head) maps: sum_j (q_i.k_j) v_j / sum_j q_i.k_j, q and k >= 0.

    The order of the products follows the cheaper one: (k^T v) first when there are more tokens than
    channels in a head, as in EfficientViT, the tokens x tokens weights otherwise.
    """
    if q.shape[-2] > q.shape[-1]:
        sums = torch.cat([k.transpose(-1, -2) @ v, k.sum(dim=-2).unsqueeze(-1)], dim=-1)
        out = q @ sums
        return out[..., :-1] / (out[..., -1:] + ATTENTION_EPS)
    weights = q @ k.transpose(-1, -2)
    return (weights / (weights.sum(dim=-1, keepdim=True) + ATTENTION_EPS)) @ v


class LinearAttention(nn.Module):
    """Multi-scale ReLU linear attention over all positions of a map, plus the input."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = Linear(channels, inner, bias=False)
        self.to_k = Linear(channels, inner, bias=False)
        self.to_v = Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            _MultiscaleProjection(3 * inner, 3 * heads, kernel) for kernel in kernels
        )
        self.to_out = Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = nchw(self._qkv(nhwc(x)))
        scales = [self._heads(qkv), *(self._heads(project(qkv)) for project in self.to_qkv_multiscale)]
        return add(x, self.norm_out(nchw(self.to_out(torch.cat(scales, dim=-1)))))

    def _qkv(self, x: Tensor) -> Tensor:
        """q, k and v of (..., channels) side by side; they share an input, which to_q prepares."""
        layers = (self.to_q, self.to_k, self.to_v)
        prepared = self.to_q.prepare(x)
        if isinstance(prepared, Tensor):
            return F.linear(prepared, torch.cat([layer.weight for layer in layers]))
        # joined as `ops.hold_weight` holds them
        weight = torch.cat([layer.weight.t() for layer in layers], dim=1).t()
        columns = torch.cat([cast(W8A8Linear, layer).weight_scale for layer in layers])
        return ops.w8a8_linear(prepared.values, prepared.scales, weight, columns, None, prepared.dtype)

    def _heads(self, qkv: Tensor) -> Tensor:
        batch, _, height, width = qkv.shape
        # every 3 * head_dim channels in a row are the q, k and v of a head, also where that joins what
        # were projected as q, k and v: the heads are mixed, the weights were trained that way
        heads = nhwc(qkv).reshape(batch, height * width, -1, 3, self.head_dim)
        with torch.autocast(qkv.device.type, enabled=False):
            q, k, v = heads.permute(3, 0, 2, 1, 4)
            out = _attend(F.relu(q).float(), F.relu(k).float(), v.float())
        # (batch, heads, tokens, head_dim) -> (batch, height, width, channels)
        return out.to(qkv.dtype).transpose(1, 2).reshape(batch, height, width, -1)


class GatedConv(nn.Module):
    """Inverted bottleneck with a depthwise 3x3 and a SiLU gate, normalised and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPAND_RATIO * channels
        self.conv_inverted = Conv2d(channels, hidden * 2, 1)
        self.conv_depth = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2)
        self.conv_point = Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return add(x, self.norm(self._gated(x)))
        rows_per_strip = strip_rows(x[:, 0, 0].numel() * self.conv_depth.out_channels * x.element_size())
        for rows, window, top in strips(x, rows_per_strip, halo=1):
            target = x[:, :, rows]
            # next to a cut the depthwise convolution saw padding in place of a row
            target.add_(self.norm(self._gated(window)[:, :, top : top + target.shape[2]]))
        return x

    def _gated(self, x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        hidden = self.conv_depth(F.silu(self.conv_inverted(x), inplace=in_place))
        value, gate = hidden.chunk(2, dim=1)
        gate = F.silu(gate, inplace=in_place)
        out: Tensor = self.conv_point(value.mul_(gate) if in_place else value * gate)
        return out


class EfficientViTBlock(nn.Module):
    """Global mixing by linear attention, then local mixing by a gated convolution."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = LinearAttention(channels, head_dim, kernels)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv_out(self.attn(x))
        return result
