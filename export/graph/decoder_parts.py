"""A decoder in several graphs: one for its first stages, which see the whole picture, and one for
each later stage, which sees a few rows around each pixel and can work on strips of rows
(`sana_edge.engines.strips`): the same pictures in less memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from sana_edge.config import EXPAND_RATIO
from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.decoder import add_stage, enter, leave
from sana_edge.nets.autoencoder import Autoencoder, LatentDecoder
from sana_edge.nets.tiny_autoencoder import TinyAutoencoder
from sana_edge.store.tiny_autoencoder import REACH


@dataclass(frozen=True)
class Part:
    """Some stages: (1, channels, h, w) to (1, out, scale h, scale w).

    Attributes:
        name: of the graph.
        halo: rows of the input above and below, on which a row of the output depends; None: all rows.
        values: that are alive at its peak, for each row and column of the input.
    """

    name: str
    stages: tuple[int, ...]
    channels: int
    out: int
    halo: int | None
    scale: int
    values: int


def decoder_parts(autoencoder: LatentDecoder) -> list[Part]:
    """The head, which ends behind the last attention, and the tails behind it; none where attention is last.

    A stage without layers belongs to the one before. Convolutions and norms of a pixel's channels are all
    that tails have: on strips with their halos they are exact.
    """
    tails = _tails(autoencoder)
    if not tails:
        return []
    known, first = _shape(autoencoder), tails[0].stages[-1] + 1
    stages = tuple(range(first, len(known.widths)))
    values = max(4 ** (stages[-1] - stage) * _values(autoencoder, stage) for stage in stages)
    scale = 2 ** (stages[-1] - first)
    latents = autoencoder.config.latent_channels
    head = Part("decoder_head", stages, latents, tails[0].channels, None, scale, values)
    return [head, *tails]


def add_decoder_part(g: GraphBuilder, autoencoder: LatentDecoder, part: Part) -> None:
    """Make g the graph of a part: x (1, channels, h, w) float32 to y (1, out, scale h, scale w) float32.

    The head's x is a latent, as a sampler leaves it; the last tail's y is pixels, about [-1, 1].

    Raises:
        CheckpointError: an INT8 layer has no ``input_scale``.
    """
    x = g.input("x", (1, part.channels, "h", "w"))
    y = enter(g, autoencoder, x) if part.halo is None else g.cast(x)
    for stage in reversed(part.stages):
        y = add_stage(g, autoencoder, stage, y)
    if 0 in part.stages:
        y = leave(g, autoencoder, y)
    sides = [side if part.scale == 1 else f"{part.scale}*{side}" for side in ("h", "w")]
    g.output("y", y, (1, part.out, *sides))


@dataclass(frozen=True)
class _Shape:
    """A decoder's stages, the highest resolution first.

    Attributes:
        convolutional: how many of the first see only rows near a row.
        reach: rows of the map above and below that a block of those reads.
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    convolutional: int
    reach: int


def _shape(autoencoder: LatentDecoder) -> _Shape:
    if isinstance(autoencoder, TinyAutoencoder):
        tiny = autoencoder.config
        widths, blocks = tiny.decoder_block_out_channels[::-1], tiny.num_decoder_blocks[::-1]
        return _Shape(widths, blocks, len(widths), REACH)
    assert isinstance(autoencoder, Autoencoder)
    config = autoencoder.config
    kinds, widths = config.decoder_block_types, config.decoder_block_out_channels
    first = next((n for n, kind in enumerate(kinds) if kind != "ResBlock"), len(kinds))
    return _Shape(widths, config.decoder_layers_per_block, first, 2)


def _tails(autoencoder: LatentDecoder) -> list[Part]:
    known, pixels = _shape(autoencoder), autoencoder.config.in_channels
    widths, layers = known.widths, known.layers
    stages = [stage for stage in reversed(range(min(known.convolutional, len(widths) - 1))) if layers[stage]]
    tails = []
    for index, stage in enumerate(stages):
        last = stage == stages[-1]
        # rows of the doubled map: those of each block, one of the last convolution
        rows = known.reach * layers[stage] + last
        scale = 4 if last and layers[0] == 0 else 2
        # the input, four maps of the doubled one, the picture
        values = widths[stage + 1] + 4 * 4 * widths[stage] + last * 2 * scale**2 * pixels
        parts = tuple(range(stage + 1)) if last else (stage,)
        out = pixels if last else widths[stage]
        halo = 1 + -(-rows // 2)
        tails.append(Part(f"decoder_tail_{index}", parts, widths[stage + 1], out, halo, scale, values))
    return tails


def _values(autoencoder: LatentDecoder, stage: int) -> int:
    """Alive at the peak of a stage of the head, for each row and column of its map."""
    known = _shape(autoencoder)
    width = known.widths[stage]
    if stage < known.convolutional:
        return 5 * width
    assert isinstance(autoencoder, Autoencoder)
    # the input, before and after the depthwise convolution; the input, q, k and v of each scale before and
    # after they are joined
    gated, scales = 1 + 2 * 2 * EXPAND_RATIO, 1 + len(autoencoder.config.decoder_qkv_multiscales[stage])
    return max(gated, 1 + 2 * 3 * scales) * width
