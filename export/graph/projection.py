"""The text projection as a graph: caption embeddings to every layer's cross-attention keys and values."""

from __future__ import annotations

from typing import cast

from sana_edge.export.graph import layers as graph_layers
from sana_edge.export.graph.builder import GraphBuilder, Shape, Value
from sana_edge.nets.block import RMS_EPS, Block
from sana_edge.nets.denoiser import _CAPTION_EPS, Denoiser


def add_text_projection(g: GraphBuilder, denoiser: Denoiser) -> None:
    """Make g the graph ``text_projection``, which runs once per prompt.

    Input: embeddings (1, L, caption channels). Outputs: keys (layers, 1, heads, d, L), after their norm where
    there is one; values (layers, 1, heads, L, d); constant (layers, 1, 1, dim), what tokens read of a prompt
    that is the first token alone. All are float32.

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    config = denoiser.config
    embeddings = g.cast(g.input("embeddings", (1, "L", config.caption_channels)))
    hidden = graph_layers.linear(g, "caption_expand", denoiser.caption_expand, embeddings)
    hidden = g.op("Gelu", hidden, approximate="tanh")
    hidden = graph_layers.linear(g, "caption_mix", denoiser.caption_mix, hidden)
    caption = graph_layers.rms_norm(g, "caption_norm", hidden, denoiser.caption_norm, _CAPTION_EPS)
    layers: list[tuple[Value, Value, Value]] = []
    for index, block in enumerate(cast("list[Block]", list(denoiser.blocks))):
        with g.scope(f"blocks.{index}"):
            layers.append(_read(g, block, caption))
    sides = (config.num_layers, 1, config.num_cross_attention_heads)
    d = config.cross_attention_head_dim
    shapes: dict[str, Shape] = {
        "keys": (*sides, d, "L"),
        "values": (*sides, "L", d),
        "constant": (*sides[:2], 1, config.dim),
    }
    for (name, shape), parts in zip(shapes.items(), zip(*layers, strict=True), strict=True):
        g.output(name, g.op("Concat", *parts, axis=0), shape)


def _read(g: GraphBuilder, block: Block, caption: Value) -> tuple[Value, Value, Value]:
    """One layer's share of the outputs, (1, ...) each, of projected captions (1, L, dim)."""
    with g.scope("cross_attention"):
        keys, values = g.ops(
            "Split", graph_layers.linear(g, "kv", block.cross_kv, caption), outputs=2, axis=2, num_outputs=2
        )
        # (1, 1, inner)
        first = g.op("Slice", values, g.ints(0), g.ints(1), g.ints(1))
        constant = graph_layers.linear(g, "out", block.cross_out, first)
        if block.cross_norm_k is not None:
            keys = graph_layers.rms_norm(g, "norm_k", keys, block.cross_norm_k, RMS_EPS)
        d = block.cross_q.out_features // block.cross_heads
        sides = (0, -1, block.cross_heads, d)
        transposed = g.transpose(g.reshape(keys, *sides), 0, 2, 3, 1)
        parts = (transposed, graph_layers.heads(g, values, block.cross_heads, d), constant)
        read = [g.op("Unsqueeze", part, g.ints(0)) for part in parts]
        return read[0], read[1], read[2]
