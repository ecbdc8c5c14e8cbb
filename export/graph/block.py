"""One layer of the Linear DiT as nodes of a graph; see `sana_edge.nets.block.Block`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sana_edge.export.graph import layers
from sana_edge.export.graph.builder import FLOAT16, GraphBuilder, Value
from sana_edge.nets.block import FP16_MAX, RMS_EPS, Block


@dataclass(frozen=True)
class Text:
    """What a layer reads of the text, in the graph's dtype.

    ``keys`` is (B, heads, d, L), ``values`` (B, heads, L, d), ``mask`` (B, 1, 1, L) or None. ``constant``,
    (1, 1, dim), is for guidance: what the first half of the batch reads of a negative prompt of one token.
    """

    keys: Value
    values: Value
    mask: Value | None = None
    constant: Value | None = None


def add_block(
    g: GraphBuilder,
    block: Block,
    x: Value,
    vectors: Sequence[Value],
    text: Text,
    grid: Value,
    clamp: bool,
    first: bool,
) -> Value:
    """x (B, N, dim) to the same.

    Args:
        vectors: (dim,) each: shift, scale and gate of self-attention and of Mix-FFN.
        grid: int64 (4,), the shape (0, H, W, h) of half the Mix-FFN's tokens as a map; 0 keeps B.
        clamp: limit self-attention's output to what fp16 holds, as a graph in fp16 does anyway.
        first: x is the latent itself. Where the text has a constant, x is then (1, N, dim), in both halves of
            the batch the same, and what goes out (2, N, dim).
    """
    x = _self_attention(g, block, x, vectors[:3], clamp or g.dtype == FLOAT16)
    x = _with_text(g, block, x, text, first)
    return _mix_ffn(g, block, x, vectors[3:], grid)


def _self_attention(g: GraphBuilder, block: Block, x: Value, vectors: Sequence[Value], clamp: bool) -> Value:
    shift, scale, gate = vectors
    with g.scope("attention"):
        normed = layers.norm_modulate(g, x, scale, shift, block.eps)
        qkv = layers.linear(g, "qkv", block.qkv, normed)
        q, k, v = g.ops("Split", qkv, outputs=3, axis=2, num_outputs=3)
        if block.norm_q is not None and block.norm_k is not None:
            q = layers.rms_norm(g, "norm_q", q, block.norm_q, RMS_EPS)
            k = layers.rms_norm(g, "norm_k", k, block.norm_k, RMS_EPS)
        width = block.out.in_features // block.heads
        read = g.cast(layers.relu_linear_attention(g, q, k, v, block.heads, width))
        attended = layers.linear(g, "out", block.out, read)
        if clamp:
            attended = g.op("Clip", attended, -FP16_MAX, FP16_MAX)
        return g.op("Add", x, g.op("Mul", attended, gate))


def _with_text(g: GraphBuilder, block: Block, x: Value, text: Text, shared: bool) -> Value:
    with g.scope("cross_attention"):
        if text.constant is None:
            return g.op("Add", x, _read(g, block, x, text))
        unguided, prompted = (x, x) if shared else g.ops("Split", x, outputs=2, axis=0, num_outputs=2)
        parts = (g.op("Add", unguided, text.constant), g.op("Add", prompted, _read(g, block, prompted, text)))
        return g.op("Concat", *parts, axis=0)


def _read(g: GraphBuilder, block: Block, x: Value, text: Text) -> Value:
    """What tokens x (B, N, dim) read of the text; 1 / sqrt(d) of the scores is in the weights of q."""
    inner = block.cross_q.out_features
    d = inner // block.cross_heads
    normed = block.cross_norm_q
    q = layers.linear(g, "q", block.cross_q, x, 1.0 if normed is not None else d**-0.5)
    if normed is not None:
        q = layers.rms_norm(g, "norm_q", q, normed, RMS_EPS, d**-0.5)
    q = layers.heads(g, q, block.cross_heads, d)
    read = layers.cross_attention(g, q, text.keys, text.values, text.mask)
    return layers.linear(g, "out", block.cross_out, layers.merged(g, read, inner))


def _mix_ffn(g: GraphBuilder, block: Block, x: Value, vectors: Sequence[Value], grid: Value) -> Value:
    """Value and gate are products of their own: taking them from one would cost a copy."""
    shift, scale, gate = vectors
    half = block.project.in_features
    with g.scope("ffn"):
        normed = layers.norm_modulate(g, x, scale, shift, block.eps)
        prepared = layers.prepare(g, "expand", block.expand, normed)
        halves = []
        for name, part in (("value", slice(0, half)), ("gate", slice(half, 2 * half))):
            hidden = layers.columns(g, name, block.expand, prepared, part)
            with g.scope(name):
                halves.append(layers.silu_depthwise(g, hidden, block.depthwise, part, grid))
        mixed = g.op("Mul", halves[0], layers.silu(g, halves[1]))
        tokens = g.reshape(g.transpose(mixed, 0, 2, 3, 1), 0, -1, half)
        projected = layers.linear(g, "project", block.project, tokens)
        return g.op("Add", x, g.op("Mul", projected, gate))
