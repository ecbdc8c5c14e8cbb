"""The DC-AE's layers on the fused INT8 operations, each of which may end in the INT8 input of the next.

What a convolution is followed by is part of it, so that of a residual block's maps only its input, both INT8
inputs of its convolutions and its output are ever written; of a block of EfficientViT only its input, q, k
and v, q of both scales, and what its products give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.int8.conv import W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.feature_maps import NORM_EPS, ChannelNorm, nchw, nhwc
from sana_edge.int8.linear import Quantized, W8A8Linear
from sana_edge.kernels.reference_conv import Activation, Upsampling
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.efficient_vit import ATTENTION_EPS, GatedConv, LinearAttention

# csrc/w8a8_conv2d.cu has all columns of this many channels in one tile
NORM_CHANNELS = 256
# of a row that csrc/norm_add_quantize.cu keeps
WIDEST_NORM = 2560
# of csrc/multiscale_linear_attention.cu
HEAD_DIM, MIXED_KERNEL = 32, 5
# the workspace of csrc/multiscale_linear_attention.cu grows no further
_MOST_TOKENS = 2048
# of one sum, in kernel · kernel · channels
_LARGEST_DEPTH = 131071
ACTIVATIONS: Mapping[Any, Activation] = {F.silu: "silu", F.relu: "relu"}


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


def attention_fits(block: LinearAttention) -> bool:
    """Whether `FusedAttention` has a block."""
    mixed = [cast(nn.Conv2d, scale.proj_in).kernel_size for scale in block.to_qkv_multiscale]
    known = block.head_dim == HEAD_DIM and mixed in ([], [(MIXED_KERNEL, MIXED_KERNEL)])
    return known and _rows_fit(block.norm_out, block.to_q, block.to_k, block.to_v, block.to_out)


def gate_fits(block: GatedConv) -> bool:
    """Whether `FusedGatedConv` has a block."""
    return _rows_fit(block.norm, block.conv_inverted, block.conv_point) and block.conv_depth.bias is not None


def _rows_fit(norm: ChannelNorm, *layers: nn.Module) -> bool:
    channels = len(norm.weight)
    return (channels % 16 == 0 and channels <= WIDEST_NORM) and all(
        isinstance(layer, W8A8Linear | W8A8Conv2d)
        and layer.weight_scale.shape[0] % 8 == 0
        and (layer.in_features if isinstance(layer, W8A8Linear) else layer.in_channels) % 16 == 0
        for layer in layers
    )


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


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
        self.bias = _vector(layer.bias)
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


class _Layer(nn.Module):
    """A layer that may hand on INT8; without ``following`` it gives a tensor (B, C, H, W)."""

    following: Following | None = None

    @property
    def takes(self) -> Following:
        """Its own input, as the layer before it wants to know it."""
        raise NotImplementedError

    @property
    def _next_scale(self) -> Tensor | None:
        """What a convolution can hand on: a map of one known scale."""
        following = self.following
        return None if following is None or following.rows else following.scale

    def _give(self, rows: Tensor, values: Tensor | None = None, scales: Tensor | None = None) -> Tensor | Map:
        return nchw(rows) if self.following is None else Map(rows, values, scales, rows.dtype)

    def _convolve(
        self, conv: Convolution, values: Tensor, scale: Tensor, x: Map, **options: Any
    ) -> Tensor | Map:
        """A layer's last convolution, which hands on what it can."""
        wanted = self._next_scale
        if wanted is None:
            return self._give(conv(values, scale, x.dtype, **options))
        rows, following = conv(values, scale, x.dtype, next_scale=wanted, **options)
        return self._give(rows, following, wanted)

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
    return cast(Tensor, _vector(norm.weight)), cast(Tensor, _vector(norm.bias))


class FusedConv2d(_Layer):
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


class FusedResBlock(_Layer):
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


class FusedUpsample(_Layer):
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


class _Product(nn.Module):
    """INT8 linear layers of one input, side by side, on rows (..., C)."""

    def __init__(self, layers: tuple[nn.Module, ...], backend: str) -> None:
        super().__init__()
        known = [cast(W8A8Linear | W8A8Conv2d, layer) for layer in layers]
        weights = []
        for layer in known:
            if isinstance(layer, W8A8Conv2d):
                layer.unpack()
            weights.append(layer.weight.flatten(1))
        self.weight = torch.cat(weights).contiguous()
        self.weight_scales = torch.cat([layer.weight_scale for layer in known])
        biases = [layer.bias for layer in known if layer.bias is not None]
        self.bias = _vector(torch.cat(biases)) if biases else None
        first = known[0]
        static = first.static if isinstance(first, W8A8Linear) else True
        self.static_scale = first.input_scale if static else None
        self.backend = backend

    def take(self, x: Map) -> tuple[Tensor, Tensor]:
        """INT8 values of a map and its rows' scales, those that it came with where there are any."""
        values, scales = x.take() or ops.quantize_rows(x.there, self.static_scale, backend=self.backend)
        return values, scales

    def multiply(self, quantized: tuple[Tensor, Tensor], dtype: torch.dtype, *, silu: bool = False) -> Tensor:
        """Of INT8 rows (..., C) and their scales to (..., out)."""
        values, scales = quantized
        rows = (values.flatten(0, -2), scales.flatten())
        operands = (*rows, self.weight, self.weight_scales, self.bias)
        out: Tensor = ops.w8a8_linear(*operands, dtype, backend=self.backend, silu=silu)
        return out.view(*values.shape[:-1], len(self.weight))


class FusedAttention(_Layer):
    """`LinearAttention` in five launches: q, k and v; both scales' sums; the read; its product; the norm."""

    def __init__(self, block: LinearAttention, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        self.project = _Product((block.to_q, block.to_k, block.to_v), backend)
        self.to_out = _Product((block.to_out,), backend)
        self.depthwise = self.pointwise = None
        for scale in block.to_qkv_multiscale:
            taps, weight = (cast(nn.Conv2d, conv).weight for conv in (scale.proj_in, scale.proj_out))
            # (channels, 1, 5, 5) to (5, 5, channels); (channels, 32, 1, 1) to (channels, 32)
            self.depthwise = _vector(taps.squeeze(1).permute(1, 2, 0))
            self.pointwise = _vector(weight.flatten(1))
        self.norm, self.backend, self._spaces = norm_vectors(block.norm_out), backend, spaces

    @property
    def takes(self) -> Following:
        return Following(self.project.static_scale, rows=True)

    def forward(self, x: Tensor | Map) -> Tensor | Map:
        given = Map.of(x)
        rows = given.there
        qkv = self.project.multiply(self.project.take(given), given.dtype).flatten(1, 2)
        q, state = ops.multiscale_linear_attention(
            *(qkv, self.depthwise, self.pointwise, *rows.shape[1:3]),
            backend=self.backend,
            workspace=self._spaces(rows),
        )
        del qkv
        read = ops.linear_attention_finish(
            q, state, ATTENTION_EPS, static_scale=self.to_out.static_scale, backend=self.backend
        )
        y = self.to_out.multiply(read, given.dtype).view(rows.shape)
        return self._add_normalised(y, rows, self.norm, self.backend)


class FusedGatedConv(_Layer):
    """`GatedConv`: SiLU belongs to the first product, the middle ends in the INT8 input of the second."""

    def __init__(self, block: GatedConv, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        self.expand = _Product((block.conv_inverted,), backend)
        self.shrink = _Product((block.conv_point,), backend)
        # (channels, 1, 3, 3) to (3, 3, channels)
        self.weight = cast(Tensor, _vector(block.conv_depth.weight.squeeze(1).permute(1, 2, 0)))
        self.bias = cast(Tensor, _vector(block.conv_depth.bias))
        self.norm, self.backend = norm_vectors(block.norm), backend

    @property
    def takes(self) -> Following:
        return Following(self.expand.static_scale, rows=True)

    def forward(self, x: Tensor | Map) -> Tensor | Map:
        given = Map.of(x)
        rows = given.there
        hidden = self.expand.multiply(self.expand.take(given), given.dtype, silu=True)
        static, size = self.shrink.static_scale, rows.shape[1:3]
        mixed = ops.dwconv_glu_quantize(
            hidden.flatten(1, 2), self.weight, self.bias, *size, static, backend=self.backend
        )
        del hidden
        y = self.shrink.multiply(mixed, given.dtype).view(rows.shape)
        return self._add_normalised(y, rows, self.norm, self.backend)
