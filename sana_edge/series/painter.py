"""What draws the pictures of a series: a model in this process, or others."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sana_edge.errors import InvalidInput
from sana_edge.progress import Progress
from sana_edge.series.draw import MOST_BATCH, BatchSize, Outcome, chunks, draw
from sana_edge.series.pictures import Picture
from sana_edge.system.json_values import shown

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana


class Painter(Protocol):
    """What draws: this process with a model, or others."""

    @property
    def model(self) -> Mapping[str, Any]:
        """As `sana_edge.Sana.description` says."""

    def outcomes(
        self, pictures: Sequence[Picture], on_progress: Progress | None, cancel: threading.Event | None
    ) -> Iterator[Outcome]:
        """Each picture, once, in any order."""


class Local:
    """Draws with a model in this process.

    Args:
        batch: pictures that go through the denoiser at once; None for what is the fastest here.
        quality: of JPEG and WebP.
    """

    def __init__(self, sana: Sana, batch: int | None = 1, quality: int | None = None) -> None:
        self._sana, self._quality = sana, quality
        self._size = BatchSize(check_batch(batch))

    @property
    def model(self) -> Mapping[str, Any]:
        return self._sana.description

    def outcomes(
        self, pictures: Sequence[Picture], on_progress: Progress | None, cancel: threading.Event | None
    ) -> Iterator[Outcome]:
        for chunk in chunks(pictures, self._size):
            yield from draw(self._sana, chunk, self._size, self._quality, on_progress, cancel)


def check_batch(batch: Any) -> int | None:
    """A batch's size, None for "auto"."""
    if batch in (None, "auto"):
        return None
    if type(batch) is not int or not 1 <= batch <= MOST_BATCH:
        hint = f"choose a whole number from 1 to {MOST_BATCH}, or auto"
        raise InvalidInput(f"batch is {shown(batch)}", hint)
    return batch
