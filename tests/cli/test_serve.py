"""``sana-edge serve``: what is wrong with its options shows before anything is loaded."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from sana_edge.cli.main import main
from sana_edge.cli.serve import KEY, _named


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--host", "0.0.0.0"], "error: everybody who reaches 0.0.0.0 could draw"),
        (["--host", ""], "error: everybody who reaches"),
        (["--port", "65536"], "error: port is 65536"),
        (["--port", "-1"], "error: port is -1"),
        (["--queue", "-1"], "error: queue is -1"),
        (["--idle-unload", "0"], "error: idle-unload is 0"),
        (["--idle-unload", "nan"], "error: idle-unload is nan"),
        (["--api-key", ""], "error: the API key is empty"),
        (["--keep", "no-such-folder"], "error: no-such-folder is no folder"),
        (["--model", "sana-tini", "--port", "0"], "error: "),
    ],
)
def test_wrong_options(
    options: list[str],
    error: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEY, raising=False)
    assert main(["serve", "--offline", *options]) == 1
    out, errors = capsys.readouterr()
    assert out == "" and errors.startswith(error) and "hint:" in errors


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("sana_edge.serve.server"):
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert main(["serve"]) == 1
    errors = capsys.readouterr().err
    assert "this needs uvicorn, which is not installed" in errors and "sana-edge[serve]" in errors


def test_names_of_models(tmp_path: Path) -> None:
    """Requests see no folders."""
    for name in ("a/onnx", "b/onnx", "c/onnx"):
        (tmp_path / name).mkdir(parents=True)
    models = ["sana-tiny", "owner/name", *(str(tmp_path / name) for name in ("a/onnx", "b/onnx", "c/onnx"))]
    assert list(_named([*models, "sana-tiny"])) == ["sana-tiny", "owner/name", "onnx", "onnx-2", "onnx-3"]
