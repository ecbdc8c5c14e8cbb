"""Prompts that engines read once: the same pictures without text encoder and tokenizer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sana_edge import Sana
from sana_edge.engines import choose
from sana_edge.engines import text as engine_text
from sana_edge.engines.engine import Settings
from sana_edge.engines.sessions import Graphs
from sana_edge.engines.text import EngineText, Floats, KnownText
from sana_edge.prompt import CHI
from sana_edge.store import manifest
from sana_edge.store.known_models import BUNDLED

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

MODEL = BUNDLED / "sana-tiny-int8-onnx"
PROMPT = "a red house left of a yellow star"
OPTIONS: dict[str, Any] = {"steps": 1, "seed": 3, "size": (64, 64), "exact_size": True}


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs that were loaded or run, and each "tokenizer"."""
    seen: list[str] = []
    load, run, read = Graphs.load, Graphs.run, EngineText.__init__

    def loads(graphs: Graphs, name: str) -> Any:
        if name not in graphs.loaded:
            seen.append(name)
        return load(graphs, name)

    def runs(graphs: Graphs, name: str, **inputs: Any) -> Any:
        seen.append(f"run {name}")
        return run(graphs, name, **inputs)

    def reads(text: EngineText, *given: Any) -> None:
        seen.append("tokenizer")
        read(text, *given)

    monkeypatch.setattr(Graphs, "load", loads)
    monkeypatch.setattr(Graphs, "run", runs)
    monkeypatch.setattr(EngineText, "__init__", reads)
    return seen


@pytest.mark.parametrize(
    "backend", ["onnxruntime", pytest.param("openvino", marks=[pytest.mark.slow, pytest.mark.ci])]
)
def test_pictures_are_the_same(cache: Path, spy: list[str], backend: str) -> None:
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    how: dict[str, Any] = {"backend": backend, "device": "cpu"}
    with Sana.load(MODEL, prompt_cache=False, **how) as sana:
        expected = sana.generate(PROMPT, **OPTIONS)
    assert spy[:2] == ["tokenizer", "text_encoder"] and not (cache / "prompts").exists()
    spy.clear()
    with Sana.load(MODEL, **how) as sana:
        assert "text_encoder" not in spy and "tokenizer" not in spy
        first = sana.generate(PROMPT, **OPTIONS)
        assert spy.count("text_encoder") == spy.count("tokenizer") == 1
        spy.clear()
        again = sana.generate(PROMPT, **{**OPTIONS, "seed": 4})
        second = sana.generate(PROMPT, **OPTIONS)
        # keys and values, too, are those of before
        assert not {"text_encoder", "tokenizer", "run text_projection"} & set(spy)
    with Sana.load(MODEL, **how) as sana:
        third = sana.generate(PROMPT, **OPTIONS)
        assert not {"text_encoder", "tokenizer"} & set(spy) and spy.count("run text_projection") == 2
        # a new prompt beside a known negative one
        other = sana.generate("a blue fish", **OPTIONS)
        assert spy.count("run text_projection") == 3
    assert {"text_encoder", "tokenizer"} < set(spy) and len(list((cache / "prompts").iterdir())) == 3
    assert len({picture.png() for picture in (first, again, other)}) == 3
    for found in (first, second, third):
        assert found.png() == expected.png() and found.notes == expected.notes


def test_another_process_loads_no_text_encoder(cache: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.png"
    words = ["generate", PROMPT, "--model", str(MODEL), "--backend", "onnxruntime", "--seed", "3"]
    words += ["--steps", "1", "--size", "64x64", "--exact-size", "--output", str(output), "--quiet"]
    with Sana.load(MODEL, backend="onnxruntime") as sana:
        expected = sana.generate(PROMPT, **OPTIONS).png()
    code = """
import sys
from sana_edge.cli.main import main
from sana_edge.engines.text import EngineText
EngineText.__init__ = None
code = main(sys.argv[1:])
print({"torch", "tokenizers"} & set(sys.modules), file=sys.stderr)
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    assert output.read_bytes() == expected


def known(folder: Path, **settings: Any) -> KnownText:
    described, kind = manifest.read(folder), choose.choose("onnxruntime", "cpu", folder, Settings(**settings))
    return KnownText(folder, described, kind, partial(EngineText, folder, described.text, _zeros))


def _zeros(ids: NDArray[np.int64], *past: Floats) -> Floats:
    return np.zeros((1, ids.shape[1], 128), np.float32)


def test_of_another_graph(cache: Path, tmp_path: Path) -> None:
    """And of files that were replaced behind a loaded model, nothing is kept."""
    folder, texts = tmp_path / "model", [(PROMPT, CHI)]
    shutil.copytree(MODEL, folder)
    text, path = known(folder), folder / "text_encoder.onnx"
    path.write_bytes(path.read_bytes())
    text.encode(PROMPT)
    assert not text.have(texts) and not (cache / "prompts").exists()
    text = known(folder)
    text.encode(PROMPT)
    assert text.have(texts) and known(MODEL).have(texts) and not known(folder, threads=3).have(texts)
    path.unlink()
    assert not text.have(texts)
    # as `manifest_files.verify` found it
    content = json.loads((folder / manifest.FILE).read_text())
    shutil.copy(MODEL / path.name, path)
    content["files"]["text_encoder.data"]["sha256"] = "0" * 64
    (folder / manifest.FILE).write_text(json.dumps(content))
    assert not known(folder).have(texts)


def test_what_features_depend_on() -> None:
    described, kind = manifest.read(MODEL), choose.choose("onnxruntime", "cpu", MODEL)
    *_, checksums = engine_text._identity(MODEL, described, kind)() or []
    names = {"text_encoder.onnx", "text_encoder.data", manifest.INSTRUCTION, manifest.TOKENIZER}
    assert names <= set(checksums) and not any("denoiser" in name for name in checksums)
