"""The benchmark of batches: sizes take turns, values are compared, and a run leaves its file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import bench_series


def test_measure() -> None:
    drawn: list[int] = []

    def draw(count: int) -> list[np.ndarray]:
        drawn.append(count)
        return [np.full(3, 0.5 * (count > 2))] * count

    rows = bench_series.measure(draw, [1, 2, 4], repeat=2)
    assert drawn == [1, 1, 2, 4, 1, 2, 4, 1, 2, 4]
    assert [(row["batch"], row["apart"], len(row["seconds"])) for row in rows] == [
        (1, 0.0, 2),
        (2, 0.0, 2),
        (4, 0.5, 2),
    ]
    assert rows[0]["ratio"] == 1


@pytest.mark.parametrize("what", [["--shapes", "tiny", "--size", "64"], ["--model"]], ids=["step", "picture"])
def test_command(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], what: list[str]
) -> None:
    output = tmp_path / "series.json"
    what = [*what, str(tiny_folder)] if what == ["--model"] else what
    options = ["--steps", "1", "--batches", "1,2", "--repeat", "1", "--threads", "1", "--output", str(output)]
    assert bench_series.main([*what, *options]) == 0
    data = json.loads(output.read_text())
    assert [row["batch"] for row in data["rows"]] == [1, 2] and "load_before" in data
    assert str(output) in capsys.readouterr().out
