"""The benchmark of the sidecar: a run leaves its file and its table, and unequal pictures end it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_sidecar


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "sidecar.json"
    options = ["--repeat", "1", "--steps", "2", "--threads", "1", "--output", str(output)]
    assert bench_sidecar.main(options) == 0
    data = json.loads(output.read_text())
    assert all(len(seconds) == 1 for seconds in data["seconds"].values())
    assert data["median"]["difference"] == data["median"]["sidecar"] - data["median"]["command"]
    assert "sidecar" in capsys.readouterr().out


def test_pictures_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sidecar, "_command", lambda options: ({"command": 1.0}, b"a"))
    monkeypatch.setattr(bench_sidecar, "_sidecar", lambda options: ({"sidecar": 1.0}, [b"a", b"b"]))
    output = tmp_path / "sidecar.json"
    assert bench_sidecar.main(["--output", str(output)]) == 1
    assert "differ" in capsys.readouterr().err and not output.exists()


def test_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([9.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(bench_sidecar, "_command", lambda options: ({"command": next(turns)}, b"a"))
    monkeypatch.setattr(bench_sidecar, "_sidecar", lambda options: ({"sidecar": 2.0}, [b"a", b"a"]))
    found = bench_sidecar.measure(bench_sidecar._options(["--repeat", "3"]), lambda line: None)
    assert found["seconds"]["difference"] == [1.0, 0.0, -1.0]
    assert found["median"] == {"command": 2.0, "sidecar": 2.0, "difference": 0.0}
