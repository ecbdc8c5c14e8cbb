"""The Qt window without a screen: it draws, shows how far it is, cancels, saves, and says what is wrong."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import MODEL, until

from sana_edge import read_metadata
from sana_edge.store.known_models import BUNDLED

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
pytest.importorskip(
    "PySide6.QtWidgets", reason="PySide6 is not installed, or lacks a library", exc_type=ImportError
)

from PySide6 import QtCore, QtTest, QtWidgets

EXAMPLE = Path(__file__).parents[2] / "examples" / "desktop_qt.py"
# a folder that gets pictures of the window
SHOTS = os.environ.get("SANA_EDGE_SHOTS")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("desktop_qt", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def application() -> QtWidgets.QApplication:
    return QtWidgets.QApplication([])


def shown(window: Any, condition: Any) -> None:
    """Let the window live until something is there."""

    def happened() -> Any:
        QtWidgets.QApplication.processEvents()
        return condition()

    until(happened)


def closed(window: Any) -> None:
    """Close it, and let Qt free it while the application is there."""
    window.close()
    assert window._thread.isFinished()
    window.deleteLater()
    QtCore.QCoreApplication.sendPostedEvents(None, QtCore.QEvent.Type.DeferredDelete)


@pytest.fixture
def window(example: Any, application: Any) -> Iterator[Any]:
    made = example.Window(str(BUNDLED / MODEL))
    made.show()
    shown(made, lambda: made.status.text() == "Ready")
    yield made
    closed(made)


def shot(window: Any, name: str) -> None:
    if SHOTS:
        window.grab().save(str(Path(SHOTS) / name))


def test_it_draws_and_saves(
    example: Any, window: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (window.width_box.value(), window.height_box.value()) == (256, 256)
    assert not window.save_button.isEnabled() and not window.cancel_button.isEnabled()
    window.prompt.clear()
    QtTest.QTest.keyClicks(window.prompt, "a red house")
    window.seed.setValue(7)
    window.steps.setValue(4)
    previews: list[Any] = []
    bar: list[int] = []
    window.bar.valueChanged.connect(bar.append)
    window._artist.previewed.connect(lambda image: previews.append(image.size().toTuple()))
    monkeypatch.setattr(example, "PREVIEW_SECONDS", 0)
    QtTest.QTest.keyClick(window.prompt, QtCore.Qt.Key.Key_Return)
    assert window.cancel_button.isEnabled() and not window.generate_button.isEnabled()
    shown(window, lambda: window.picture)
    assert previews == [(256, 256)] * 3 and {25, 50, 75, 100} <= set(bar)
    assert window.status.text().startswith("Seed 7, ")
    # what is painted is the picture
    pixels = window.picture.pixels
    painted = window.canvas.image.constBits()
    assert np.array_equal(np.frombuffer(painted, np.uint8).reshape(256, 256, 3), pixels)
    shot(window, "desktop.png")
    path = tmp_path / "house.png"
    monkeypatch.setattr(QtWidgets.QFileDialog, "getSaveFileName", lambda *words: (str(path), ""))
    window.save_button.click()
    assert window.status.text() == f"Saved {path}" and read_metadata(path)["prompt"] == "a red house"
    monkeypatch.setattr(QtWidgets.QFileDialog, "getSaveFileName", lambda *words: (f"{path}.gif", ""))
    window.save_button.click()
    assert ".gif" in window.status.text() and window.save_button.isEnabled()


def test_it_cancels_and_draws_again(window: Any) -> None:
    window.steps.setValue(200)
    window.generate_button.click()
    shown(window, lambda: window.status.text() == "Denoise")
    window.cancel_button.click()
    shown(window, window.generate_button.isEnabled)
    assert window.status.text().startswith("the generation was cancelled") and window.picture is None
    window.steps.setValue(1)
    window.generate_button.click()
    shown(window, lambda: window.picture)


def test_it_closes_while_it_draws(window: Any) -> None:
    window.steps.setValue(200)
    window.generate_button.click()
    shown(window, lambda: window.status.text() == "Denoise")


def test_an_error_is_shown_with_its_hint(window: Any) -> None:
    window.prompt.clear()
    window.generate_button.click()
    shown(window, window.generate_button.isEnabled)
    message, hint = window.status.text().splitlines()
    assert "prompt is empty" in message and hint
    shot(window, "desktop_error.png")


def test_a_model_that_is_not_there(example: Any, application: Any, tmp_path: Path) -> None:
    """It can be asked again."""
    made = example.Window(str(tmp_path / "nothing"))
    for _ in range(2):
        shown(made, made.generate_button.isEnabled)
        assert "nothing" in made.status.text()
        made.generate_button.click()
    closed(made)


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 200
