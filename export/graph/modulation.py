"""What a step computes before its layers, as nodes of a graph: modulation vectors and positions."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from sana_edge.export.graph import layers as graph_layers
from sana_edge.export.graph.builder import FLOAT, INT64, GraphBuilder, Value
from sana_edge.nets.block import Block
from sana_edge.nets.denoiser import _FREQUENCIES, _MAX_PERIOD, Denoiser, Embedder


def modulation(
    g: GraphBuilder, denoiser: Denoiser, timestep: Value, guidance: Value | None
) -> tuple[Value, Value]:
    """Vectors of a timestep (1,): (6 · layers, dim) of all layers, (2, dim) of the head.

    They are what `Denoiser.modulation` gives, in the graph's dtype, with ones and smoothing in them.
    """
    config = denoiser.config
    if guidance is None:
        embedded = _embed(g, "time", denoiser.time, timestep, config.timestep_scale)
    else:
        assert denoiser.guidance is not None
        of_guidance = _embed(g, "guidance", denoiser.guidance, guidance, config.guidance_embeds_scale)
        embedded = g.op("Add", _embed(g, "time", denoiser.time, timestep, 1.0), of_guidance)
    shared = graph_layers.linear(g, "modulate", denoiser.modulate, graph_layers.silu(g, embedded))
    shared = g.reshape(g.cast(shared, FLOAT), 1, 6, config.dim)
    tables = torch.stack([cast(Block, block).table.detach().float() for block in denoiser.blocks])
    blocks = g.op("Add", shared, g.weight("tables", _one_added(tables, 1, 4), FLOAT))
    if denoiser.smoothing is not None:
        blocks = g.op("Mul", blocks, g.weight("smoothing", _reciprocals(denoiser.smoothing), FLOAT))
    table = g.weight("table", _one_added(denoiser.table.detach().float(), 1), FLOAT)
    head = g.op("Add", g.cast(embedded, FLOAT), table)
    return g.cast(g.reshape(blocks, -1, config.dim)), g.cast(head)


def positions(g: GraphBuilder, denoiser: Denoiser, height: Value | int, width: Value | int) -> Value:
    """What is added to the tokens of 2K and 4K models: (1, height · width, dim) fp32.

    Args:
        height, width: of the latent: numbers, whose sines are stored, or int64 (1,).
    """
    half = denoiser.config.dim // 2
    if isinstance(height, int) and isinstance(width, int):
        table = denoiser.positions(height, width)
        assert table is not None
        columns = g.weight("columns", table[:width, :half], FLOAT)
        rows = g.weight("rows", table[::width, half:], FLOAT)
    else:
        assert isinstance(height, Value) and isinstance(width, Value)
        columns, rows = _waves(g, denoiser, width), _waves(g, denoiser, height)
    shape = g.join(height, width, half)
    # (height, width, half) each
    left = g.op("Expand", columns, shape)
    right = g.op("Expand", g.reshape(rows, -1, 1, half), shape)
    return g.reshape(g.op("Concat", left, right, axis=2), 1, -1, 2 * half)


def _embed(g: GraphBuilder, name: str, embedder: Embedder, number: Value, factor: float) -> Value:
    """The sinusoid of a number (1,) times a factor through its layers: (1, dim) in the graph's dtype.

    Angles are fp32. What is left of full turns comes first, in one operation on the graph's input: OpenVINO
    computing in bf16 rounds everything after that, and 999 would be 1000.
    """
    exponents = torch.arange(_FREQUENCIES, dtype=torch.float32) / _FREQUENCIES
    frequencies = torch.exp(-math.log(_MAX_PERIOD) * exponents).double() * factor
    with g.scope(name):
        turned = g.op("Mod", number, g.weight("periods", 2 * math.pi / frequencies, FLOAT), fmod=1)
        angles = g.op("Mul", turned, g.weight("frequencies", frequencies, FLOAT))
        waves = g.op("Concat", g.op("Cos", angles), g.op("Sin", angles), axis=0)
        hidden = graph_layers.linear(g, "expand", embedder.expand, g.reshape(g.cast(waves), 1, -1))
        return graph_layers.linear(g, "mix", embedder.mix, graph_layers.silu(g, hidden))


def _waves(g: GraphBuilder, denoiser: Denoiser, length: Value) -> Value:
    """The sinusoids of a side, (length, dim / 2) fp32: the native grid is spanned, whatever the length."""
    config = denoiser.config
    quarter = config.dim // 4
    places = g.op("Range", g.constant(0, INT64), g.op("Squeeze", length, g.ints(0)), g.constant(1, INT64))
    spacing = g.op("Div", g.cast(length, FLOAT), float(config.sample_size))
    at = g.op("Div", g.cast(places, FLOAT), spacing)
    at = g.op("Div", at, config.interpolation_scale or 1.0)
    exponents = torch.arange(quarter, dtype=torch.float64) / quarter
    omega = g.weight("omega", 1.0 / _MAX_PERIOD**exponents, FLOAT)
    angles = g.op("Mul", g.reshape(at, -1, 1), omega)
    return g.op("Concat", g.op("Sin", angles), g.op("Cos", angles), axis=1)


def _one_added(table: Tensor, *rows: int) -> Tensor:
    """A table (..., k, dim) with 1 added to some of its k rows."""
    ones = table.new_zeros(table.shape[-2], 1)
    ones[list(rows)] = 1
    return table + ones


def _reciprocals(smoothing: Tensor) -> Tensor:
    """What shift and scale of both norms are multiplied by, (layers, 6, dim), of factors (layers, 2, dim)."""
    layers, _, dim = smoothing.shape
    factors = torch.ones(layers, 6, dim)
    factors[:, 0:2], factors[:, 3:5] = smoothing[:, :1], smoothing[:, 1:]
    return factors.reciprocal()
