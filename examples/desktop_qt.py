"""A desktop window that draws: a model of how to embed sana-edge in PySide6.

    pip install PySide6 "sana-edge[onnx]" && python examples/desktop_qt.py [MODEL]

The model lives in a thread of its own. It and the window talk by signals, so that the window never waits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

# before torch is imported: its threads then leave the processor to the window
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
from numpy.typing import NDArray
from PySide6 import QtWidgets as widgets
from PySide6.QtCore import QObject, QRectF, QSize, Qt, QThread, Signal, Slot
from PySide6.QtGui import QCloseEvent, QImage, QPainter, QPaintEvent

from sana_edge import Image, Sana, SanaError

# a preview costs a decode: at most one in so many seconds
PREVIEW_SECONDS = 0.5


def to_qimage(pixels: NDArray[np.uint8]) -> QImage:
    """(H, W, 3) RGB to an image that owns its bytes."""
    height, width = pixels.shape[:2]
    return QImage(pixels.tobytes(), width, height, 3 * width, QImage.Format.Format_RGB888).copy()


class Artist(QObject):
    """The model, in the worker's thread. Each slot ends with one of `ready`, `drawn` and `failed`."""

    ready = Signal(int, int)  # the size that the model was trained for
    progressed = Signal(str, object, object)  # what, done, of how many: bytes do not fit into Qt's int
    previewed = Signal(QImage)
    drawn = Signal(Image)
    failed = Signal(str, str)  # message, hint

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self._sana: Sana | None = None

    @Slot(object)
    def load(self, cancel: threading.Event) -> None:
        try:
            self._sana = Sana.load(self._model, cancel=cancel, on_progress=self.progressed.emit)
            self.ready.emit(*self._sana.native_size)
        except SanaError as error:
            self.failed.emit(error.message, error.hint)

    @Slot(str, object, object)
    def draw(self, prompt: str, options: dict[str, Any], cancel: threading.Event) -> None:
        if self._sana is None:
            # what failed may work now
            return self.load(cancel)
        last, told = time.monotonic(), self.progressed.emit
        try:
            for step in self._sana.stream(prompt, cancel=cancel, on_progress=told, **options):
                if step.image is not None:
                    self.drawn.emit(step.image)
                elif time.monotonic() - last > PREVIEW_SECONDS:
                    self.previewed.emit(to_qimage(step.preview()))
                    last = time.monotonic()
        except SanaError as error:
            self.failed.emit(error.message, error.hint)


class Canvas(widgets.QWidget):
    """A picture in the middle, as large as fits."""

    image = QImage()

    def show_image(self, image: QImage) -> None:
        self.image = image
        self.update()

    def paintEvent(self, event: QPaintEvent) -> None:
        size = self.image.size().scaled(self.size(), Qt.AspectRatioMode.KeepAspectRatio)
        box = QRectF(0, 0, size.width(), size.height())
        box.moveCenter(QRectF(self.rect()).center())
        with QPainter(self) as painter:
            painter.setRenderHint(QPainter.RenderHint.SmoothPixmapTransform)
            painter.drawImage(box, self.image)


class Window(widgets.QWidget):
    """Prompt, size, steps and seed; the picture as it comes; cancel and save."""

    asked_to_load = Signal(object)
    asked_to_draw = Signal(str, object, object)

    def __init__(self, model: str) -> None:
        super().__init__(windowTitle="sana-edge")
        self.picture: Image | None = None
        self._cancel = threading.Event()
        self._build()
        self._thread, self._artist = QThread(self), Artist(model)
        self._artist.moveToThread(self._thread)
        self.asked_to_load.connect(self._artist.load)
        self.asked_to_draw.connect(self._artist.draw)
        self._artist.ready.connect(self._on_ready)
        self._artist.progressed.connect(self._on_progress)
        self._artist.previewed.connect(self.canvas.show_image)
        self._artist.drawn.connect(self._on_drawn)
        self._artist.failed.connect(self._on_failed)
        self._thread.start()
        self.asked_to_load.emit(self._cancel)

    def _build(self) -> None:
        self.canvas = Canvas(minimumSize=QSize(256, 256))
        self.prompt = widgets.QLineEdit(text="a red car left of a house on a meadow")
        sides = {"minimum": 32, "maximum": 4096, "singleStep": 32}
        self.width_box, self.height_box = widgets.QSpinBox(**sides), widgets.QSpinBox(**sides)
        self.steps = widgets.QSpinBox(maximum=200, specialValueText="the model's own")
        self.seed = widgets.QSpinBox(minimum=-1, maximum=2**31 - 1, value=-1, specialValueText="random")
        self.generate_button = widgets.QPushButton("Generate", clicked=self.generate)
        self.cancel_button = widgets.QPushButton("Cancel", shortcut="Esc", clicked=lambda: self._cancel.set())
        self.save_button = widgets.QPushButton("Save ...", shortcut="Ctrl+S", clicked=self.save)
        self.prompt.returnPressed.connect(self.generate_button.click)
        self.bar, self.status = widgets.QProgressBar(), widgets.QLabel(wordWrap=True, minimumHeight=48)
        form, buttons, whole = widgets.QFormLayout(), widgets.QHBoxLayout(), widgets.QVBoxLayout(self)
        # with Alt the letter behind & is the field's key
        fields = (self.prompt, self.width_box, self.height_box, self.steps, self.seed)
        for name, field in zip(("&Prompt", "&Width", "&Height", "S&teps", "S&eed"), fields, strict=True):
            form.addRow(name, field)
        for button in (self.generate_button, self.cancel_button, self.save_button):
            buttons.addWidget(button)
        whole.addWidget(self.canvas, 1)
        for row in (buttons, self.bar, self.status):
            form.addRow(row)
        whole.addLayout(form)
        self._set_busy(True)

    def generate(self) -> None:
        """Ask for a picture; with an event of its own, so that a late cancel ends no later picture."""
        self._cancel = threading.Event()
        size, seed = (self.width_box.value(), self.height_box.value()), self.seed.value()
        options = {"size": size, "steps": self.steps.value() or None, "seed": None if seed < 0 else seed}
        self._set_busy(True)
        self.asked_to_draw.emit(self.prompt.text(), options, self._cancel)

    def save(self) -> None:
        """Write the picture with its metadata; the dialog has asked before it replaces a file."""
        name, _ = widgets.QFileDialog.getSaveFileName(
            self, "Save", "sana.png", "Pictures (*.png *.jpg *.webp)"
        )
        try:
            if name and self.picture is not None:
                self.status.setText(f"Saved {self.picture.save(name, force=True)}")
        except SanaError as error:
            self._on_failed(error.message, error.hint)

    def _on_ready(self, width: int, height: int) -> None:
        self.width_box.setValue(width)
        self.height_box.setValue(height)
        self._set_busy(False)
        self.status.setText("Ready")

    def _on_progress(self, name: str, done: int, count: int) -> None:
        self.bar.setValue(100 * done // max(count, 1))
        self.status.setText(name.capitalize())

    def _on_drawn(self, image: Image) -> None:
        self.picture = image
        self.canvas.show_image(to_qimage(image.pixels))
        self._set_busy(False)
        seconds = sum(image.timings.values())
        self.status.setText("\n".join([f"Seed {image.seed}, {seconds:.1f} s", *image.notes]))

    def _on_failed(self, message: str, hint: str) -> None:
        self._set_busy(False)
        self.status.setText(f"{message}\n{hint}".strip())

    def _set_busy(self, busy: bool) -> None:
        self.bar.reset()
        self.generate_button.setEnabled(not busy)
        self.cancel_button.setEnabled(busy)
        self.save_button.setEnabled(not busy and self.picture is not None)

    def closeEvent(self, event: QCloseEvent) -> None:
        """End the work, and its thread, before the window is gone."""
        self._cancel.set()
        self._thread.quit()
        self._thread.wait()


if __name__ == "__main__":
    application = widgets.QApplication(sys.argv)
    window = Window(sys.argv[1] if len(sys.argv) > 1 else "sana-tiny")
    window.show()
    sys.exit(application.exec())
