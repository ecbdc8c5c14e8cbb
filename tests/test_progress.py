"""Progress and cancellation of loading and decoding, in both runtimes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sana_edge import Cancelled, Sana, progress
from sana_edge.engines import decoder as engine_decoder
from sana_edge.engines import strips as engine_strips
from sana_edge.torch_runtime import tiling

Events = list[tuple[str, int, int]]
PROMPT = "a red house"
GRAPHS = "sana-tiny-int8-onnx"


class Watcher:
    """Progress that sets ``cancel`` at the event ``name`` of the number ``at``, from 0."""

    def __init__(self, name: str = "", at: int = 0) -> None:
        self.events: Events = []
        self.cancel = threading.Event()
        self._name, self._at = name, at

    def __call__(self, name: str, done: int, count: int) -> None:
        self.events.append((name, done, count))
        if name == self._name and len(self.of(name)) > self._at:
            self.cancel.set()

    def of(self, name: str) -> Events:
        return [event for event in self.events if event[0] == name]


@pytest.fixture(params=["torch", "onnxruntime"])
def model(request: pytest.FixtureRequest, tiny_folder: Path) -> str:
    if request.param == "torch":
        return str(tiny_folder)
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return GRAPHS


def test_loading(model: str) -> None:
    watcher = Watcher()
    Sana.load(model, device="cpu", on_progress=watcher, cancel=watcher.cancel).close()
    ((name, count),) = {(name, count) for name, _, count in watcher.events}
    assert name == f"loading {'tiny' if model != GRAPHS else 'sana-tiny-int8'}"
    assert [done for _, done, _ in watcher.events] == list(range(count))
    for at in range(count - 1):
        stopped = Watcher(name, at)
        with pytest.raises(Cancelled, match="loading was cancelled"):
            Sana.load(model, device="cpu", on_progress=stopped, cancel=stopped.cancel)
        # the next part was not begun
        assert len(stopped.events) == at + 1
    watcher.cancel.set()
    with pytest.raises(Cancelled):
        Sana.load(model, device="cpu", cancel=watcher.cancel)


@pytest.fixture(params=["torch", "torch tiles", "strips", "tiles"])
def sana(
    request: pytest.FixtureRequest, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Sana]:
    """Ready to decode in parts: 128 px in blocks of torch, or in pieces of an engine."""
    if request.param.startswith("torch"):
        if request.param == "torch tiles":
            monkeypatch.setattr(tiling, "DEFAULT_TILE", 64)
            monkeypatch.setattr(tiling, "_ASSUMED_MEMORY", 0)
            monkeypatch.setattr(tiling, "available_memory", lambda device: None)
        with Sana.load(str(tiny_folder), device="cpu") as sana:
            yield sana
        return
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    monkeypatch.setattr(engine_decoder, "DEFAULT_TILE", 64)
    monkeypatch.setattr(engine_decoder, "strip_bytes", lambda free: 0)
    monkeypatch.setattr(engine_strips, "_MIN_ROWS_PER_HALO", 2)
    with Sana.load(GRAPHS, device="cpu", backend="onnxruntime") as sana:
        loaded = sana._runtime
        if request.param == "tiles":
            monkeypatch.setattr(loaded._decoder, "_parts", ())
        yield sana


def test_decoding(sana: Sana) -> None:
    options = {"seed": 7, "steps": 2, "size": (128, 128)}
    watcher = Watcher()
    expected = sana.generate(PROMPT, on_progress=watcher, cancel=watcher.cancel, **options)
    assert watcher.of("denoise") == [("denoise", 1, 2), ("denoise", 2, 2)]
    parts = watcher.of("decode")
    assert len(parts) > 2 and parts == sorted(parts)
    for at in (0, len(parts) - 2):
        stopped = Watcher("decode", at)
        with pytest.raises(Cancelled, match="the generation was cancelled"):
            sana.generate(PROMPT, on_progress=stopped, cancel=stopped.cancel, **options)
        assert len(stopped.of("decode")) == at + 1
        # nothing of it is left in the way
        assert sana.generate(PROMPT, **options).png() == expected.png()


def test_a_name_does_not_steer_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.bar() as shown:
        shown("loading \x1b[31mred\n", 1, 2)
    assert capsys.readouterr().err == "loading  [31mred : 1 of 2\n"
