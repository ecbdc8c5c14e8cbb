"""Large INT8 models on a CPU are drawn by OpenVINO, from an export that is made once; others by torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("onnx", reason="onnx is not installed")

from sana_edge.cli import fastest as room
from sana_edge.cli.main import main
from sana_edge.errors import SanaError
from sana_edge.export import onnx as exporter
from sana_edge.progress import unseen
from sana_edge.request.loading import LoadOptions

PACKAGE = "sana-tiny"
OPTIONS = LoadOptions(device="cpu", int8=True, offline=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where exports go; every model is large, and every CPU suits."""
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "_small", lambda: 0)
    monkeypatch.setattr("sana_edge.engines.openvino.backend.sums_are_exact", lambda: True)
    monkeypatch.setattr(room, "lacks_int8", lambda: False)
    return tmp_path / "cache"


def chosen(model: str = PACKAGE, **changed: Any) -> tuple[str, list[str]]:
    said: list[str] = []
    return room.fastest(model, dataclasses.replace(OPTIONS, **changed), said.append, unseen), said


def refused(*_: Any, **__: Any) -> None:
    raise SanaError("the disk is full", "free some space")


def test_exported_once_and_drawn(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = ["--device", "cpu", "--size", "128x128", "--steps", "1", "--seed", "1", "--json"]
    command = [
        "generate",
        "--prompt",
        "a red house",
        "--int8",
        *picture,
        "--output",
        str(tmp_path),
        "--force",
    ]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "exporting sana-tiny-int8 for OpenVINO, once, to" in first.err and "--backend torch" in first.err
    (folder,) = (cache / "exported").iterdir()
    assert folder.name.startswith("sana-tiny-int8-")
    monkeypatch.setattr(exporter, "export", refused)
    assert main(command) == 0
    again = capsys.readouterr()
    assert "exporting" not in again.err and "drawn by OpenVINO" in again.err
    backends = [json.loads(line.out.splitlines()[-1])["backend"] for line in (first, again)]
    # the tests' CPU may prefer onnxruntime for a model of this size
    assert backends[0] == backends[1] and backends[0] in ("onnxruntime", "openvino")
    assert main([*command, "--backend", "torch"]) == 0
    last = capsys.readouterr()
    assert json.loads(last.out.splitlines()[-1])["backend"] == "torch" and "OpenVINO" not in last.err


def test_an_export_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "export", refused)
    model, said = chosen()
    assert model == PACKAGE
    assert said[-1] == "drawn by torch, as the export failed: the disk is full"


def test_a_float_model_is_told_of_packages() -> None:
    """Graphs need calibrated scales; making them takes longer than many pictures."""
    model, said = chosen("sana-tiny", int8=False)
    assert (model, said) == ("sana-tiny", [])


def test_a_float_folder_with_int8(tiny_folder: Path) -> None:
    model, (said,) = chosen(str(tiny_folder))
    assert model == str(tiny_folder) and f"sana-edge quantize {tiny_folder}" in said


@pytest.mark.parametrize(
    "changed",
    [
        {"backend": "torch"},
        {"backend": "openvino"},
        {"device": "cuda"},
        {"engines": Path("e")},
        {"dtype": "fp16"},
        {"decoder": "dc-ae-lite"},
    ],
    ids=str,
)
def test_what_is_asked_for_is_done(changed: dict[str, Any]) -> None:
    assert chosen(**changed) == (PACKAGE, [])


def test_small_models_and_other_machines_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(room, "_small", lambda: 1 << 30)
        assert chosen() == (PACKAGE, [])
    with monkeypatch.context() as patched:
        patched.setattr("sana_edge.engines.openvino.backend.sums_are_exact", lambda: False)
        assert chosen() == (PACKAGE, [])
    with monkeypatch.context() as patched:
        patched.setattr(room, "lacks_int8", lambda: True)
        assert chosen() == (PACKAGE, [])
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert chosen(device="auto") == (PACKAGE, [])
