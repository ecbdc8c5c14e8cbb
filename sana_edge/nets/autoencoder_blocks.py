"""The convolutional layers of the DC-AE (arXiv 2410.10733).

Where no gradient is recorded a layer overwrites its input, and the wide maps inside of it exist for one
horizontal strip at a time: at 4096 px one map of the last stage takes 8 GiB in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.decoding import strip_rows
from sana_edge.errors import CheckpointError
from sana_edge.int8.conv import Conv2d, PhaseConv2d, W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.feature_maps import ChannelNorm, add, nchw, nhwc, strips

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "relu": F.relu}


def multiple(many: int, few: int) -> int:
    """``many / few`` of a shortcut that averages or repeats channels in groups.

    Raises:
        CheckpointError: it is no whole number.
    """
    if many % few:
        raise CheckpointError(f"vae/config.json: a shortcut cannot join {few} and {many} channels in groups")
    return many // few


class ResBlock(nn.Module):
    """Two 3x3 convolutions, normalised and added to the input."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.conv1 = Conv2d(channels, channels, 3, padding=1)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            out: Tensor = x + self.norm(self._convolve(x))
            return out
        rows_per_strip = strip_rows(x[:, :, 0].numel() * x.element_size())
        for rows, window, top in strips(x, rows_per_strip, halo=2):
            target = x[:, :, rows]
            below = window.shape[2] - top - target.shape[2]
            target.add_(self.norm(self._convolve(window, top, below)))
        return x

    def _convolve(self, x: Tensor, top: int = 0, below: int = 0) -> Tensor:
        """Both convolutions, without the rows of up to 2 at the ends that neighbouring strips have."""
        hidden = self.activation(self.conv1(x), inplace=not torch.is_grad_enabled())
        # next to a cut each convolution saw padding in place of a row
        end = hidden.shape[2] - below // 2
        prepared = self.conv2.prepare(hidden[:, :, top // 2 : end])
        # an INT8 layer has its own copy
        del hidden
        return self.conv2.convolve(prepared)[:, :, top - top // 2 : end - top // 2 - (below - below // 2)]


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


class Upsample(nn.Module):
    """Twice the resolution by a 3x3 convolution; the shortcut repeats channels and shuffles them out 2x2.

    With ``interpolate`` the convolution follows nearest-neighbour doubling, see `PhaseConv2d`.
    """

    conv: PhaseConv2d | W8A8PhaseConv2d | Conv2d | W8A8Conv2d

    def __init__(self, in_channels: int, out_channels: int, *, interpolate: bool, shortcut: bool) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.repeats = multiple(out_channels * 4, in_channels) if shortcut else 0
        if interpolate:
            self.conv = PhaseConv2d(in_channels, out_channels, 3, padding=1)
        else:
            self.conv = Conv2d(in_channels, out_channels * 4, 3, padding=1)

    @classmethod
    def around(cls, conv: nn.Module) -> Upsample:
        """One without a shortcut, of a convolution of the doubled map that belongs to another module."""
        assert isinstance(conv, PhaseConv2d | W8A8PhaseConv2d)
        up = cls.__new__(cls)
        nn.Module.__init__(up)
        up.out_channels, up.repeats, up.conv = conv.out_channels, 0, conv
        return up

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.conv.kernels() if isinstance(self.conv, PhaseConv2d | W8A8PhaseConv2d) else []
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
        for rows, window, top in strips(x, rows_per_strip, halo=1):
            target = out[:, :, 2 * rows.start : 2 * rows.stop]
            for n, phase in enumerate(self._phases(window, kernels)):
                corner = target[:, :, n // 2 :: 2, n % 2 :: 2]
                corner.copy_(phase[:, :, top : top + corner.shape[2]])
        return out

    def _phases(self, x: Tensor, kernels: list[Tensor]) -> Iterator[Tensor]:
        """Yield the outputs at (even, even), (even, odd), (odd, even) and (odd, odd) rows and columns."""
        if isinstance(self.conv, PhaseConv2d | W8A8PhaseConv2d):
            phases = self.conv.phases(x, kernels)
        else:
            packed = self.conv(x)
            phases = (packed[:, n::4] for n in range(4))
        for n, phase in enumerate(phases):
            yield add(phase, _repeated_phase(x, self.repeats, n)) if self.repeats else phase


def _repeated_phase(x: Tensor, repeats: int, phase: int) -> Tensor:
    """Every fourth channel from ``phase`` on of ``x`` with each channel repeated, a view where it can be."""
    if 4 % repeats == 0:
        return x[:, phase // repeats :: 4 // repeats]
    return x.repeat_interleave(repeats, dim=1)[:, phase::4]
