"""EfficientViT's block on the fused INT8 operations: nine launches of nothing but the library's kernels.

Of a block only its input, q, k and v, q of both scales and what its products give are ever written.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.fused.decoder_maps import WIDEST_NORM, Following, Layer, Map, Workspaces, norm_vectors, vector
from sana_edge.int8.conv import W8A8Conv2d
from sana_edge.int8.feature_maps import ChannelNorm
from sana_edge.int8.linear import W8A8Linear
from sana_edge.nets.efficient_vit import ATTENTION_EPS, GatedConv, LinearAttention

# of csrc/multiscale_linear_attention.cu
HEAD_DIM, MIXED_KERNEL = 32, 5


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
        self.bias = vector(torch.cat(biases)) if biases else None
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


class FusedAttention(Layer):
    """`LinearAttention` in five launches: q, k and v; both scales' sums; the read; its product; the norm."""

    def __init__(self, block: LinearAttention, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        self.project = _Product((block.to_q, block.to_k, block.to_v), backend)
        self.to_out = _Product((block.to_out,), backend)
        self.depthwise = self.pointwise = None
        for scale in block.to_qkv_multiscale:
            taps, weight = (cast(nn.Conv2d, conv).weight for conv in (scale.proj_in, scale.proj_out))
            # (channels, 1, 5, 5) to (5, 5, channels); (channels, 32, 1, 1) to (channels, 32)
            self.depthwise = vector(taps.squeeze(1).permute(1, 2, 0))
            self.pointwise = vector(weight.flatten(1))
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


class FusedGatedConv(Layer):
    """`GatedConv`: SiLU belongs to the first product, the middle ends in the INT8 input of the second."""

    def __init__(self, block: GatedConv, backend: str, spaces: Workspaces) -> None:
        super().__init__()
        self.expand = _Product((block.conv_inverted,), backend)
        self.shrink = _Product((block.conv_point,), backend)
        # (channels, 1, 3, 3) to (3, 3, channels)
        self.weight = block.conv_depth.weight.detach().squeeze(1).permute(1, 2, 0).contiguous()
        self.bias = cast(Tensor, vector(block.conv_depth.bias))
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
