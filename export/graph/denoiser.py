"""The denoiser of one step as a graph: latent, timestep and the text's keys and values to velocity."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from sana_edge.export.graph import layers as graph_layers
from sana_edge.export.graph.block import Text, add_block
from sana_edge.export.graph.builder import FLOAT, INT64, GraphBuilder, Value
from sana_edge.export.graph.modulation import modulation, positions
from sana_edge.nets.block import Block
from sana_edge.nets.denoiser import FINAL_EPS, Denoiser

# height and width of a latent
Size = tuple[int, int]


def add_denoiser(g: GraphBuilder, denoiser: Denoiser, size: Size | None = None) -> None:
    """Make g the graph ``denoiser``: any batch, whose rows have texts of their own.

    Inputs: latent (B, C, h, w), timestep (1,) as the sampler gives it, guidance (1,) if the model embeds it,
    keys (layers, B, heads, d, L), values (layers, B, heads, L, d), mask (B, 1, 1, L), added to the scores.
    Output: velocity (B, C, h, w). All are float32.

    Args:
        size: of the latent, for a graph of this size only; None for any.

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    step = _Step(g, denoiser, "B", size)
    keys, values = step.keys, step.values
    mask = g.cast(g.input("mask", ("B", 1, 1, "L")))
    x = step.layers(lambda index: Text(_row(g, keys, index), _row(g, values, index), mask))
    step.output(step.velocity(x))


def add_denoiser_folded(g: GraphBuilder, denoiser: Denoiser, size: Size | None = None) -> None:
    """Make g the graph ``denoiser_folded``: guided by a negative prompt of one token, u + scale (c - u).

    Inputs: latent (1, C, h, w), timestep (1,), guidance (1,) if the model embeds it, keys
    (layers, 1, heads, d, L) and values (layers, 1, heads, L, d) of the prompt, constant (layers, 1, 1, dim)
    of the negative prompt, scale (1,). Output: velocity (1, C, h, w). All are float32.

    Both predictions are rows of one batch; the first layer's self-attention, equal in both, is computed once.
    Arguments and errors are those of `add_denoiser`.
    """
    step = _Step(g, denoiser, 1, size)
    keys, values = step.keys, step.values
    constant = g.cast(g.input("constant", (denoiser.config.num_layers, 1, 1, denoiser.config.dim)))
    scale = g.input("scale", (1,))
    x = step.layers(
        lambda index: Text(_row(g, keys, index), _row(g, values, index), None, _row(g, constant, index))
    )
    with g.scope("guide"):
        both = g.cast(step.velocity(x), FLOAT)
        unguided, prompted = g.ops("Split", both, outputs=2, axis=0, num_outputs=2)
        push = g.op("Mul", g.op("Sub", prompted, unguided), scale)
        step.output(g.op("Add", unguided, push))


class _Step:
    """One step in a graph: its inputs, and what the layers share.

    Attributes:
        keys, values: inputs in the graph's dtype.
    """

    def __init__(self, g: GraphBuilder, denoiser: Denoiser, batch: int | str, size: Size | None) -> None:
        self._g, self._denoiser = g, denoiser
        config = denoiser.config
        self._shape: tuple[int | str, ...] = (batch, config.in_channels, *(size or ("h", "w")))
        self._latent = g.input("latent", self._shape)
        timestep = g.input("timestep", (1,))
        guidance = g.input("guidance", (1,)) if config.guidance_embeds else None
        sides = (config.num_layers, batch, config.num_cross_attention_heads)
        d = config.cross_attention_head_dim
        self.keys = g.cast(g.input("keys", (*sides, d, "L")))
        self.values = g.cast(g.input("values", (*sides, "L", d)))
        with g.scope("modulation"):
            self._vectors, self._head = modulation(g, denoiser, timestep, guidance)
        self._sides: tuple[Value | int, Value | int] = size or (
            g.side(self._latent, 2),
            g.side(self._latent, 3),
        )

    def layers(self, text: Callable[[int], Text]) -> Value:
        """The tokens (B, N, dim) after all layers, each with its text."""
        g, denoiser = self._g, self._denoiser
        grid = g.join(0, *self._sides, denoiser.config.ffn_dim)
        x = self._tokens()
        for index, block in enumerate(cast("list[Block]", list(denoiser.blocks))):
            with g.scope(f"blocks.{index}"):
                vectors = [_row(g, self._vectors, 6 * index + place) for place in range(6)]
                x = add_block(g, block, x, vectors, text(index), grid, denoiser.clamp, first=index == 0)
        return x

    def velocity(self, x: Value) -> Value:
        """What the last layer makes of tokens (B, N, dim): (B, channels, h, w)."""
        g, denoiser = self._g, self._denoiser
        shift, scale = (_row(g, self._head, place) for place in range(2))
        normed = graph_layers.norm_modulate(g, x, scale, shift, FINAL_EPS)
        flat = g.transpose(graph_layers.linear(g, "head", denoiser.head, normed), 0, 2, 1)
        return g.reshape(flat, 0, denoiser.config.out_channels, *self._sides)

    def output(self, velocity: Value) -> None:
        """Make the velocity the graph's output."""
        batch, _, *sides = self._shape
        self._g.output("velocity", velocity, (batch, self._denoiser.config.out_channels, *sides))

    def _tokens(self) -> Value:
        g, denoiser = self._g, self._denoiser
        flat = g.reshape(g.cast(self._latent), 0, denoiser.config.in_channels, -1)
        x = graph_layers.linear(g, "patch", denoiser.patch, g.transpose(flat, 0, 2, 1))
        if denoiser.config.interpolation_scale is None:
            return x
        with g.scope("positions"):
            return g.op("Add", x, g.cast(positions(g, denoiser, *self._sides)))


def _row(g: GraphBuilder, stacked: Value, index: int) -> Value:
    return g.op("Gather", stacked, g.constant(index, INT64), axis=0)
