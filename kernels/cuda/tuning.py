"""Tiles of products by measurement: each product that a program runs is timed once on its GPU.

Off unless `use` was called, as the runtime does, and SANA_EDGE_TUNE is not 0. A product is timed when it
first runs, outside of a recording, its result written elsewhere: with the tiles that csrc/tile_times.h thinks
at most half as slow again as its choice, which stands unless another is clearly faster. What was found is
kept in a file, so that a machine chooses the same from then on; results do not depend on tiles.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sana_edge.errors import SanaError
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.operations import OPERATIONS
from sana_edge.kernels.cuda.tiles import NAMES, linear_tiles
from sana_edge.system.atomic import write_bytes
from sana_edge.system.json_values import read_json

VARIABLE = "SANA_EDGE_TUNE"
# operations whose tiles can be chosen
TUNED = ("w8a8_linear", "w8a8_linear_quantize")
# others than the model's best are tried up to so much of its time, and must be so much faster
_TRIED, _FASTER = 1.5, 0.95
_TURNS, _CALLS = 5, 4
# runs a product with a tile
Run = Callable[[int], object]
Timer = Callable[[Run, Sequence[int]], Mapping[int, float]]


class Tiles:
    """What was chosen on GPUs, kept in a file that is read once and written when there is something new."""

    def __init__(self, path: Path | None, timer: Timer) -> None:
        self._path, self._timer = path, timer
        self._lock = threading.Lock()
        self._chosen = _read(path)

    def known(self, name: str, numbers: Mapping[str, Any], given: frozenset[str]) -> int | None:
        """The number of a product's tile, 0 for the library's choice; None where it was not measured."""
        return self._chosen.get(_key(name, numbers, given))

    def measure(
        self,
        name: str,
        info: library.DeviceInfo,
        numbers: Mapping[str, Any],
        given: frozenset[str],
        run: Run,
    ) -> None:
        """Choose the tile of a product that is not known. name: of device and operation; ``run`` runs it."""
        with self._lock:
            if self.known(name, numbers, given) is None:
                self._chosen[_key(name, numbers, given)] = self._timed(info, numbers, given, run)
                self._write()

    def _timed(
        self, info: library.DeviceInfo, numbers: Mapping[str, Any], given: frozenset[str], run: Run
    ) -> int:
        found = linear_tiles(library.load(), numbers, given, info)
        tried = [tile.tile for tile in found if tile.total <= _TRIED * found[0].total]
        if len(tried) < 2:
            return 0
        seconds = self._timer(run, tried)
        best = min(tried, key=lambda tile: seconds[tile])
        return best if seconds[best] < _FASTER * seconds[tried[0]] else 0

    def _write(self) -> None:
        if self._path is not None:
            # what cannot be kept is found again
            with suppress(OSError, SanaError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(self._path, (json.dumps(self._chosen, indent=1, sort_keys=True) + "\n").encode())


def _key(name: str, numbers: Mapping[str, Any], given: frozenset[str]) -> str:
    kind = "silu" if numbers.get("silu") else "residual" if "residual" in given else "plain"
    sizes = "x".join(str(numbers[size]) for size in ("rows", "columns", "depth"))
    return f"{name} {library.load().version} {sizes} {kind}"


_active: list[Tiles] = []


def use(path: Path | None) -> None:
    """Measure from now on in this process, and keep it in a file; nothing with SANA_EDGE_TUNE=0."""
    if not _active and os.environ.get(VARIABLE, "1") != "0":
        _active.append(Tiles(path, gpu_seconds))


def active() -> Tiles | None:
    """What `use` made."""
    return _active[0] if _active else None


def tuned(
    operation: str, device: torch.device, fields: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The numbers of a launch with the tile that was measured, now or before, where any is."""
    found = active()
    if found is None or numbers["tile"] or not numbers["rows"] or device.type != "cuda":
        return numbers
    own = library.load()
    given = frozenset(name for name, value in fields.items() if value is not None)
    with torch.cuda.device(device):

        def run(tile: int) -> None:
            own.call(operation, device, **{**fields, **scratch}, **{**numbers, "tile": tile})

        name = f"{torch.cuda.get_device_name(device)} {operation}"
        if torch.cuda.is_current_stream_capturing():
            return {**numbers, "tile": found.known(name, numbers, given) or 0}
        if found.known(name, numbers, given) is None:
            written = (pointer.name for pointer in OPERATIONS[operation].pointers if pointer.written)
            scratch = {key: torch.empty_like(fields[key]) for key in written}
            found.measure(name, own.device(library.index_of(device)), numbers, given, run)
        return {**numbers, "tile": found.known(name, numbers, given) or 0}


def gpu_seconds(run: Run, tiles: Sequence[int]) -> dict[int, float]:
    """Median seconds of a call with each tile, in turns, on the current CUDA device."""
    samples: dict[int, list[float]] = {tile: [] for tile in tiles}
    for turn in range(_TURNS + 1):
        for tile in tiles:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(_CALLS):
                run(tile)
            stop.record()
            stop.synchronize()
            # the first loads code
            if turn:
                samples[tile].append(start.elapsed_time(stop) / 1e3 / _CALLS)
    return {tile: statistics.median(found) for tile, found in samples.items()}


def _read(path: Path | None) -> dict[str, int]:
    """What a file has; nothing where it is damaged."""
    try:
        found = read_json(path) if path is not None else {}
    except (OSError, ValueError):
        return {}
    pairs = found.items() if isinstance(found, dict) else ()
    return {key: tile for key, tile in pairs if type(tile) is int and (tile == 0 or tile in NAMES)}
