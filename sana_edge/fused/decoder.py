"""An INT8 decoder on the fused operations: a block keeps its maps in INT8 between its convolutions.

What a convolution is followed by is part of it, so that of a residual block's maps only its input, both INT8
inputs of its convolutions and its output are ever written. Layers that are not INT8, or whose shapes the
operations do not have, stay the modules that they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.errors import InvalidInput
from sana_edge.fused import ops as fused_ops
from sana_edge.int8 import ops
from sana_edge.int8.conv import W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.feature_maps import NORM_EPS, add, nchw, nhwc
from sana_edge.int8.linear import Quantized, W8A8Linear
from sana_edge.kernels.reference_conv import Activation, Upsampling
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.efficient_vit import GatedConv, LinearAttention

# csrc/w8a8_conv2d.cu has all columns of this many channels in one tile
NORM_CHANNELS = 256
# of one sum, in kernel · kernel · channels
_LARGEST_DEPTH = 131071
M = TypeVar("M", bound=nn.Module)
_ACTIVATIONS: Mapping[Any, Activation] = {F.silu: "silu", F.relu: "relu"}


def fuse_decoder(autoencoder: Autoencoder, backend: str = "cuda") -> Autoencoder:
    """A decoder that computes the same on ``backend``, "cuda" or "torch" (the definition, slow).

    It shares what is not INT8 with ``autoencoder``, has its own order of INT8 weights, no gradients and no
    encoder, and stays on its device and in its 16-bit dtype.

    Raises:
        InvalidInput: the dtype has not 16 bits.
    """
    dtype = autoencoder.decoder.norm_out.weight.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInput(f"a fused decoder in {dtype}", "convert the decoder to float16 or bfloat16")
    fused = _with_children(autoencoder, {"decoder": _fused(autoencoder.decoder, backend)})
    fused.encoder = None
    fused.whole_maps = True
    return fused


def _fused(module: nn.Module, backend: str) -> nn.Module:
    if isinstance(module, ResBlock) and _fits(module.conv1) and _fits(module.conv2):
        return FusedResBlock(module, backend)
    if isinstance(module, Upsample) and _fits(module.conv):
        return FusedUpsample(module, backend)
    if isinstance(module, LinearAttention) and _rows_fit(
        module.to_q, module.to_k, module.to_v, module.to_out
    ):
        return FusedAttention(module, backend)
    if isinstance(module, GatedConv) and _gate_fits(module):
        return FusedGatedConv(module, backend)
    if isinstance(module, W8A8Conv2d) and _fits(module):
        return FusedConv2d(module, backend)
    children = {name: _fused(child, backend) for name, child in module.named_children()}
    return _with_children(module, children) if children else module


def _with_children(module: M, children: Mapping[str, nn.Module]) -> M:
    """A module that shares everything but these children."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone


def _fits(layer: nn.Module) -> bool:
    """Whether `_Convolution` has a layer; a 1x1 kernel whose scales are per pixel is a linear layer."""
    if not isinstance(layer, W8A8Conv2d | W8A8PhaseConv2d) or layer.in_channels % 16:
        return False
    kernel = 2 if isinstance(layer, W8A8PhaseConv2d) else 2 * layer.padding + 1
    scaled = kernel > 1 or layer.input_scale is not None
    return kernel <= 3 and scaled and kernel * kernel * layer.in_channels <= _LARGEST_DEPTH


def _rows_fit(*layers: nn.Module) -> bool:
    """Whether `_Product` has layers."""
    return all(
        isinstance(layer, W8A8Linear | W8A8Conv2d)
        and layer.weight_scale.shape[0] % 8 == 0
        and (layer.in_features if isinstance(layer, W8A8Linear) else layer.in_channels) % 16 == 0
        for layer in layers
    )


def _gate_fits(block: GatedConv) -> bool:
    return _rows_fit(block.conv_inverted, block.conv_point) and block.conv_depth.bias is not None


def _vector(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


class _Convolution:
    """An INT8 convolution of the fused kind, on maps (B, H, W, C)."""

    def __init__(
        self, layer: W8A8Conv2d | W8A8PhaseConv2d, backend: str, upsample: Upsampling = "none"
    ) -> None:
        layer.unpack()
        # (..., in, k, k) to (..., k, k, in)
        self.weight = layer.weight.movedim(-3, -1).contiguous()
        self.weight_scales = layer.weight_scale.flatten().contiguous()
        self.bias = _vector(layer.bias)
        self.input_scale = layer.input_scale
        self.upsample, self.backend = upsample, backend

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """INT8 values of a map and its scale () fp32, NaN where the map is not finite."""
        if self.input_scale is None:
            values, scale = ops.quantize_map(nchw(x))
            return nhwc(values).contiguous(), scale
        values, scales = fused_ops.quantize_rows(x.contiguous(), self.input_scale, backend=self.backend)
        return values, scales.amax()

    @property
    def product(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What all convolutions take of it."""
        return self.weight, self.weight_scales, self.bias

    def __call__(
        self,
        values: Tensor,
        scale: Tensor,
        dtype: torch.dtype,
        *,
        activation: Activation = "identity",
        shortcut: Tensor | None = None,
        repeats: int = 1,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = fused_ops.w8a8_conv2d(
            *(values, scale, *self.product, dtype),
            backend=self.backend,
            upsample=self.upsample,
            activation=activation,
            shortcut=shortcut,
            repeats=repeats,
            out_scale=out_scale,
        )
        return out


class FusedConv2d(nn.Module):
    """A convolution that nothing was fused with; the interface of `W8A8Conv2d`."""

    def __init__(self, layer: W8A8Conv2d, backend: str) -> None:
        super().__init__()
        self.product = _Convolution(layer, backend)

    def prepare(self, x: Tensor) -> Quantized:
        """As `W8A8Conv2d.prepare`, with one scale also for 1x1 kernels."""
        values, scale = self.product.quantize(nhwc(x))
        return Quantized(nchw(values), scale, x.dtype)

    def convolve(self, prepared: Quantized) -> Tensor:
        """As `W8A8Conv2d.convolve`."""
        return nchw(self.product(nhwc(prepared.values).contiguous(), prepared.scales, prepared.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(self.prepare(x))


class FusedResBlock(nn.Module):
    """`ResBlock`: the first convolution ends in the INT8 input of the second, that in the block's output."""

    def __init__(self, block: ResBlock, backend: str) -> None:
        super().__init__()
        conv1, conv2 = cast(W8A8Conv2d, block.conv1), cast(W8A8Conv2d, block.conv2)
        self.conv1, self.conv2 = _Convolution(conv1, backend), _Convolution(conv2, backend)
        self.activation = _ACTIVATIONS[block.activation]
        self.norm = block.norm
        self.weight, self.bias = _vector(block.norm.weight), _vector(block.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = nhwc(x).contiguous()
        values, scale = self.conv1.quantize(rows)
        next_scale = self.conv2.input_scale
        hidden = self.conv1(values, scale, x.dtype, activation=self.activation, out_scale=next_scale)
        del values
        if next_scale is None:
            hidden, next_scale = self.conv2.quantize(hidden)
        if x.shape[1] > NORM_CHANNELS:
            return add(nchw(rows), self.norm(nchw(self.conv2(hidden, next_scale, x.dtype))))
        fused_ops.w8a8_conv2d(
            *(hidden, next_scale, *self.conv2.product, rows.dtype),
            backend=self.conv2.backend,
            norm_weight=self.weight,
            norm_bias=self.bias,
            norm_eps=NORM_EPS,
            residual=rows,
            out=rows,
        )
        return nchw(rows)


class FusedUpsample(nn.Module):
    """`Upsample`: all four corners and the shortcut in one launch."""

    def __init__(self, block: Upsample, backend: str) -> None:
        super().__init__()
        conv = cast(W8A8Conv2d | W8A8PhaseConv2d, block.conv)
        upsample: Upsampling = "phases" if isinstance(conv, W8A8PhaseConv2d) else "shuffle"
        self.conv = _Convolution(conv, backend, upsample)
        self.repeats = block.repeats

    def forward(self, x: Tensor) -> Tensor:
        rows = nhwc(x).contiguous()
        values, scale = self.conv.quantize(rows)
        shortcut = rows if self.repeats else None
        return nchw(self.conv(values, scale, x.dtype, shortcut=shortcut, repeats=self.repeats or 1))


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

    def forward(self, x: Tensor, *, silu: bool = False) -> Tensor:
        values, scales = fused_ops.quantize_rows(x.contiguous(), self.static_scale, backend=self.backend)
        return self.multiply(values, scales, x.dtype, silu=silu)

    def multiply(self, values: Tensor, scales: Tensor, dtype: torch.dtype, *, silu: bool = False) -> Tensor:
        """Of rows that are INT8 already."""
        rows = (values.flatten(0, -2), scales.flatten())
        operands = (*rows, self.weight, self.weight_scales, self.bias)
        out: Tensor = fused_ops.w8a8_linear(*operands, dtype, backend=self.backend, silu=silu)
        return out.view(*values.shape[:-1], len(self.weight))


class FusedAttention(LinearAttention):
    """`LinearAttention` whose projections are `_Product`s."""

    def __init__(self, block: LinearAttention, backend: str) -> None:
        nn.Module.__init__(self)
        self.head_dim = block.head_dim
        self.project = _Product((block.to_q, block.to_k, block.to_v), backend)
        self.to_out = _Product((block.to_out,), backend)  # type: ignore[assignment]
        self.to_qkv_multiscale = block.to_qkv_multiscale
        self.norm_out = block.norm_out

    def _qkv(self, x: Tensor) -> Tensor:
        projected: Tensor = self.project(x)
        return projected


class FusedGatedConv(nn.Module):
    """`GatedConv`: SiLU belongs to the first product, the middle ends in the INT8 input of the second."""

    def __init__(self, block: GatedConv, backend: str) -> None:
        super().__init__()
        self.expand = _Product((block.conv_inverted,), backend)
        self.shrink = _Product((block.conv_point,), backend)
        # (channels, 1, 3, 3) to (3, 3, channels)
        self.weight = block.conv_depth.weight.detach().float().squeeze(1).permute(1, 2, 0).contiguous()
        self.bias = cast(Tensor, _vector(block.conv_depth.bias))
        self.norm, self.backend = block.norm, backend

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(nhwc(x), silu=True)
        height, width = hidden.shape[1:3]
        static = self.shrink.static_scale
        values, scales = fused_ops.dwconv_glu_quantize(
            hidden.flatten(1, 2), self.weight, self.bias, height, width, static, backend=self.backend
        )
        out = self.shrink.multiply(values, scales, x.dtype).view(-1, height, width, x.shape[1])
        return add(x, self.norm(nchw(out)))
