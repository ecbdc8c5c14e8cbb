"""What layers of a fused decoder hand to each other: maps, their INT8, and what the next layer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.int8.feature_maps import NORM_EPS, ChannelNorm, nchw, nhwc
from sana_edge.kernels.reference_conv import Activation

# of a row that csrc/norm_add_quantize.cu keeps
WIDEST_NORM = 2560
# the workspace of csrc/multiscale_linear_attention.cu grows no further
_MOST_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Following:
    """What comes behind a block: a layer that takes INT8, a convolution or (``rows``) a product of rows.

    ``scale`` is that of the layer's input, () fp32, None without calibration; ``norm`` has weight and bias
    (C,) fp32 of the decoder's last norm in between, before ``activation``.
    """

    scale: Tensor | None
    rows: bool = False
    norm: tuple[Tensor, Tensor] | None = None
    activation: Activation = "relu"


@dataclass(eq=False)
class Map:
    """A map (B, H, W, C) in 16 bit, and its INT8 with ``scales`` () or (B, H, W); None: nobody reads it.

    Who takes the values takes them away, so that their memory is free again as soon as it can be.
    """

    rows: Tensor | None
    values: Tensor | None
    scales: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | Map) -> Map:
        """That of a tensor (B, C, H, W)."""
        return x if isinstance(x, Map) else cls(nhwc(x).contiguous(), None, None, x.dtype)

    @property
    def there(self) -> Tensor:
        """``rows`` where they are needed."""
        assert self.rows is not None
        return self.rows

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Values and scales, if there are any, once."""
        values, self.values = self.values, None
        return None if values is None or self.scales is None else (values, self.scales)


class Workspaces:
    """The memory that sums between blocks of a launch need, of a decoder with up to so many heads."""

    def __init__(self, backend: str, heads: int) -> None:
        self._backend, self._heads = backend, heads
        # none is let go: a recorded graph may use it
        self._made: dict[tuple[int, torch.device], Tensor | None] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """For the images of a map."""
        key = len(x), x.device
        if key not in self._made:
            self._made[key] = ops.workspace(self._backend, len(x), _MOST_TOKENS, self._heads, x.device)
        return self._made[key]


def vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


class Layer(nn.Module):
    """A layer that may hand on INT8; without ``following`` it gives a tensor (B, C, H, W)."""

    following: Following | None = None

    @property
    def takes(self) -> Following:
        """Its own input, as the layer before it wants to know it."""
        raise NotImplementedError

    def _give(self, rows: Tensor, values: Tensor | None = None, scales: Tensor | None = None) -> Tensor | Map:
        return nchw(rows) if self.following is None else Map(rows, values, scales, rows.dtype)

    def _add_normalised(
        self, y: Tensor, rows: Tensor, norm: tuple[Tensor, Tensor], backend: str
    ) -> Tensor | Map:
        """rows + norm(y), in the place of rows."""
        following = self.following
        scale = None if following is None else following.scale
        out, values, scales = ops.norm_add_quantize(
            y, rows, *norm, NORM_EPS, scale, backend=backend, out=rows
        )
        if following is None or (scale is None and not following.rows):
            return self._give(out)
        return self._give(out, values, scales)


def norm_vectors(norm: ChannelNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias (C,) fp32 as operations take them."""
    return cast(Tensor, vector(norm.weight)), cast(Tensor, vector(norm.bias))
