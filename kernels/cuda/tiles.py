"""What tiles of INT8 products take on a GPU, as csrc/tile_times.h counts; only the library is needed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from sana_edge.kernels.cuda.library import DeviceInfo, Library
from sana_edge.kernels.cuda.operations import OPERATIONS

# TileName of csrc/gemm_tiles.h, as `tile` of w8a8_linear numbers them; 0 is the one that is chosen
NAMES = {1: "large", 2: "middle", 3: "narrow", 4: "small", 5: "turing", 6: "turing small"}
_MOST = 4


class Tile(ctypes.Structure):
    """``sana_edge_tile``: a product made in ``count`` tiles (rows, columns)."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("warps_down", ctypes.c_int32),
        ("warps_across", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("instructions", ctypes.c_int32),
        ("moved", ctypes.c_int32),
    )


class TileTime(ctypes.Structure):
    """``sana_edge_tile_time``, in clocks: ``total`` of the product, the others of one tile."""

    _fields_ = (
        ("tile", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("rounds", ctypes.c_int64),
        ("products", ctypes.c_double),
        ("l2", ctypes.c_double),
        ("shared", ctypes.c_double),
        ("epilogue", ctypes.c_double),
        ("total", ctypes.c_double),
    )


def time_tile(library: Library, tile: Tile, device: DeviceInfo) -> TileTime:
    """The clocks of a product in tiles of one kind.

    Raises:
        InvalidInput: a size is not positive.
    """
    found = TileTime()
    library.ask("sana_edge_time_tile", tile, device, found)
    return found


def linear_tiles(
    library: Library, numbers: Mapping[str, int | float], given: frozenset[str], device: DeviceInfo
) -> list[TileTime]:
    """The tiles that a device has room for, that which w8a8_linear chooses first.

    Args:
        numbers: rows, columns, depth, and what else of the struct is not 0; all others are passed over.
        given: which of bias, gate, residual and constant there are; also.
    """
    struct = OPERATIONS["w8a8_linear"].struct
    known = {name for name, *_ in struct._fields_} - {"tile"}
    # nothing is read there
    arguments = struct(**dict.fromkeys(known & given, 1), **{n: v for n, v in numbers.items() if n in known})
    found = (TileTime * _MOST)()
    count = library.count("sana_edge_w8a8_linear_tiles", arguments, device, found)
    return list(found[:count])
