"""The command that measures linear attention's read: on the emulated library, beside an earlier file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bench_attention
from sana_edge.kernels.cuda import library


def test_a_file_with_what_was_before(
    tmp_path: Path,
    emulated_library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(library.VARIABLE, "")
    library.load.cache_clear()
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    arguments = [str(emulated_library), "--shapes", "tiny", "--tokens", "40", "--output"]
    assert bench_attention.main([*arguments, str(first)]) == 0
    assert bench_attention.main([*arguments, str(second), "--before", str(first)]) == 0
    library.load.cache_clear()
    data = json.loads(second.read_text(encoding="utf-8"))
    assert data["before"]["rows"] == data["rows"] and "libsana" in data["command"]
    for row in data["rows"]:
        # the error of INT8 in rows of 64 numbers, and hardly any other level
        assert 0.001 < row["error"] < 0.02 and row["error"] == pytest.approx(row["int8_error"], rel=0.01)
        assert row["other_levels"] < 0.01
    assert "float16" in capsys.readouterr().out
