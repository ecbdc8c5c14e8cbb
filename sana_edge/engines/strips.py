"""Decoding in strips of rows with numpy: the picture of a whole decode in memory that does not grow with it.

The decoder's first graph sees the whole latent, at low resolution; the later ones see a few rows around each
row, so that they get windows of rows and what is wrong at a cut is left away. Each takes rows from the one
before as they come: no map of high resolution exists as a whole but the picture. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# one graph; what it returns is the caller's, a later call does not overwrite it
Run = Callable[[Array], Array]

# what the windows' maps take at the least; much smaller ones compute their halos again and again
MIN_BYTES = 256 << 20
_MIN_ROWS_PER_HALO = 4


@dataclass(frozen=True)
class Tail:
    """A graph that works on strips: x (1, C, H, W) to (1, ., scale H, scale W).

    Attributes:
        run: the graph.
        halo: rows of x above and below, on which a row of the output depends.
        scale: rows of the output for a row of x.
        values: alive at its peak, for each row and column of x.
    """

    run: Run
    halo: int
    scale: int
    values: int


def decode_strips(
    latent: Array,
    head: Run,
    tails: Sequence[Tail],
    *,
    strip_bytes: int = MIN_BYTES,
    on_rows: Callable[[int, int], None] | None = None,
) -> Array:
    """Pixels (1, 3, f h, f w) of a latent (1, C, h, w).

    Args:
        head: latent to the first tail's x.
        strip_bytes: what the maps of a window of each tail may take together; halos set a lower limit.
        on_rows: called with (rows of the picture done, all rows).
    """
    x = head(latent)
    height, width = x.shape[2:]
    blocks: Iterator[Array] = iter([x])
    del x
    for part in tails:
        fitting = strip_bytes // (len(tails) * 4 * part.values * width)
        rows = even_rows(height, max(fitting, (2 + _MIN_ROWS_PER_HALO) * part.halo), part.halo)
        blocks = _strips(blocks, height, rows, part)
        height, width = height * part.scale, width * part.scale
    pixels: Array | None = None
    done = 0
    for block in blocks:
        if pixels is None:
            pixels = np.empty((*block.shape[:2], height, width), np.float32)
        pixels[:, :, done : done + block.shape[2]] = block
        done += block.shape[2]
        if on_rows is not None:
            on_rows(done, height)
    assert pixels is not None and done == height
    return pixels


def even_rows(height: int, most: int, halo: int) -> int:
    """The fewest rows of a window with which there are no more windows than with ``most`` rows."""
    if most >= height:
        return height
    # the first and the last have a halo on one side only
    count = -(-(height - 2 * halo) // (most - 2 * halo))
    return -(-(height + 2 * halo * (count - 1)) // count)


def windows(height: int, rows: int, halo: int) -> list[tuple[int, int, int]]:
    """(start, top, bottom) of windows of ``rows`` rows each, one if they are all: top to bottom is exact.

    All are equally high, so that an engine prepares for one shape; the last begins where it just fits.
    """
    if rows >= height:
        return [(0, 0, height)]
    found = [(0, 0, rows - halo)]
    while (top := found[-1][2]) < height:
        start = min(top - halo, height - rows)
        found.append((start, top, height if start + rows == height else start + rows - halo))
    return found


def _strips(blocks: Iterator[Array], height: int, rows: int, part: Tail) -> Iterator[Array]:
    """Yield the output's rows in order, of an input whose rows come in blocks."""
    plan = windows(height, rows, part.halo)
    kept, first = next(blocks), 0
    for start, top, bottom in plan:
        kept, first = kept[:, :, start - first :], start
        needed = min(rows, height)
        waiting = [kept]
        while sum(block.shape[2] for block in waiting) < needed:
            waiting.append(next(blocks))
        kept = np.concatenate(waiting, axis=2) if len(waiting) > 1 else kept
        del waiting
        out = part.run(np.ascontiguousarray(kept[:, :, :needed]))
        yield out[:, :, (top - start) * part.scale : (bottom - start) * part.scale]
