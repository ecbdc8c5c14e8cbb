"""Decoding as both runtimes do it: how tiles lie, how small previews are, and what is no picture."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.sizes import resized

# pixels; with tiles of 512 the seams show in flat areas at 4096 px
DEFAULT_TILE = 1024

# of the widest map inside a layer; less costs time for the rows that neighbouring strips compute twice
STRIP_BYTES = 64 << 20
_MIN_STRIP_ROWS = 16

# longest side of a preview's latent; 8 cells are 256 pixels
PREVIEW_CELLS = 8


def check_finite(name: str, low: float, high: float) -> None:
    """Raise `SanaError` where the extremes of a latent or of pixels say that these hold NaN or infinity."""
    if not (math.isfinite(low) and math.isfinite(high)):
        raise SanaError(
            f"the {name} has values that are not finite ({low} to {high})",
            "choose dtype fp32 or bf16, or a lower guidance",
        )


def tile_cells(longest: int, cell: int, tile: int | None, stride: int | None) -> tuple[int, int]:
    """Side and distance of the tiles, in latent cells, for a latent with this longest side."""
    if tile is None:
        return longest, longest
    if stride is None:
        stride = max(tile * 7 // 8 // cell, 1) * cell
    for name, length in (("tile", tile), ("stride", stride)):
        if length <= 0 or length % cell:
            raise InvalidInput(f"{name} {length} is no positive multiple of {cell}", "1024 is a good tile")
    if stride > tile:
        raise InvalidInput(f"stride {stride} is larger than tile {tile}", "choose a stride up to the tile")
    if longest * cell <= tile:
        return longest, longest
    return tile // cell, stride // cell


def strip_rows(row_bytes: int) -> int:
    """Rows per strip when the widest map of a layer has ``row_bytes`` per row of its input."""
    return max(_MIN_STRIP_ROWS, STRIP_BYTES // row_bytes)


def shrink(latent: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means of factor x factor cells; those at the right and the bottom may be of fewer."""
    sums, (height, width) = latent.astype(np.float64), latent.shape[-2:]
    for axis, length in ((2, height), (3, width)):
        starts = np.arange(0, length, factor)
        counts = np.minimum(factor, length - starts)
        sums = np.add.reduceat(sums, starts, axis) / counts.reshape([-1, 1] if axis == 2 else [-1])
    return sums.astype(np.float32)


def resize_and_crop(pixels: NDArray[np.float32], asked: tuple[int, int]) -> NDArray[np.float32]:
    """A picture (C, H, W) at size ``asked`` (width, height): bilinear, corners not aligned, no antialiasing.

    As ``torch.nn.functional.interpolate`` computes it, without torch.
    """
    drawn = (pixels.shape[2], pixels.shape[1])
    if drawn == asked:
        return pixels
    size, start = resized(drawn, asked)
    for axis, side in ((2, 0), (1, 1)):
        low, high, part = _weights(drawn[side], size[side], start[side], asked[side])
        shape = (1, 1, -1) if axis == 2 else (1, -1, 1)
        part = part.reshape(shape)
        pixels = pixels.take(low, axis) * (1 - part) + pixels.take(high, axis) * part
    return pixels


def _weights(
    source: int, target: int, start: int, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For ``count`` pixels of ``target`` ones: their two neighbours among ``source``, the second's weight."""
    scale = np.float32(source / target)
    centres = (np.arange(start, start + count, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    centres = np.clip(centres, 0, source - 1)
    low = centres.astype(np.int64)
    high = np.minimum(low + 1, source - 1)
    return low, high, (centres - low).astype(np.float32)
