"""Tiles of the INT8 products in Triton, per GPU architecture."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from sana_edge.errors import UnsupportedDevice


class Tile(NamedTuple):
    """Rows, columns and depth that a program multiplies at a time; its warps, and stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


class Table(NamedTuple):
    """Shared memory of a program at most, in KiB; products, and bytes of L2, of an SM in a clock; tiles, the
    smallest last."""

    shared: int
    products: int
    l2: int
    tiles: tuple[Tile, ...]


# Per compute capability, for this and those up to the next. A tile holds (m + n) · k bytes for each stage it
# loads ahead: all but one, and on 9.0 all, since wgmma reads them while it computes.
# - SANA's widths are odd multiples of 64 or 128 and its token counts multiples of 256: so 256 × 128 rather
#   than 128 × 256. It is the largest whose int32 sums fit into registers, 128 per thread of 8 warps.
# - 128 × 128 with 4 warps holds as many per thread. Two of these run on an SM, one computing while the other
#   writes its results, so they get at most half of its memory.
# - 64 deep divides 1152, 2240 and 2880, so that no load is masked, and the addresses of larger tiles 128 deep
#   take registers that the sums need. 128 deep takes half of the barriers: the others, given the memory.
# Reasoned, and checked for spilled registers; not measured.
_SMALL = (Tile(256, 128, 64, 8, 4), Tile(128, 128, 64, 4, 4), Tile(128, 64, 64, 4, 4), Tile(64, 64, 64, 4, 4))
TABLES: dict[int, Table] = {
    80: Table(
        163,
        2048,
        32,
        (Tile(256, 128, 64, 8, 5), Tile(128, 128, 64, 4, 5), Tile(128, 64, 128, 4, 3), _SMALL[-1]),
    ),
    86: Table(99, 1024, 16, _SMALL),
    90: Table(
        227,
        4096,
        28,
        (
            Tile(256, 128, 64, 8, 5),
            Tile(128, 128, 64, 4, 5),
            Tile(128, 64, 128, 4, 3),
            Tile(64, 64, 128, 4, 4),
        ),
    ),
    120: Table(99, 1024, 16, _SMALL),
}


def table(capability: int) -> Table:
    """The table of a compute capability, 89 for 8.9.

    Raises:
        UnsupportedDevice: older than 8.0.
    """
    known = [least for least in TABLES if least <= capability]
    if not known:
        raise UnsupportedDevice(
            f"the Triton kernels need compute capability 8.0, this device has {capability / 10:.1f}",
            "use the torch backend",
        )
    return TABLES[max(known)]


@functools.lru_cache(maxsize=1024)
def pick_tile(M: int, N: int, K: int, capability: int, processors: int) -> Tile:
    """The tile with which (M, N) sums over K take the least time on so many SMs, by counting.

    That is rounds, in which every SM has one tile, times what a round takes for the same depth: products and
    bytes from L2, of which each slows the other as csrc/tile_times.h has it, with its rates (on 9.0 those of
    wgmma). What follows the sums is not counted.

    Raises:
        UnsupportedDevice: a compute capability before 8.0.
    """
    _, products, l2, tiles = table(capability)
    # rows that start anywhere are loaded byte by byte, into more registers than large tiles leave
    candidates = tiles if K % 16 == 0 else tiles[-1:]

    def cost(tile: Tile) -> int:
        rounds = _ceil(_ceil(M, tile.m) * _ceil(N, tile.n), processors)
        # the 4-norm of clocks, but for factors and the root that all have
        return rounds**4 * ((tile.m * tile.n * l2) ** 4 + ((tile.m + tile.n) * products) ** 4)

    return min(candidates, key=cost)


@functools.cache
def device_of(device: torch.device, interpreted: bool) -> tuple[int, int]:
    """Compute capability (89 for 8.9) and SMs; the least and one where Triton interprets on a CPU.

    Raises:
        UnsupportedDevice: not a CUDA device, and not interpreted.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return 10 * properties.major + properties.minor, properties.multi_processor_count
    if interpreted:
        return min(TABLES), 1
    raise UnsupportedDevice(
        f"the Triton kernels run on CUDA devices, not on {device.type}", "use the torch backend"
    )


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
