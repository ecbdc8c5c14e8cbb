"""The model of what tiles take, csrc/tile_times.h: by hand, and what it chooses for SANA's products."""

from __future__ import annotations

from pathlib import Path

import pytest

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda.library import DeviceInfo, Library
from sana_edge.kernels.cuda.tiles import NAMES, Tile, TileTime, linear_tiles, time_tile

LAPTOP = DeviceInfo(89, 76, 99 << 10)
MIDDLE = {"rows": 128, "columns": 128, "depth": 1152, "warps_down": 2, "warps_across": 2, "stages": 3}
LARGE = {"rows": 256, "columns": 128, "depth": 1152, "warps_down": 4, "warps_across": 2, "stages": 4}


@pytest.fixture(scope="module")
def library(emulated_library: Path) -> Library:
    return Library(emulated_library)


def four_norm(*limits: float) -> float:
    return sum(limit**4 for limit in limits) ** 0.25


def test_two_blocks_on_an_sm(library: Library) -> None:
    """720 tiles on 76 SMs are 10 on one; 48 KiB and 256 registers of 128 threads leave room for two."""
    found = time_tile(library, Tile(count=720, instructions=8, moved=2, **MIDDLE), LAPTOP)
    assert (found.rounds, found.resident) == (10, 2)
    assert found.products == 128 * 128 * 1152 / 1024 == 18432
    assert found.l2 == (128 + 128) * 1152 / 16 == 18432
    # fragments twice of either operand, and the copies
    assert found.shared == (2 * 128 + 2 * 128 + 128 + 128) * 1152 / 128 == 6912
    # both blocks have 512 of 32 results with 8 instructions each; two warps of a scheduler issue in two of
    # three clocks
    issued, moved = 2 * 512 * 8 / (4 * 2 / 3), 2 * 128 * 128 * 2 / 16
    assert found.epilogue == pytest.approx(four_norm(issued, moved) / 2)
    busy = four_norm(18432, 18432, 6912)
    assert found.total == pytest.approx(1500 + 10 * busy + four_norm(issued, moved))


def test_one_block_on_an_sm(library: Library) -> None:
    """96 KiB: epilogues, starts, and 18 barriers of 40 clocks are waited for."""
    found = time_tile(library, Tile(count=360, instructions=8, moved=4, **LARGE), LAPTOP)
    assert (found.rounds, found.resident) == (5, 1)
    # two warps for each scheduler issue in two of three clocks
    epilogue = four_norm(1024 * 8 / (4 * 2 / 3), 256 * 128 * 4 / 16)
    busy = four_norm(36864, 384 * 1152 / 16, (256 * 2 + 128 * 4 + 384) * 1152 / 128) + 18 * 40
    assert found.epilogue == pytest.approx(epilogue)
    assert found.total == pytest.approx(5 * (1500 + busy + epilogue))


def test_a_device_decides_rates(library: Library) -> None:
    tile = Tile(count=1, instructions=1, moved=2, **MIDDLE)
    times = {name: time_tile(library, tile, DeviceInfo(name, 1, 99 << 10)) for name in (75, 80, 86, 90, 120)}
    assert {name: 18432 / time.products for name, time in times.items()} == {
        75: 1,
        80: 2,
        86: 1,
        90: 2.5,
        120: 1,
    }
    assert {name: 18432 * 16 / time.l2 for name, time in times.items()} == pytest.approx(
        {75: 20, 80: 32, 86: 16, 90: 28, 120: 16}
    )


def test_what_is_refused(library: Library) -> None:
    for name in (*MIDDLE,):
        with pytest.raises(InvalidInput):
            time_tile(library, Tile(count=1, instructions=1, moved=2, **{**MIDDLE, name: 0}), LAPTOP)


def chosen(
    library: Library, rows: int, columns: int, depth: int, device: DeviceInfo, **more: int
) -> list[TileTime]:
    given = frozenset({"gate", "residual"} if not more else {"bias"})
    return linear_tiles(library, {"rows": rows, "columns": columns, "depth": depth, **more}, given, device)


def test_the_least_is_first_and_asking_again_says_the_same(library: Library) -> None:
    for rows, columns in [(2048, 1152), (256, 192), (1, 8), (32768, 11200)]:
        first, *others = chosen(library, rows, columns, 1152, LAPTOP)
        assert all(first.total <= other.total for other in others) and len(others) == 3
        again = chosen(library, rows, columns, 1152, LAPTOP)
        assert [(t.tile, t.total) for t in (first, *others)] == [(t.tile, t.total) for t in again]


def test_what_the_review_found_wrong(library: Library) -> None:
    """Expand with SiLU on 76 SMs had large tiles, N = 1152 on 58 narrow ones: bytes of L2 were too cheap."""
    assert NAMES[chosen(library, 2048, 5760, 1152, LAPTOP, silu=1)[0].tile] == "middle"
    assert NAMES[chosen(library, 2048, 1152, 1152, DeviceInfo(89, 58, 99 << 10))[0].tile] == "middle"


def test_only_what_a_device_has_room_for(library: Library) -> None:
    assert [NAMES[t.tile] for t in chosen(library, 64, 64, 64, DeviceInfo(89, 24, 33 << 10))] == ["small"]
    assert chosen(library, 64, 64, 64, DeviceInfo(89, 24, 31 << 10)) == []
    assert {NAMES[t.tile] for t in chosen(library, 64, 64, 64, DeviceInfo(75, 40, 64 << 10))} == {
        "turing",
        "turing small",
    }
