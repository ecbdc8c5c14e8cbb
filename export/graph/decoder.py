"""A decoder, the DC-AE's or a tiny one, as a graph: latent, as a sampler leaves it, to pixels."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn

from sana_edge.export.graph.builder import FLOAT, GraphBuilder, Value
from sana_edge.export.graph.conv import (
    activation,
    channel_norm,
    conv,
    parameters,
    product,
    quantized_input,
    res_block,
    upsample,
)
from sana_edge.export.graph.layers import silu
from sana_edge.nets.autoencoder import Autoencoder, LatentDecoder
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.efficient_vit import ATTENTION_EPS, EfficientViTBlock, GatedConv, LinearAttention
from sana_edge.nets.tiny_autoencoder import CLAMP, TinyAutoencoder, TinyBlock

# height and width of a latent
Size = tuple[int, int]


def add_decoder(g: GraphBuilder, autoencoder: LatentDecoder, size: Size | None = None) -> None:
    """Make g the graph ``decoder``.

    Input: latent (1, C, h, w) float32, as the sampler leaves it. Output: pixels (1, 3, f h, f w) float32,
    about [-1, 1]. An INT8 decoder's products read Q/DQ of their calibrated scales.

    Args:
        size: of the latent, for a graph of this size only; None for any.

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    config = autoencoder.config
    cell = config.spatial_compression
    latent = g.input("latent", (1, config.latent_channels, *(size or ("h", "w"))))
    x = enter(g, autoencoder, latent)
    for stage in reversed(range(int(math.log2(cell)) + 1)):
        x = add_stage(g, autoencoder, stage, x)
    sides = (cell * size[0], cell * size[1]) if size else (f"{cell}*h", f"{cell}*w")
    g.output("pixels", leave(g, autoencoder, x), (1, config.in_channels, *sides))


def enter(g: GraphBuilder, autoencoder: LatentDecoder, latent: Value) -> Value:
    """The latent through the scaling factor, the first convolution and its shortcut."""
    x = g.op("Div", latent, autoencoder.config.scaling_factor)
    if isinstance(autoencoder, TinyAutoencoder):
        return _enter_tiny(g, autoencoder, x)
    decoder = _dc_ae(autoencoder).decoder
    # after what would overflow in 16 bit
    x = g.cast(x)
    with g.scope("decoder"):
        hidden = conv(g, "conv_in", decoder.conv_in, x)
        if not decoder.repeats:
            return hidden
        source = torch.arange(decoder.conv_in.out_channels) // decoder.repeats
        return g.op("Add", hidden, g.op("Gather", x, g.weight("shortcut", source), axis=1))


def add_stage(g: GraphBuilder, autoencoder: LatentDecoder, stage: int, x: Value) -> Value:
    """x through a stage, which doubles its rows and columns first unless it is the deepest.

    Stages are numbered from the highest resolution, which is 0.
    """
    if isinstance(autoencoder, TinyAutoencoder):
        return _add_tiny_stage(g, autoencoder, stage, x)
    known = _dc_ae(autoencoder)
    kind = known.config.decoder_act_fns[stage]
    for index, block in enumerate(known.decoder.up_blocks[stage].children()):
        with g.scope(f"decoder.up_blocks.{stage}.{index}"):
            if isinstance(block, Upsample):
                x = upsample(g, block, x)
            elif isinstance(block, ResBlock):
                x = res_block(g, block, x, kind)
            else:
                assert isinstance(block, EfficientViTBlock)
                x = efficient_vit(g, block, x)
    return x


def leave(g: GraphBuilder, autoencoder: LatentDecoder, x: Value) -> Value:
    """The last norm, activation and convolution."""
    if isinstance(autoencoder, TinyAutoencoder):
        return _leave_tiny(g, autoencoder, x)
    decoder, kind = _dc_ae(autoencoder).decoder, _dc_ae(autoencoder).config.decoder_conv_act_fn
    with g.scope("decoder"):
        x = channel_norm(g, "norm_out", decoder.norm_out, x)
        x = activation(g, kind, x)
        if not isinstance(decoder.conv_out, Upsample):
            return conv(g, "conv_out", decoder.conv_out, x)
        with g.scope("conv_out"):
            return upsample(g, decoder.conv_out, x)


def _dc_ae(autoencoder: LatentDecoder) -> Autoencoder:
    assert isinstance(autoencoder, Autoencoder)
    return autoencoder


def _enter_tiny(g: GraphBuilder, autoencoder: TinyAutoencoder, x: Value) -> Value:
    bent = g.op("Mul", g.op("Tanh", g.op("Div", x, CLAMP)), CLAMP)
    with g.scope("decoder"):
        hidden = conv(g, "layers.0", autoencoder.layers[0], g.cast(bent))
    return activation(g, autoencoder.config.act_fn, hidden)


def _add_tiny_stage(g: GraphBuilder, autoencoder: TinyAutoencoder, stage: int, x: Value) -> Value:
    for index in autoencoder.stage(stage):
        layer = autoencoder.layers[index]
        with g.scope(f"decoder.layers.{index}"):
            if isinstance(layer, TinyBlock):
                x = _tiny_block(g, layer, x, autoencoder.config.act_fn)
            else:
                x = upsample(g, Upsample.around(layer), x)
    return x


def _tiny_block(g: GraphBuilder, block: TinyBlock, x: Value, kind: str) -> Value:
    hidden = x
    for name in ("0", "2"):
        hidden = activation(g, kind, conv(g, f"conv.{name}", block.conv[name], hidden))
    return g.op("Relu", g.op("Add", x, conv(g, "conv.4", block.conv["4"], hidden)))


def _leave_tiny(g: GraphBuilder, autoencoder: TinyAutoencoder, x: Value) -> Value:
    last = len(autoencoder.layers) - 1
    with g.scope("decoder"):
        x = g.cast(conv(g, f"layers.{last}", autoencoder.layers[last], x), FLOAT)
    # from 0 to 1
    return g.op("Sub", g.op("Mul", x, 2.0), 1.0)


def efficient_vit(g: GraphBuilder, block: EfficientViTBlock, x: Value) -> Value:
    """`EfficientViTBlock`, (B, C, H, W)."""
    with g.scope("attn"):
        x = _linear_attention(g, block.attn, x)
    with g.scope("conv_out"):
        return _gated_conv(g, block.conv_out, x)


def _linear_attention(g: GraphBuilder, attention: LinearAttention, x: Value) -> Value:
    """`LinearAttention`: linear layers as 1x1 convolutions, heads (B, heads, d, N)."""
    layers = (attention.to_q, attention.to_k, attention.to_v)
    with g.scope("to_qkv"):
        # q, k and v of one input are one product, whose input to_q quantizes
        weights, scales, _ = zip(*map(parameters, layers), strict=True)
        columns = None if scales[0] is None else torch.cat(scales)
        weight = torch.cat(weights)[:, :, None, None]
        qkv = product(g, quantized_input(g, layers[0], x), weight, columns, None)
    maps = [qkv]
    for index, project in enumerate(attention.to_qkv_multiscale):
        with g.scope(f"to_qkv_multiscale.{index}"):
            wider = conv(g, "proj_in", cast(nn.Module, project.proj_in), qkv)
            maps.append(conv(g, "proj_out", cast(nn.Module, project.proj_out), wider))
    # joined before attention: OpenVINO 2026.4 quantizes a Concat wrongly
    read = _attend(g, qkv if len(maps) == 1 else g.op("Concat", *maps, axis=1), attention.head_dim, x)
    with g.scope("to_out"):
        weight, columns, _ = parameters(attention.to_out)
        out = product(g, quantized_input(g, attention.to_out, read), weight[:, :, None, None], columns, None)
    return g.op("Add", x, channel_norm(g, "norm_out", attention.norm_out, out))


def _attend(g: GraphBuilder, qkv: Value, width: int, like: Value) -> Value:
    """ReLU linear attention, fp32 inside: (B, 3 C, H, W) to (B, C, H, W), heads of ``width``.

    Every 3 width channels in a row are the q, k and v of a head, also where that joins what were projected as
    q, k and v. Few tokens have no form of their own: only rounding differs.
    """
    heads = g.reshape(qkv, 0, -1, 3 * width, g.op("Mul", g.side(qkv, 2), g.side(qkv, 3)))
    q, k, v = g.ops("Split", heads, outputs=3, axis=2, num_outputs=3)
    q, k, v = g.cast(g.op("Relu", q), FLOAT), g.cast(g.op("Relu", k), FLOAT), g.cast(v, FLOAT)
    # (B, heads, d, d) and (B, heads, 1, d)
    state = g.op("MatMul", v, g.transpose(k, 0, 1, 3, 2), name="state")
    total = g.transpose(g.op("ReduceSum", k, g.ints(3), keepdims=1), 0, 1, 3, 2)
    divisor = g.op("Add", g.op("MatMul", total, q, name="divisor"), ATTENTION_EPS)
    out = g.cast(g.op("Div", g.op("MatMul", state, q, name="read"), divisor), like.dtype)
    return g.reshape(out, 0, -1, g.side(like, 2), g.side(like, 3))


def _gated_conv(g: GraphBuilder, block: GatedConv, x: Value) -> Value:
    expanded = silu(g, conv(g, "conv_inverted", block.conv_inverted, x))
    value, gate = g.ops(
        "Split", conv(g, "conv_depth", block.conv_depth, expanded), outputs=2, axis=1, num_outputs=2
    )
    out = conv(g, "conv_point", block.conv_point, g.op("Mul", value, silu(g, gate)))
    return g.op("Add", x, channel_norm(g, "norm", block.norm, out))
