"""Decoding in overlapping tiles with numpy, through any engine; `torch_runtime.tiling` does it with torch.

Attention is global within a tile, so that a tiled picture differs a little from one decoded at once; where
the later part of the decoder comes in graphs of its own, `strips` has no such difference. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sana_edge.decoding import DEFAULT_TILE, tile_cells
from sana_edge.errors import OutOfMemory
from sana_edge.system.memory import HINT

Array = NDArray[np.float32]
Run = Callable[[Array], Array]


def choose_tile(
    height: int, width: int, *, cell: int, pixel_bytes: int, memory_limit: int | None
) -> int | None:
    """The side in pixels of the tiles in which a latent (height, width) fits the memory; None: whole.

    Args:
        cell: pixels per side of a latent cell.
        pixel_bytes: what decoding takes at its peak for each pixel that is decoded at once.
        memory_limit: bytes; None if unknown, then larger pictures than `DEFAULT_TILE` squared are tiled.

    Raises:
        OutOfMemory: a tile of two cells does not fit.
    """
    pixels = height * width * cell**2
    if memory_limit is None:
        return DEFAULT_TILE if pixels > DEFAULT_TILE**2 else None
    # the picture itself is fp32
    free = memory_limit - 3 * 4 * pixels
    if pixels * pixel_bytes <= free:
        return None
    side = DEFAULT_TILE
    while side >= 2 * cell and side**2 * pixel_bytes > free:
        side //= 2
    side -= side % cell
    if side < 2 * cell:
        raise OutOfMemory(
            f"decoding {width * cell}x{height * cell} pixels does not fit {memory_limit} bytes",
            HINT,
            needed=(2 * cell) ** 2 * pixel_bytes + 3 * 4 * pixels,
            free=memory_limit,
        )
    return side


def decode_tiles(
    latent: Array,
    run: Run,
    *,
    cell: int,
    tile: int | None = None,
    stride: int | None = None,
    on_tile: Callable[[int, int], None] | None = None,
) -> Array:
    """Pixels (1, 3, f h, f w) of a latent (1, C, h, w), decoded in tiles by ``run``.

    Tiles start every ``stride`` pixels; those at the right and the bottom are smaller. The overlaps are
    cross-faded linearly, downwards first.

    Args:
        cell: f, pixels per side of a latent cell.
        tile: side of a tile in pixels; a picture that is no larger, and any for None, is decoded at once.
        stride: pixels from tile to tile, 7/8 of a tile by default.
        on_tile: called with (tiles done, all tiles) after each tile.

    Raises:
        InvalidInput: ``tile`` or ``stride`` is no multiple of a latent cell, or the stride exceeds the tile.
    """
    return _in_tiles(latent, run, (1, cell), cell, tile, stride, on_tile)


def encode_tiles(pixels: Array, run: Run, *, cell: int, tile: int | None = None) -> Array:
    """Latent (1, C, h, w) of pixels (1, 3, f h, f w), encoded in tiles as `decode_tiles` decodes them.

    Attention sees less: with tiles of half a picture the bundled model's latents of blobs of noise differ by
    a fifth of their norm.
    """
    return _in_tiles(pixels, run, (cell, 1), cell, tile, None, None)


def _in_tiles(
    x: Array,
    run: Run,
    scales: tuple[int, int],
    cell: int,
    tile: int | None,
    stride: int | None,
    on_tile: Callable[[int, int], None] | None,
) -> Array:
    """What ``run`` makes of x, tile by tile; ``scales`` are rows of x, and of the result, for a cell."""
    old, new = scales
    height, width = x.shape[2] // old, x.shape[3] // old
    side, step = tile_cells(max(height, width), cell, tile, stride)
    tops, lefts = range(0, height, step), range(0, width, step)
    overlap, done = (side - step) * new, 0
    found: Array | None = None
    # what is blended into the tiles below, per column
    bottoms: list[Array] = []
    for top in tops:
        above, bottoms, right = bottoms, [], None
        rows = slice(top * old, (top + side) * old)
        for column, left in enumerate(lefts):
            # in memory that is ours to blend into
            piece = np.array(run(np.ascontiguousarray(x[:, :, rows, left * old : (left + side) * old])))
            if above:
                _cross_fade(above[column], piece, 2)
            if right is not None:
                _cross_fade(right, piece, 3)
            bottoms.append(piece[:, :, max(piece.shape[2] - overlap, 0) :].copy())
            right = piece[:, :, :, max(piece.shape[3] - overlap, 0) :].copy()
            if found is None:
                found = np.empty((*piece.shape[:2], height * new, width * new), np.float32)
            y, z = top * new, left * new
            target = found[:, :, y : y + step * new, z : z + step * new]
            target[...] = piece[:, :, : target.shape[2], : target.shape[3]]
            done += 1
            if on_tile is not None:
                on_tile(done, len(tops) * len(lefts))
    assert found is not None
    return found


def _cross_fade(before: Array, after: Array, axis: int) -> None:
    """Blend the end of ``before`` into the beginning of ``after`` along an axis, over the shorter one."""
    extent = min(before.shape[axis], after.shape[axis])
    share = (np.arange(extent, dtype=np.float32) / np.float32(extent)).reshape(-1, *[1] * (3 - axis))
    end = before.take(range(before.shape[axis] - extent, before.shape[axis]), axis)
    beginning = after[:, :, :extent] if axis == 2 else after[..., :extent]
    beginning[...] = end * (1 - share) + beginning * share
