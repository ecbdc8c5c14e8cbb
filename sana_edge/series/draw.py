"""Pictures of a series on a loaded model: those of one prompt read it once, and batches if asked for."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_edge.errors import Cancelled, OutOfMemory, SanaError
from sana_edge.image import QUALITY, Image, format_of
from sana_edge.pipeline import Sana
from sana_edge.progress import Progress
from sana_edge.series.pictures import Picture

logger = logging.getLogger("sana_edge")

MOST_BATCH = 64
# of `--batch auto`
LARGEST = 16
# a larger batch is worth it where a picture takes that much less
_WORTH = 0.95
# of one prompt, drawn one after another
_RUN = 64
# in which pictures of a batch may differ
_OWN = ("prompt", "negative_prompt", "seed", "variation")


@dataclass(frozen=True)
class Outcome:
    """What became of a picture: the bytes of its file, or an error."""

    picture: Picture
    data: bytes | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""

    @classmethod
    def of(cls, picture: Picture, image: Image, quality: int | None) -> Outcome:
        data = image.encode(format_of(Path(picture.name)), QUALITY if quality is None else quality)
        return cls(picture, data, image.metadata, image.timings, image.notes)

    @classmethod
    def failed(cls, picture: Picture, error: Exception) -> Outcome:
        if isinstance(error, SanaError):
            return cls(picture, error=error.message, hint=error.hint)
        # what nobody foresaw is no reason to lose a night
        logger.info("%s failed", picture.name, exc_info=error)
        return cls(picture, error=" ".join(f"{type(error).__name__}: {error}".split()))


class BatchSize:
    """How many pictures go through the denoiser at once: a number, or what turns out to be the fastest.

    Where that is asked for, with None, sizes are doubled as long as a picture takes less time.
    """

    def __init__(self, size: int | None = 1) -> None:
        self.size = size or 1
        self._settled = size is not None
        self._best: float | None = None

    def learn(self, count: int, seconds: float) -> None:
        """A batch of ``count`` pictures took so long."""
        if self._settled or count != self.size:
            return
        each = seconds / count
        if self._best is not None and each > _WORTH * self._best:
            self.size //= 2
            self._settled = True
        elif self.size == LARGEST:
            self._settled = True
        else:
            self._best = each
            self.size *= 2

    def refused(self, error: Exception) -> str:
        """A batch failed: smaller ones from now on; returns what to say."""
        self.size = self.size // 2 if isinstance(error, OutOfMemory) else 1
        self._settled = True
        logger.info("a batch failed", exc_info=error)
        told = error.message if isinstance(error, SanaError) else f"{type(error).__name__}: {error}"
        return f"batches of {self.size} from now on, as a larger one failed: {told}"


def chunks(pictures: Sequence[Picture], size: BatchSize, run: int = _RUN) -> Iterator[list[Picture]]:
    """Neighbours that are drawn together: batches, or the pictures of one prompt whose seeds count up."""
    first = 0
    while first < len(pictures):
        most, alike = (size.size, _batched) if size.size > 1 else (run, _counted)
        last = first + 1
        while last < len(pictures) and last - first < most and alike(pictures[last - 1], pictures[last]):
            last += 1
        yield list(pictures[first:last])
        first = last


def _counted(one: Picture, other: Picture) -> bool:
    # of variations it is another seed that counts up
    alike = {**one.options, "seed": one.options["seed"] + 1} == other.options
    return alike and "variation" not in one.options


def _batched(one: Picture, other: Picture) -> bool:
    shared = [{name: p.options[name] for name in p.options if name not in _OWN} for p in (one, other)]
    return shared[0] == shared[1] and "image" not in one.options


def draw(
    sana: Sana,
    pictures: Sequence[Picture],
    size: BatchSize,
    quality: int | None = None,
    on_progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[Outcome]:
    """Draw one of the `chunks`; errors become outcomes.

    Raises:
        Cancelled: ``cancel`` was set.
    """
    start, note = time.perf_counter(), ""
    if size.size > 1 and len(pictures) > 1:
        try:
            images = sana.batch([p.request() for p in pictures], on_progress=on_progress, cancel=cancel)
        except Cancelled:
            raise
        except Exception as error:
            # too many at once, or one of them, or none can be: each by itself
            note = size.refused(error)
        else:
            outcomes = [Outcome.of(p, image, quality) for p, image in zip(pictures, images, strict=True)]
            size.learn(len(pictures), time.perf_counter() - start)
            yield from outcomes
            return
        runs = [[picture] for picture in pictures]
    else:
        runs = [list(pictures)]
    for run in runs:
        for outcome in _one_prompt(sana, run, quality, on_progress, cancel):
            yield dataclasses.replace(outcome, notes=(*outcome.notes, note)) if note else outcome
    if not note:
        size.learn(1, (time.perf_counter() - start) / len(pictures))


def _one_prompt(
    sana: Sana,
    pictures: Sequence[Picture],
    quality: int | None,
    on_progress: Progress | None,
    cancel: threading.Event | None,
) -> Iterator[Outcome]:
    """Pictures whose seeds count up; one that fails does not take the others with it."""
    left = list(pictures)
    while left:
        try:
            arguments = left[0].arguments()
            stream = sana.stream(images=len(left), on_progress=on_progress, cancel=cancel, **arguments)
            with closing(stream) as steps:
                for step in steps:
                    if step.image is not None:
                        outcome = Outcome.of(left[0], step.image, quality)
                        del left[0]
                        yield outcome
        except Cancelled:
            raise
        except Exception as error:
            yield Outcome.failed(left.pop(0), error)
