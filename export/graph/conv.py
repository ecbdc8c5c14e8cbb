"""Convolutions, norms and blocks of the DC-AE as nodes of a graph, on (B, C, H, W) values.

Engines choose their own memory layout: with OpenVINO on a CPU maps lie channels last between the
convolutions, and what is done to each value runs in one pass after them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.errors import CheckpointError
from sana_edge.export.graph.builder import FLOAT, GraphBuilder, Value
from sana_edge.export.graph.layers import silu
from sana_edge.int8.conv import PhaseConv2d, W8A8Conv2d, W8A8PhaseConv2d, phase_kernels
from sana_edge.int8.feature_maps import NORM_EPS, ChannelNorm
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample

# top, left, bottom, right of a 2x2 kernel: its phase's outputs cover samples t - 1 and t, or t and t + 1
_PHASE_PADS = tuple([1 - row, 1 - column, row, column] for row in range(2) for column in range(2))


def conv(g: GraphBuilder, name: str, layer: nn.Module, x: Value) -> Value:
    """A float or INT8 convolution of stride 1, (B, in, H, W) to (B, out, H, W); float ones may have groups.

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    with g.scope(name):
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        return product(g, quantized_input(g, layer, x), *parameters(layer), groups=groups)


def quantized_input(g: GraphBuilder, layer: nn.Module, x: Value) -> Value:
    """What the products of a layer read: x, through Q/DQ if the layer is INT8, and the graph's activations.

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    if not is_int8(layer) or not g.int8_activations:
        return x
    scale = layer.input_scale
    if not isinstance(scale, Tensor):
        raise CheckpointError(
            f"a layer with {layer.extra_repr()} has no input_scale, which a graph needs",
            "calibrate with sana-edge quantize",
        )
    return g.quantized(x, float(scale))


def is_int8(layer: nn.Module) -> bool:
    """Whether a layer's weight is INT8, with ``weight_scale`` and perhaps ``input_scale``."""
    return hasattr(layer, "weight_scale")


def parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight as it is stored, its scales if it is INT8, bias if there is one."""
    if isinstance(layer, W8A8Conv2d | W8A8PhaseConv2d):
        # out of the memory order that its products are fastest in
        layer.unpack()
    weight, scales, bias = layer.weight, getattr(layer, "weight_scale", None), layer.bias
    assert isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor))
    return weight, scales, bias


def product(
    g: GraphBuilder,
    x: Value,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    *,
    pads: list[int] | None = None,
    groups: int = 1,
    stride: int = 1,
) -> Value:
    """Conv with a weight (out, in, k, k), INT8 with ``scales`` (out,); padded to keep H and W by default."""
    side = weight.shape[-1]
    strides: dict[str, Any] = {} if stride == 1 else {"strides": [stride, stride]}
    read = g.weight("weight", weight) if scales is None else g.int8_weight(weight, scales, axis=0)
    return g.op(
        "Conv",
        x,
        read,
        None if bias is None else g.weight("bias", bias),
        kernel_shape=[side, side],
        pads=pads or [side // 2] * 4,
        group=groups,
        **strides,
    )


def channel_norm(g: GraphBuilder, name: str, norm: ChannelNorm, x: Value) -> Value:
    """RMS normalisation over the channels with scale and offset, fp32 inside; x's dtype out."""
    with g.scope(name):
        wide = g.cast(x, FLOAT)
        # Pow: OpenVINO 2026.4 scales an INT8 product twice that is multiplied by itself
        mean = g.op("ReduceMean", g.op("Pow", wide, 2.0), g.ints(1), keepdims=1)
        normed = g.op("Div", wide, g.op("Sqrt", g.op("Add", mean, NORM_EPS)))
        scaled = g.op("Mul", normed, g.weight("weight", norm.weight[:, None, None], FLOAT))
        return g.cast(g.op("Add", scaled, g.weight("bias", norm.bias[:, None, None], FLOAT)), x.dtype)


def activation(g: GraphBuilder, kind: str, x: Value) -> Value:
    """A name of `autoencoder_blocks.ACTIVATIONS`, "silu" or "relu"."""
    return silu(g, x) if kind == "silu" else g.op("Relu", x)


def res_block(g: GraphBuilder, block: ResBlock, x: Value, kind: str) -> Value:
    """`ResBlock` with the activation ``kind``."""
    hidden = activation(g, kind, conv(g, "conv1", block.conv1, x))
    return g.op("Add", x, channel_norm(g, "norm", block.norm, conv(g, "conv2", block.conv2, hidden)))


def upsample(g: GraphBuilder, up: Upsample, x: Value) -> Value:
    """`Upsample`, (B, in, H, W) to (B, out, 2 H, 2 W).

    All four phases (even or odd row, even or odd column) of a channel are computed side by side, those of
    nearest-neighbour doubling from 2x2 kernels: that is 16/36 of the products, and the only form in which
    the INT8 weights are exact. The channels come phase by phase, so that interleaving moves whole runs of
    them. The shortcut is 1 added to a float kernel; steps of INT8 are too wide for it.
    """
    with g.scope("conv"):
        packed = _phases(g, up, x)
    if up.repeats and is_int8(up.conv):
        # channels last, as maps lie in memory next to INT8 products
        sources = g.weight("shortcut", _sources(up).flatten())
        picked = g.op("Gather", g.transpose(x, 0, 2, 3, 1), sources, axis=3)
        packed = g.op("Add", packed, g.transpose(picked, 0, 3, 1, 2))
    return g.op("DepthToSpace", packed, blocksize=2, mode="DCR")


def _phases(g: GraphBuilder, up: Upsample, x: Value) -> Value:
    """(B, in, H, W) to (B, 4 out, H, W), phase by phase; with the shortcut if the layer is float."""
    weight, scales, bias = parameters(up.conv)
    read = quantized_input(g, up.conv, x)
    if not isinstance(up.conv, PhaseConv2d | W8A8PhaseConv2d):
        # stored channel by channel
        order = torch.arange(4 * up.out_channels).view(-1, 4).t().flatten()
        picked = (None if tensor is None else tensor[order] for tensor in (scales, bias))
        return product(g, read, _with_shortcut(up, weight[order], None), *picked)
    kernels = phase_kernels(weight) if scales is None else list(weight)
    columns = [None] * 4 if scales is None else list(scales)
    phases = [
        product(g, read, _with_shortcut(up, kernel, n), columns[n], bias, pads=_PHASE_PADS[n])
        for n, kernel in enumerate(kernels)
    ]
    return g.op("Concat", *phases, axis=1)


def _with_shortcut(up: Upsample, kernel: Tensor, phase: int | None) -> Tensor:
    """A float kernel of a phase (out, in, 2, 2), or of all (4 out, in, 3, 3), plus 1 at the sample itself."""
    if not up.repeats or is_int8(up.conv):
        return kernel
    sources = _sources(up).flatten() if phase is None else _sources(up)[phase]
    row, column = (1, 1) if phase is None else _PHASE_PADS[phase][:2]
    kernel = kernel.detach().float().clone()
    kernel[torch.arange(len(kernel)), sources, row, column] += 1
    return kernel


def _sources(up: Upsample) -> Tensor:
    """(4, out): out channel c of phase n repeats channel (4 c + n) // repeats."""
    return (4 * torch.arange(up.out_channels) + torch.arange(4)[:, None]) // up.repeats
