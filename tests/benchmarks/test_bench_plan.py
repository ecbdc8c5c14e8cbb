"""The benchmark of plans, on models of a few megabytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_plan

SMALL = (
    bench_plan.Combination("bundled", "sana-tiny", 64, 1, ("--backend", "torch")),
    bench_plan.Combination("drawn", "tiny", 64, 1, ("--backend", "torch", "--int8"), "taesana"),
)


@pytest.mark.slow
def test_the_whole_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_plan, "COMBINATIONS", SMALL)
    output = tmp_path / "plan.json"
    options = ["--folder", str(tmp_path / "models"), "--output", str(output), "--threads", "1"]
    assert bench_plan.main([*options, "--only", "drawn"]) == 0
    (row,) = json.loads(output.read_text())["rows"]
    assert row["memory"]["found"] > 1 << 26 and row["time"]["found"] > 0
    assert set(row["seconds"]["found"]) == {"text", "denoise", "decode"}
    assert str(tmp_path) not in output.read_text()
    assert bench_plan.main(options) == 0
    data = json.loads(output.read_text())
    assert [row["name"] for row in data["rows"]] == ["bundled", "drawn"]
    assert "Memory within 15 % in" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(each: bench_plan.Combination, *_: object) -> dict[str, object]:
        if len(measured) == 1:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append(each.name)
        both = {"said": 2.0, "found": 1.0, "ratio": 2.0}
        return {"name": each.name, "memory": both, "time": both, "way": "together", "load": 0.5}

    monkeypatch.setattr(bench_plan, "COMBINATIONS", SMALL)
    monkeypatch.setattr(bench_plan, "measured", measure)
    options = ["--output", str(tmp_path / "plan.json")]
    assert bench_plan.main(options) == 130 and bench_plan.main(options) == 0
    assert measured == ["bundled", "interrupted", "drawn"]


def test_no_such_combination(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_plan.main(["--only", "none"]) == 1
    assert "no combination is called none" in capsys.readouterr().err
