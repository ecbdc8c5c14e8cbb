"""The decoder of an exported folder: latents to pixels, whole, in strips of rows, or in tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sana_edge.decoding import DEFAULT_TILE
from sana_edge.engines.sessions import Graphs
from sana_edge.engines.strips import MIN_BYTES, Tail, decode_strips
from sana_edge.engines.text import Floats
from sana_edge.engines.tiles import choose_tile, decode_tiles
from sana_edge.errors import OutOfMemory
from sana_edge.plan.memory import pixel_bytes
from sana_edge.progress import Progress, unseen
from sana_edge.system.memory import available_memory

_WHOLE = "decoder"
# Of the memory that is free, the share for the maps of strips, and the most, which is about what a tile takes
# that is decoded at once. The public decoder then computes 1.09 to 1.16 of the rows that there are at 2048 px
# and 1.25 to 1.37 at 4096 px, with 1 GB 1.22 to 1.37 and 1.5; tiles are 1.27 of a picture.
_SHARE, _MOST_BYTES = 4, 2 << 30
# where nobody knows what is free
_USUAL_BYTES = 1 << 30


class EngineDecoder:
    """Decodes a picture up to a tile at once, and a larger one in strips, which changes nothing but rounding.

    In strips also a small one that does not fit into the free memory at once. In tiles, whose attention sees
    less than the picture, where strips cannot be: in folders without the graphs of parts, with TensorRT, for
    which `sana-edge build` makes no engines of them, and where the first part, which gets the whole latent,
    does not fit into the free memory.

    The engines of one way are in memory at a time, and those of parts only while they work: the next
    picture's denoising can use what they hold for their maps.
    """

    def __init__(self, graphs: Graphs) -> None:
        described = graphs.described
        self._graphs, self._cell = graphs, described.cell
        self._parts = () if graphs.kind.name == "tensorrt" else described.decoder_parts
        # norms and attention are fp32 in any case
        self._value_bytes = 4 if graphs.kind.precision == "fp32" else 3

    def load(self, width: int, height: int) -> None:
        """Load what stays in memory for pictures of so many pixels."""
        if not self._parts or max(width, height) <= DEFAULT_TILE:
            self._graphs.load(_WHOLE)

    def decode(
        self,
        latent: Floats,
        on_progress: Progress = unseen,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> Floats:
        """Pixels (1, 3, H, W), about -1 to 1, of a latent (1, C, h, w).

        Tells ``on_progress`` before each strip or tile; what that raises ends the decode.

        Args:
            tile: side of a tile in pixels; a picture that is no larger is not tiled, and none is for 0. None
                tiles what the memory, or the lack of parts, asks for.
            on_tiled: called with the side of the tiles in pixels, if there are several, before the first.

        Raises:
            OutOfMemory: it fits in no way, or an engine found that it does not.
        """
        height, width = latent.shape[2:]
        pixels, longest = height * width * self._cell**2, max(height, width) * self._cell
        in_tiles = partial(self._in_tiles, latent, on_progress, on_tiled)
        if tile and tile < longest:
            return in_tiles(tile)
        if longest <= DEFAULT_TILE and self._fits(pixels):
            return self._run(_WHOLE, latent)
        if not self._parts:
            return in_tiles(DEFAULT_TILE) if tile is None else self._run(_WHOLE, latent)
        # what it holds would make the difference
        self._graphs.close(_WHOLE)
        free = self._free()
        picture = 3 * 4 * pixels
        head = self._value_bytes * self._parts[0].values * height * width
        if free is None or head + picture <= free:
            return self._in_strips(latent, strip_bytes(free), on_progress)
        if tile is not None:
            raise OutOfMemory(
                f"decoding {width * self._cell}x{height * self._cell} without tiles needs about"
                f" {(head + picture) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                "choose a tile, or leave the choice to sana-edge",
                needed=head + picture,
                free=free,
            )
        side = choose_tile(height, width, cell=self._cell, pixel_bytes=self._pixel_bytes, memory_limit=free)
        return in_tiles(side)

    def _free(self) -> int | None:
        """What is left for maps when the weights are there; None: unknown, as of a GPU's memory."""
        free = self._graphs.free(available_memory())
        weights = 0 if _WHOLE in self._graphs.loaded else self._graphs.bytes_of(_WHOLE)
        return None if free is None else max(free - weights, 0)

    def _fits(self, pixels: int) -> bool:
        """Whether so many can be decoded at once; without parts there is no other way, and nothing known."""
        free = self._free() if self._parts else None
        return free is None or self._pixel_bytes * pixels <= free

    @property
    def _pixel_bytes(self) -> int:
        """What is alive at the peak of a whole decode, for each pixel."""
        return pixel_bytes(self._parts, self._cell, self._value_bytes)

    def _in_strips(self, latent: Floats, most: int, on_progress: Progress) -> Floats:
        head, *others = self._parts
        done, height = 0, latent.shape[2] * self._cell

        def on_rows(rows: int, _: int) -> None:
            nonlocal done
            done = rows

        def run(graph: str, x: Floats) -> Floats:
            on_progress("decode", done, height)
            return self._run(graph, x)

        def run_head(x: Floats) -> Floats:
            y = run(head.graph, x)
            self._graphs.close(head.graph)
            return y

        tails = [Tail(partial(run, part.graph), part.halo or 0, part.scale, part.values) for part in others]
        try:
            return decode_strips(latent, run_head, tails, strip_bytes=most, on_rows=on_rows)
        finally:
            self._graphs.close(*(part.graph for part in self._parts))

    def _in_tiles(
        self,
        latent: Floats,
        on_progress: Progress,
        on_tiled: Callable[[int], None] | None,
        tile: int | None,
    ) -> Floats:
        if on_tiled is not None and tile is not None and tile < max(latent.shape[2:]) * self._cell:
            on_tiled(tile)
        on_tile = partial(on_progress, "decode")
        return decode_tiles(latent, partial(self._run, _WHOLE), cell=self._cell, tile=tile, on_tile=on_tile)

    def _run(self, name: str, x: Floats) -> Floats:
        """What a graph makes of its only input."""
        graph = self._graphs.described.graphs[name]
        (given,), (wanted,) = graph.inputs, graph.outputs
        return self._graphs.run(name, **{given: x})[wanted]


def strip_bytes(free: int | None) -> int:
    """What the maps of strips may take, of so many free bytes; None: unknown."""
    return _USUAL_BYTES if free is None else min(max(free // _SHARE, MIN_BYTES), _MOST_BYTES)
