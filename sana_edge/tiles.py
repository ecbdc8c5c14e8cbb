"""Geometry of overlapping tiles, for both runtimes: how large they are and how far apart they start."""

from __future__ import annotations

from sana_edge.errors import InvalidInput

# pixels; with tiles of 512 the seams show in flat areas at 4096 px
DEFAULT_TILE = 1024


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
