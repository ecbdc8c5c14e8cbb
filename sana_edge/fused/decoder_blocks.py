"""The DC-AE's convolutions on the fused INT8 operations, each of which may end in the INT8 input of the next.

What a convolution is followed by is part of it, so that of a residual block's maps only its input, both INT8
inputs of its convolutions and its output are ever written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.fused.decoder_maps import WIDEST_NORM, Following, Layer, Map, Workspaces, norm_vectors, vector
from sana_edge.int8.conv import W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.feature_maps import NORM_EPS, nchw, nhwc
from sana_edge.int8.linear import Quantized
from sana_edge.kernels.reference_conv import Activation, Upsampling
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample

# csrc/w8a8_conv2d.cu has all columns of this many channels in one tile
NORM_CHANNELS = 256
# of one sum, in kernel · kernel · channels
_LARGEST_DEPTH = 131071
ACTIVATIONS: Mapping[Any, Activation] = {F.silu: "silu", F.relu: "relu"}


def convolution_fits(layer: nn.Module) -> bool:
    """Whether `Convolution` has a layer; a 1x1 kernel whose scales are per pixel is a linear layer."""
    if not isinstance(layer, W8A8Conv2d | W8A8PhaseConv2d) or layer.in_channels % 16:
        return False
    kernel = 2 if isinstance(layer, W8A8PhaseConv2d) else 2 * layer.padding + 1
    scaled = kernel > 1 or layer.input_scale is not None
    return kernel <= 3 and scaled and kernel * kernel * layer.in_channels <= _LARGEST_DEPTH


def res_block_fits(block: ResBlock) -> bool:
    """Whether `FusedResBlock` has a block."""
    channels = len(block.norm.weight)
    narrow = channels <= NORM_CHANNELS or (channels % 16 == 0 and channels <= WIDEST_NORM)
    return narrow and convolution_fits(block.conv1) and convolution_fits(block.conv2)


class Convolution:
    """An INT8 convolution of the fused kind, on maps (B, H, W, C)."""

    def __init__(
        self,
        layer: W8A8Conv2d | W8A8PhaseConv2d,
        backend: str,
        spaces: Workspaces,
        upsample: Upsampling = "none",
    ) -> None:
        layer.unpack()
        # (..., in, k, k) to (..., k, k, in)
        self.weight = layer.weight.movedim(-3, -1).contiguous()
        self.weight_scales = layer.weight_scale.flatten().contiguous()
        self.bias = vector(layer.bias)
        self.input_scale = layer.input_scale
        self.upsample, self.backend, self._spaces = upsample, backend, spaces

    def quantize(self, x: Tensor, *, shows: bool = False) -> tuple[Tensor, Tensor]:
        """INT8 values of a map and its scale () fp32.

        Args:
            shows: the scale is NaN where the map is not finite, which otherwise a block's input, added to its
                output, says to those that follow. A dynamic scale says it anyway.
        """
        scale = self.input_scale
        if scale is None:
            scale = ops.tensor_scale(x, backend=self.backend, workspace=self._spaces(x))
        values, scales = ops.quantize_rows(x, scale, backend=self.backend)
        return values, scales.amax() if shows and self.input_scale is not None else scale

    def take(self, x: Map, *, shows: bool = False) -> tuple[Tensor, Tensor]:
        """INT8 values of a map and its scale, those that it came with where there are any."""
        taken = x.take()
        if taken is None:
            return self.quantize(x.there, shows=shows)
        values, scales = taken
        scale = self.input_scale if scales.ndim else scales
        assert scale is not None
        return values, scale

    def __call__(self, values: Tensor, scale: Tensor, dtype: torch.dtype, **options: Any) -> Any:
        """`reference_conv.w8a8_conv2d` with its options."""
        product = (values, scale, self.weight, self.weight_scales, self.bias, dtype)
        return ops.w8a8_conv2d(*product, backend=self.backend, upsample=self.upsample, **options)


class _Convolving(Layer):
    """A layer that ends in a convolution, which hands on a map where its scale is known."""

    def _convolve(
        self, conv: Convolution, values: Tensor, scale: Tensor, x: Map, **options: Any
    ) -> Tensor | Map:
        following = self.following
        wanted = None if following is None or following.rows else following.scale
        if wanted is None:
            return self._give(conv(values, scale, x.dtype, **options))
        rows, handed = conv(values, scale, x.dtype, next_scale=wanted, **options)
        return self._give(rows, handed, wanted)


class FusedConv2d(_Convolving):
    """A convolution that nothing was fused with; the interface of `W8A8Conv2d`."""

    def __init__(self, layer: W8A8Conv2d, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        self.product = Convolution(layer, backend, spaces)

    @property
    def takes(self) -> Following:
        return Following(self.product.input_scale)

    def prepare(self, x: Tensor | Map) -> Quantized:
        """As `W8A8Conv2d.prepare`, with one scale also for 1x1 kernels."""
        given = Map.of(x)
        values, scale = self.product.take(given, shows=True)
        return Quantized(nchw(values), scale, given.dtype)

    def convolve(self, prepared: Quantized) -> Tensor:
        """As `W8A8Conv2d.convolve`."""
        return nchw(self.product(nhwc(prepared.values).contiguous(), prepared.scales, prepared.dtype))

    def forward(self, x: Tensor | Map, repeats: int = 0) -> Tensor | Map:
        """With ``repeats`` each channel of x is added to so many of the result."""
        given = Map.of(x)
        values, scale = self.product.take(given, shows=True)
        residual = given.there.repeat_interleave(repeats, dim=-1) if repeats else None
        return self._convolve(self.product, values, scale, given, residual=residual)


class FusedResBlock(_Convolving):
    """`ResBlock`: the first convolution ends in the INT8 input of the second, that in the block's output."""

    def __init__(self, block: ResBlock, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        conv1, conv2 = cast(W8A8Conv2d, block.conv1), cast(W8A8Conv2d, block.conv2)
        self.conv1, self.conv2 = (Convolution(conv, backend, spaces) for conv in (conv1, conv2))
        self.activation = ACTIVATIONS[block.activation]
        self.norm = norm_vectors(block.norm)

    @property
    def takes(self) -> Following:
        return Following(self.conv1.input_scale)

    @property
    def narrow(self) -> bool:
        """Whether its norm is part of its second convolution."""
        return len(self.norm[0]) <= NORM_CHANNELS

    def forward(self, x: Tensor | Map) -> Tensor | Map:
        given = Map.of(x)
        values, scale = self.conv1.take(given)
        rows, next_scale = given.there, self.conv2.input_scale
        hidden = self.conv1(values, scale, given.dtype, activation=self.activation, out_scale=next_scale)
        del values
        if next_scale is None:
            hidden, next_scale = self.conv2.quantize(hidden)
        if not self.narrow:
            y = self.conv2(hidden, next_scale, given.dtype)
            return self._add_normalised(y, rows, self.norm, self.conv2.backend)
        weight, bias = self.norm
        end = {"norm_weight": weight, "norm_bias": bias, "norm_eps": NORM_EPS, "residual": rows}
        if self.following is not None and self.following.norm is not None:
            return self._finish(hidden, next_scale, given.dtype, self.following, end)
        return self._convolve(self.conv2, hidden, next_scale, given, **end, out=rows)

    def _finish(
        self, hidden: Tensor, scale: Tensor, dtype: torch.dtype, following: Following, end: Mapping[str, Any]
    ) -> Map:
        """With the decoder's last norm. Nobody reads the sum itself: the scale says what is not finite."""
        assert following.norm is not None
        weight, bias = following.norm
        last = {**end, "out_norm_weight": weight, "out_norm_bias": bias}
        last["out_activation"] = following.activation
        if following.scale is None:
            return Map(self.conv2(hidden, scale, dtype, **last), None, None, dtype)
        shown = following.scale.clone()
        values = self.conv2(hidden, scale, dtype, **last, out_scale=following.scale, finite=shown)
        return Map(None, values, shown, dtype)


class FusedUpsample(_Convolving):
    """`Upsample`: all four corners and the shortcut in one launch."""

    def __init__(self, block: Upsample, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        conv = cast(W8A8Conv2d | W8A8PhaseConv2d, block.conv)
        upsample: Upsampling = "phases" if isinstance(conv, W8A8PhaseConv2d) else "shuffle"
        self.conv = Convolution(conv, backend, spaces, upsample)
        self.repeats = block.repeats

    @property
    def takes(self) -> Following:
        return Following(self.conv.input_scale)

    def forward(self, x: Tensor | Map) -> Tensor | Map:
        given = Map.of(x)
        values, scale = self.conv.take(given, shows=not self.repeats)
        shortcut = given.there if self.repeats else None
        repeats = self.repeats or 1
        return self._convolve(self.conv, values, scale, given, shortcut=shortcut, repeats=repeats)
