"""The DC-AE's encoder as a graph: pixels to the latent that a sampler starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana_edge.export.graph.builder import FLOAT, GraphBuilder, Value
from sana_edge.export.graph.conv import product, res_block
from sana_edge.export.graph.decoder import efficient_vit
from sana_edge.nets.autoencoder import Encoder
from sana_edge.nets.autoencoder_blocks import Downsample, ResBlock
from sana_edge.nets.efficient_vit import EfficientViTBlock


def add_encoder(g: GraphBuilder, encoder: Encoder, scaling_factor: float) -> None:
    """Make g the graph ``encoder``.

    Input: pixels (1, 3, H, W) float32 in [-1, 1], sides of whole cells. Output: latent (1, C, h, w) float32,
    times ``scaling_factor``. An INT8 encoder is not calibrated: g is without ``int8_activations`` then.
    """
    x = g.cast(g.input("pixels", (1, 3, "height", "width")))
    with g.scope("encoder"):
        with g.scope("conv_in"):
            first = encoder.conv_in
            x = _downsample(g, first, x) if isinstance(first, Downsample) else _conv(g, first, x)
        for stage, blocks in enumerate(encoder.down_blocks):
            for index, block in enumerate(blocks.children()):
                with g.scope(f"down_blocks.{stage}.{index}"):
                    x = _block(g, block, x)
        with g.scope("conv_out"):
            x = _conv(g, encoder.conv_out, x, encoder.group)
    latent = g.op("Mul", g.cast(x, FLOAT), scaling_factor)
    g.output("latent", latent, (1, encoder.conv_out.out_channels, "h", "w"))


def _block(g: GraphBuilder, block: nn.Module, x: Value) -> Value:
    if isinstance(block, Downsample):
        return _downsample(g, block, x)
    if isinstance(block, ResBlock):
        return res_block(g, block, x, "silu")
    assert isinstance(block, EfficientViTBlock)
    return efficient_vit(g, block, x)


def _conv(g: GraphBuilder, layer: nn.Module, x: Value, group: int = 0) -> Value:
    """A 3x3 convolution; the average of every ``group`` channels is added in its kernel."""
    assert isinstance(layer, nn.Conv2d)
    kernel = layer.weight.detach().float().clone()
    if group:
        for out in range(len(kernel)):
            kernel[out, out * group : (out + 1) * group, 1, 1] += 1 / group
    return product(g, x, kernel, None, layer.bias)


def _downsample(g: GraphBuilder, down: Downsample, x: Value) -> Value:
    """`Downsample` as one convolution of stride 2: (B, in, H, W) to (B, out, H/2, W/2).

    Its kernels see rows 2 y - 1 to 2 y + 2. Where channels are unshuffled, out channel 4 c + 2 i + j is
    channel c of the stride 1 convolution at (2 y + i, 2 x + j), where the shortcut averages samples.
    """
    weight, bias = down.conv.weight.detach().float(), down.conv.bias
    if down.unshuffle:
        kernel = weight.new_zeros(4 * len(weight), weight.shape[1], 4, 4)
        for i in range(2):
            for j in range(2):
                kernel[2 * i + j :: 4, :, i : i + 3, j : j + 3] = weight
        bias = None if bias is None else bias.repeat_interleave(4)
    else:
        kernel = torch.nn.functional.pad(weight, (0, 1, 0, 1))
    if down.group:
        _add_average(kernel, down.group)
    return product(g, x, kernel, None, bias, pads=[1, 1, 1, 1], stride=2)


def _add_average(kernel: Tensor, group: int) -> None:
    for out in range(len(kernel)):
        for unshuffled in range(out * group, (out + 1) * group):
            channel, place = divmod(unshuffled, 4)
            kernel[out, channel, 1 + place // 2, 1 + place % 2] += 1 / group
