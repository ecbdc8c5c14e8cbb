"""Measured tiles: chosen where they are clearly faster, kept in a file, the same the next time; no GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_edge.kernels.cuda import library, tuning
from sana_edge.kernels.cuda.library import DeviceInfo, Library

NUMBERS: dict[str, Any] = {"rows": 2048, "columns": 1152, "depth": 1152, "silu": 0, "tile": 0}
LAPTOP = DeviceInfo(89, 76, 99 << 10)


@pytest.fixture(autouse=True)
def _library(emulated_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Library(emulated_library)
    monkeypatch.setattr(library, "load", lambda: found)


class Timer:
    """Seconds by tile; every tile that is not named takes 1."""

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.asked = {int(name.removeprefix("t")): s for name, s in seconds.items()}, 0

    def __call__(self, run: tuning.Run, tiles: Sequence[int]) -> Mapping[int, float]:
        self.asked += 1
        for tile in tiles:
            run(tile)
        return {tile: self.seconds.get(tile, 1.0) for tile in tiles}


def ask(tiles: tuning.Tiles, **numbers: int) -> tuple[int, list[int]]:
    ran: list[int] = []
    given = frozenset({"gate", "residual"})
    asked = {**NUMBERS, **numbers}
    if tiles.known("a GPU", asked, given) is None:
        tiles.measure("a GPU", LAPTOP, asked, given, ran.append)
    tile = tiles.known("a GPU", asked, given)
    assert tile is not None
    return tile, ran


def test_the_faster_is_chosen_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tiles.json"
    timer = Timer(t2=0.5)
    tile, ran = ask(tuning.Tiles(path, timer))
    assert tile == 2 and 2 in ran and len(ran) > 1
    # neither in this process nor in the next
    again = tuning.Tiles(path, timer)
    assert ask(again) == (2, []) and ask(again) == (2, [])
    assert timer.asked == 1
    ((key, kept),) = json.loads(path.read_text()).items()
    assert kept == 2 and key.startswith("a GPU ") and "2048x1152x1152" in key


def test_what_is_hardly_faster_is_not_chosen(tmp_path: Path) -> None:
    first = tuning.linear_tiles(library.load(), NUMBERS, frozenset({"gate", "residual"}), LAPTOP)[0].tile
    others = {f"t{tile}": 0.96 for tile in range(1, 5) if tile != first}
    assert ask(tuning.Tiles(tmp_path / "tiles.json", Timer(**others)))[0] == 0


def test_other_sizes_are_others(tmp_path: Path) -> None:
    timer = Timer()
    tiles = tuning.Tiles(tmp_path / "tiles.json", timer)
    for rows in (2048, 1024, 2048):
        ask(tiles, rows=rows)
    assert timer.asked == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": 9, "b": "x", "c": true}'])
def test_a_damaged_file_is_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text)
    assert ask(tuning.Tiles(path, Timer(t2=0.5)))[0] == 2


def test_nowhere_to_keep_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert ask(tuning.Tiles(tmp_path / "file" / "tiles.json", Timer(t2=0.5)))[0] == 2
    assert ask(tuning.Tiles(None, Timer(t2=0.5)))[0] == 2


def test_it_is_off_unless_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_active", [])
    assert tuning.active() is None
    monkeypatch.setenv(tuning.VARIABLE, "0")
    tuning.use(tmp_path / "tiles.json")
    assert tuning.active() is None
    monkeypatch.delenv(tuning.VARIABLE)
    tuning.use(tmp_path / "tiles.json")
    first = tuning.active()
    tuning.use(None)
    assert tuning.active() is first is not None


def test_a_cpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_active", [tuning.Tiles(None, Timer(t2=0.5))])
    fields = {"out": torch.zeros(1)}
    assert tuning.tuned("w8a8_linear", torch.device("cpu"), fields, NUMBERS) is NUMBERS
