"""What the layers of the DC-AE have in common: layouts of maps, sums in place, strips, normalisation.

Maps are (batch, channels, height, width) in channels-last memory, so that normalisation and the 1x1
convolutions see a (batch, height, width, channels) view without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

NORM_EPS = 1e-5


def nhwc(x: Tensor) -> Tensor:
    """(batch, channels, height, width) as (batch, height, width, channels), not copied."""
    return x.permute(0, 2, 3, 1)


def nchw(x: Tensor) -> Tensor:
    """The inverse of `nhwc`."""
    return x.permute(0, 3, 1, 2)


def add(x: Tensor, y: Tensor) -> Tensor:
    """``x + y``, in the memory of ``x`` where no gradient is recorded."""
    return x + y if torch.is_grad_enabled() else x.add_(y)


def strips(x: Tensor, rows: int, halo: int) -> Iterator[tuple[slice, Tensor, int]]:
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
            scale = torch.rsqrt(rows.float().square().mean(dim=-1, keepdim=True) + NORM_EPS)
            return nchw(torch.addcmul(self.bias, rows * scale.to(rows.dtype), self.weight))
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(rows.shape[-1]).add_(NORM_EPS).rsqrt_()
        return nchw(rows.mul_(scale).mul_(self.weight).add_(self.bias))
