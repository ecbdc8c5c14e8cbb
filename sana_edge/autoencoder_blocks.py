"""Layers of the DC-AE (arXiv 2410.10733).

Maps are (batch, channels, height, width) in channels-last memory, so that normalisation and the 1x1
convolutions see a (batch, height, width, channels) view without a copy. Where no gradient is recorded a
layer overwrites its input, and the wide maps inside of it exist for one horizontal strip at a time: at
4096 px one map of the last stage takes 8 GiB in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.errors import CheckpointError

# of the widest map inside a layer; less costs time for the rows that neighbouring strips compute twice
STRIP_BYTES = 64 << 20
_MIN_STRIP_ROWS = 16

EXPAND_RATIO = 4
_NORM_EPS = 1e-5
_ATTENTION_EPS = 1e-15

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "relu": F.relu}


def nhwc(x: Tensor) -> Tensor:
    """(batch, channels, height, width) as (batch, height, width, channels), not copied."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    """The inverse of `nhwc`."""
    return x.permute(0, 3, 1, 2)


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, in the memory of ``x`` where no gradient is recorded."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def multiple(many: int, few: int) -> int:
    """``many / few`` of a shortcut that averages or repeats channels in groups.

    Raises:
        CheckpointError: it is no whole number.
    """
    if many % few:
        raise CheckpointError(f"vae/config.json: a shortcut cannot join {few} and {many} channels in groups")
    return many // few


def strip_rows(row_bytes: int) -> int:
    """Rows per strip when the widest map of a layer has ``row_bytes`` per row of its input."""
    return max(_MIN_STRIP_ROWS, STRIP_BYTES // row_bytes)


def _strips(x: Tensor, rows: int, halo: int) -> Iterator[tuple[slice, Tensor, int]]:
    """Yield (rows, window, rows of the window above them) from top to bottom.

    The window holds the rows and up to ``halo`` more on either side, all as they were before the
    iteration: the caller may overwrite ``x[:, :, rows]``.
    """
    height = x.shape[2]
    above: Tensor | None = None
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        window = x[:, :, start : stop + halo]
        top = 0
        if above is not None:
            window, top = torch.cat([above, window], dim=2), halo
        if stop < height:
            above = x[:, :, stop - halo : stop].clone()
        yield slice(start, stop), window, top


class ChannelNorm(nn.Module):
    """RMS normalisation over the channels, statistics in fp32, with scale and offset."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = nhwc(x)
        if torch.is_grad_enabled():
            scale = torch.rsqrt(rows.float().square().mean(dim=-1, keepdim=True) + _NORM_EPS)
            return nchw(torch.addcmul(self.bias, rows * scale.to(rows.dtype), self.weight))
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(rows.shape[-1]).add_(_NORM_EPS).rsqrt_()
        return nchw(rows.mul_(scale).mul_(self.weight).add_(self.bias))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, normalised and added to the input."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            out: Tensor = x + self.norm(self._convolve(x))
            return out
        rows_per_strip = strip_rows(x[:, :, 0].numel() * x.element_size())
        for rows, window, top in _strips(x, rows_per_strip, halo=2):
            target = x[:, :, rows]
            # the rows next to a cut saw the convolutions' padding in place of the neighbouring strip
            target.add_(self.norm(self._convolve(window)[:, :, top : top + target.shape[2]]))
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.conv1(x), inplace=not torch.is_grad_enabled())
        out: Tensor = self.conv2(hidden)
        return out


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
    channels in a head, as in EfficientViT (arXiv 2205.14756), the tokens x tokens weights otherwise.
    """
    if q.shape[-2] > q.shape[-1]:
        sums = torch.cat([k.transpose(-1, -2) @ v, k.sum(dim=-2).unsqueeze(-1)], dim=-1)
        out = q @ sums
        return out[..., :-1] / (out[..., -1:] + _ATTENTION_EPS)
    weights = q @ k.transpose(-1, -2)
    return (weights / (weights.sum(dim=-1, keepdim=True) + _ATTENTION_EPS)) @ v


class _LinearAttention(nn.Module):
    """Multi-scale ReLU linear attention over all positions of a map, plus the input."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        heads = channels // head_dim
        inner = heads * head_dim
        self.head_dim = head_dim
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_k = nn.Linear(channels, inner, bias=False)
        self.to_v = nn.Linear(channels, inner, bias=False)
        self.to_qkv_multiscale = nn.ModuleList(
            _MultiscaleProjection(3 * inner, 3 * heads, kernel) for kernel in kernels
        )
        self.to_out = nn.Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        qkv = nchw(F.linear(nhwc(x), weight))
        scales = [self._heads(qkv), *(self._heads(project(qkv)) for project in self.to_qkv_multiscale)]
        return add(x, self.norm_out(nchw(self.to_out(torch.cat(scales, dim=-1)))))

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


class _GatedConv(nn.Module):
    """Inverted bottleneck with a depthwise 3x3 and a SiLU gate, normalised and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = EXPAND_RATIO * channels
        self.conv_inverted = nn.Conv2d(channels, hidden * 2, 1)
        self.conv_depth = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        in_place = not torch.is_grad_enabled()
        hidden = self.conv_depth(F.silu(self.conv_inverted(x), inplace=in_place))
        value, gate = hidden.chunk(2, dim=1)
        gate = F.silu(gate, inplace=in_place)
        gated = value.mul_(gate) if in_place else value * gate
        # a convolution would copy the half of the channels that `value` is
        return add(x, self.norm(nchw(F.linear(nhwc(gated), self.conv_point.weight.flatten(1)))))


class EfficientViTBlock(nn.Module):
    """Global mixing by linear attention, then local mixing by a gated convolution."""

    def __init__(self, channels: int, head_dim: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.attn = _LinearAttention(channels, head_dim, kernels)
        self.conv_out = _GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv_out(self.attn(x))
        return result


class Downsample(nn.Module):
    """Half the resolution by a 3x3 convolution; the shortcut averages groups of 2x2-unshuffled channels."""

    def __init__(self, in_channels: int, out_channels: int, *, unshuffle: bool, shortcut: bool) -> None:
        super().__init__()
        self.unshuffle = unshuffle
        self.group = multiple(in_channels * 4, out_channels) if shortcut else 0
        width, stride = (multiple(out_channels, 4), 1) if unshuffle else (out_channels, 2)
        self.conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        if self.unshuffle:
            out = F.pixel_unshuffle(out, 2)
        if self.group:
            out = out + average_groups(F.pixel_unshuffle(x, 2), self.group)
        return out.contiguous(memory_format=torch.channels_last)


def average_groups(x: Tensor, group: int) -> Tensor:
    """Average every ``group`` neighbouring channels."""
    batch, channels, height, width = x.shape
    return x.view(batch, channels // group, group, height, width).mean(dim=2)


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """3 taps on doubled samples as 2 taps on the samples themselves: for even and for odd outputs."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


class Upsample(nn.Module):
    """Twice the resolution by a 3x3 convolution; the shortcut repeats channels and shuffles them out 2x2.

    With ``interpolate`` the convolution follows nearest-neighbour doubling. Pairs of its taps then fall on
    the same sample, so each of the four output phases is a 2x2 convolution of the small map: 16/36 of the
    products, and the doubled map is never made.
    """

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.interpolate = interpolate
        self.out_channels = out_channels
        self.repeats = multiple(out_channels * 4, in_channels) if shortcut else 0
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else out_channels * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kernels = self._phase_kernels() if self.interpolate else []
        batch, _, height, width = x.shape
        if torch.is_grad_enabled():
            phases = [nhwc(phase) for phase in self._phases(x, kernels)]
            # (batch, height, 2, width, 2, channels)
            out = torch.stack([torch.stack(phases[:2], dim=3), torch.stack(phases[2:], dim=3)], dim=2)
            return nchw(out.reshape(batch, 2 * height, 2 * width, self.out_channels))
        out = torch.empty(
            (batch, self.out_channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        rows_per_strip = strip_rows(out[:, :, :2].numel() * out.element_size())
        for rows, window, top in _strips(x, rows_per_strip, halo=1):
            target = out[:, :, 2 * rows.start : 2 * rows.stop]
            for n, phase in enumerate(self._phases(window, kernels)):
                corner = target[:, :, n // 2 :: 2, n % 2 :: 2]
                corner.copy_(phase[:, :, top : top + corner.shape[2]])
        return out

    def _phase_kernels(self) -> list[Tensor]:
        return [kernel for rows in _folded(self.conv.weight, 2) for kernel in _folded(rows, 3)]

    def _phases(self, x: Tensor, kernels: list[Tensor]) -> Iterator[Tensor]:
        """Yield the outputs at (even, even), (even, odd), (odd, even) and (odd, odd) rows and columns."""
        height, width = x.shape[2:]
        packed = None if self.interpolate else self.conv(x)
        for n in range(4):
            if packed is None:
                # output t of a padded 2x2 convolution covers samples t - 1 and t; odd phases want t and t + 1
                i, j = n // 2, n % 2
                phase = F.conv2d(x, kernels[n], self.conv.bias, padding=1)
                phase = phase[:, :, i : i + height, j : j + width]
            else:
                phase = packed[:, n::4]
            yield add(phase, _repeated_phase(x, self.repeats, n)) if self.repeats else phase


def _repeated_phase(x: Tensor, repeats: int, phase: int) -> Tensor:
    """Every fourth channel from ``phase`` on of ``x`` with each channel repeated, a view where it can be."""
    if 4 % repeats == 0:
        return x[:, phase // repeats :: 4 // repeats]
    return x.repeat_interleave(repeats, dim=1)[:, phase::4]
