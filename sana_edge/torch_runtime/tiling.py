"""Decoding within the memory there is: a picture at once where that fits, else in overlapping tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sana_edge.decoding import DEFAULT_TILE as DEFAULT_TILE
from sana_edge.decoding import tile_cells
from sana_edge.errors import OutOfMemory
from sana_edge.int8.conv import is_int8
from sana_edge.nets.autoencoder import LatentConfig, LatentDecoder
from sana_edge.plan.maps import decode_bytes
from sana_edge.store.tiny_autoencoder import DecoderConfig
from sana_edge.system.memory import available_memory
from sana_edge.torch_runtime.decode_graphs import DecodeGraphs

# what a laptop can be expected to have free, to choose between tiles and a whole picture where it is unknown
_ASSUMED_MEMORY = 4 << 30


@torch.no_grad()
def decode(
    autoencoder: LatentDecoder,
    latent: Tensor,
    *,
    tile: int | None = None,
    stride: int | None = None,
    memory_limit: int | None = None,
    on_tile: Callable[[int, int], None] | None = None,
    on_block: Callable[[int, int], None] | None = None,
    on_tiled: Callable[[int], None] | None = None,
    graphs: DecodeGraphs | None = None,
) -> Tensor:
    """Decode a latent, one picture and one tile at a time.

    Attention is global within a tile, so that a tiled picture differs a little from one decoded at once.
    Tiles start every ``stride`` pixels; those at the right and the bottom are smaller. The overlaps are
    cross-faded linearly, downwards first, as in diffusers' ``AutoencoderDC.tiled_decode``.

    Args:
        latent: (B, latent channels, h, w), not scaled, in the dtype of the autoencoder.
        tile: side of a tile in pixels; a picture that is no larger is decoded at once. None decodes at once
            whatever fits the memory, and the rest in tiles of 1024.
        stride: pixels from tile to tile, 7/8 of a tile by default.
        memory_limit: bytes to use; None takes what is free on the latent's device, or 4 GiB where that is
            unknown.
        on_tile: called with (tiles done, all tiles) after each tile.
        on_block: called with (blocks done, all blocks) before each block of the decoder, for each tile; what
            it raises ends the decode.
        on_tiled: called with the side of the tiles in pixels, if there are several, before the first.
        graphs: of the autoencoder; where one is replayed ``on_block`` is called before its first block only.

    Returns:
        Pixels (B, 3, f h, f w), about [-1, 1].

    Raises:
        InvalidInput: ``tile`` or ``stride`` is no multiple of a latent cell, or the stride exceeds the tile.
        OutOfMemory: not even one tile fits what is known to be free.
    """
    config = autoencoder.config
    cell = config.spatial_compression
    batch, _, height, width = latent.shape
    pixels = batch * config.in_channels * height * width * cell**2 * latent.element_size()
    free = available_memory(latent.device) if memory_limit is None else memory_limit
    expected = _ASSUMED_MEMORY if free is None else free
    peak = partial(
        decode_bytes,
        cast("DecoderConfig", config),
        item=latent.element_size(),
        int8=is_int8(autoencoder),
        whole_maps=autoencoder.whole_maps,
    )
    held = graphs is not None and graphs.recorded(latent[:1])
    if tile is None and not held and pixels + peak(height, width) > expected:
        tile = DEFAULT_TILE
    side, step = tile_cells(max(height, width), cell, tile, stride)
    needed = pixels + peak(min(side, height), min(side, width))
    if free is not None and needed > free and not held:
        raise OutOfMemory(
            f"decoding {width * cell}x{height * cell} pixels needs {needed} bytes, {free} are free",
            "choose a smaller size or tile, or close other programs",
            needed=needed,
            free=free,
        )
    if on_tiled is not None and side < max(height, width):
        on_tiled(side * cell)
    # twice what is needed: a graph keeps its memory while others want theirs
    room = memory_limit is None and (free is None or 2 * needed <= free)
    tiles = batch * len(range(0, height, step)) * len(range(0, width, step))
    run = _Tiles(autoencoder, graphs, tiles, on_block, room=room)
    return _decode_tiles(run, config, latent, side, step, on_tile)


class _Tiles:
    """Decodes one tile after the other, eagerly or as a graph, and tells of the blocks."""

    def __init__(
        self,
        autoencoder: LatentDecoder,
        graphs: DecodeGraphs | None,
        tiles: int,
        on_block: Callable[[int, int], None] | None,
        *,
        room: bool,
    ) -> None:
        self._autoencoder, self._graphs, self._on_block, self._room = autoencoder, graphs, on_block, room
        self._blocks = autoencoder.blocks()
        self._done, self._total = 0, tiles * len(self._blocks)

    def __call__(self, latent: Tensor) -> Tensor:
        start = self._done
        if self._graphs is not None and self._graphs.takes(latent, room=self._room):
            # a recording's runs are no progress
            self._tell()
            pixels = self._graphs(latent)
        elif self._on_block is None:
            pixels = self._autoencoder.decode(latent)
        else:
            with self._hooks():
                pixels = self._autoencoder.decode(latent)
        self._done = start + len(self._blocks)
        return pixels

    def _tell(self, *_: object) -> None:
        if self._on_block is not None:
            self._on_block(self._done, self._total)
            self._done += 1

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        hooks = [block.register_forward_pre_hook(self._tell) for block in self._blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _decode_tiles(
    run: Callable[[Tensor], Tensor],
    config: LatentConfig,
    latent: Tensor,
    side: int,
    step: int,
    on_tile: Callable[[int, int], None] | None,
) -> Tensor:
    """Decode tiles of ``side`` latent cells that start every ``step`` cells."""
    cell = config.spatial_compression
    batch, _, height, width = latent.shape
    pixels = latent.new_empty((batch, config.in_channels, height * cell, width * cell))
    tops, lefts = range(0, height, step), range(0, width, step)
    done, total = 0, batch * len(tops) * len(lefts)
    overlap = (side - step) * cell
    for index in range(batch):
        # what is blended into the tiles below, per column
        bottoms: list[Tensor] = []
        for top in tops:
            above, bottoms = bottoms, []
            right: Tensor | None = None
            for column, left in enumerate(lefts):
                piece = run(latent[index : index + 1, :, top : top + side, left : left + side])
                if above:
                    _cross_fade(above[column], piece, 2)
                if right is not None:
                    _cross_fade(right, piece, 3)
                bottoms.append(piece[:, :, max(piece.shape[2] - overlap, 0) :].clone())
                right = piece[:, :, :, max(piece.shape[3] - overlap, 0) :].clone()
                y, x = top * cell, left * cell
                target = pixels[index : index + 1, :, y : y + step * cell, x : x + step * cell]
                target.copy_(piece[:, :, : target.shape[2], : target.shape[3]])
                done += 1
                if on_tile is not None:
                    on_tile(done, total)
    return pixels


def _cross_fade(before: Tensor, after: Tensor, dim: int) -> None:
    """Blend the end of ``before`` into the beginning of ``after`` along ``dim``, over the shorter one."""
    extent = min(before.shape[dim], after.shape[dim])
    shape = [1] * after.ndim
    shape[dim] = extent
    share = (torch.arange(extent, device=after.device) / extent).view(shape)
    end = before.narrow(dim, before.shape[dim] - extent, extent)
    beginning = after.narrow(dim, 0, extent)
    beginning.copy_(end * (1 - share) + beginning * share)
