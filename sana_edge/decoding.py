"""Decoding as both runtimes do it: how tiles lie, how small previews are, and what is no picture."""

from __future__ import annotations

import math

from sana_edge.errors import InvalidInput, SanaError

# pixels; with tiles of 512 the seams show in flat areas at 4096 px
DEFAULT_TILE = 1024

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
