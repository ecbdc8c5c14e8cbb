"""What `benchmarks/verify_export.py` writes of exports of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for module in ("onnx", "onnxruntime", "diffusers"):
    pytest.importorskip(module, reason=f"{module} is not installed")

import verify_export
from harness import engine_tables
from sana_edge.export.settings import Settings
from sana_edge.store.manifest import GRAPHS


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_what_is_exported() -> None:
    assert [*verify_export.EXPORTS] == ["fp32", "fp16", "bf16", "int8"]
    for name, settings in verify_export.EXPORTS.items():
        assert settings.verify and settings.size is None
        assert name == ("int8" if settings.int8 else settings.dtype)


def test_the_command(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float model cannot be exported in INT8, which is said in its place."""
    exports = {"bf16": Settings(dtype="bf16"), "int8": Settings(int8=True)}
    monkeypatch.setattr(verify_export, "EXPORTS", exports)
    output = tmp_path / "found.json"
    assert verify_export.main(["--model", str(tiny_folder), "--output", str(output)]) == 1
    printed, errors = capsys.readouterr()
    assert errors.startswith("error: not exported: int8\n")
    data: dict[str, Any] = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text() and str(tiny_folder) not in output.read_text()
    assert data["command"].startswith("python benchmarks/verify_export.py") and data["machine"]["cores"]
    made, failed = data["exports"]
    assert failed["failure"] and "verification" not in failed
    assert failed["command"] == "sana-edge export tiny --int8 --output DIR"
    assert (made["name"], made["model"], made["failure"]) == ("bf16", "tiny", None)
    assert made["command"] == "sana-edge export tiny --dtype bf16 --output DIR"
    assert "no bf16 products" in made["note"]
    assert {*GRAPHS, "decoder_head"} < set(made["verification"]["graphs"])
    assert {f"{name}.onnx" for name in GRAPHS} | {"denoiser.data"} < set(made["bytes"])
    assert list(made["seconds"])[-1] == "comparison" and min(made["seconds"].values()) >= 0
    assert sum(made["seconds"].values()) > 0.1
    assert printed == engine_tables.verification(data).text() + "\n"
    worst = made["verification"]["graphs"]["denoiser"]
    assert f"{worst['error']:.1e} ({worst['limit']:.1e})" in printed
    assert failed["failure"] in printed
