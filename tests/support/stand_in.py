"""What draws a series in no time: a painter and a model whose pictures show their seeds."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from sana_edge.generation import Step
from sana_edge.image import Image
from sana_edge.progress import Progress
from sana_edge.request.request import Request
from sana_edge.series.draw import Outcome
from sana_edge.series.pictures import Picture

MODEL = {"model": "stand-in", "dtype": "fp32", "backend": "none"}


def image_of(options: dict[str, Any]) -> Image:
    seed = options["seed"]
    metadata = {"prompt": options["prompt"], "seed": seed, **MODEL, "version": "0"}
    return Image(np.full((2, 2, 3), seed % 256, np.uint8), seed, metadata, {"denoise": 0.1})


def nothing(picture: Picture) -> None:
    pass


class StandIn:
    """A painter. ``before`` is told each picture first; what it raises is its failure."""

    def __init__(self, before: Callable[[Picture], None] = nothing, **model: Any) -> None:
        self.model = {**MODEL, **model}
        self.drawn: list[str] = []
        self._before = before

    def outcomes(
        self, pictures: Sequence[Picture], on_progress: Progress | None, cancel: threading.Event | None
    ) -> Iterator[Outcome]:
        for picture in pictures:
            try:
                self._before(picture)
            except Exception as error:
                yield Outcome.failed(picture, error)
                continue
            self.drawn.append(picture.name)
            if on_progress is not None:
                on_progress("denoise", 1, 1)
            yield Outcome.of(picture, image_of(picture.options), None)


class StandInSana:
    """A model. ``before`` is told each seed first; ``batches`` has the sizes of those it drew."""

    description = MODEL

    def __init__(self, before: Callable[[int], None] = lambda seed: None) -> None:
        self.runs: list[int] = []
        self.batches: list[int] = []
        self._before = before

    def stream(self, prompt: str, *, images: int, seed: int, **_: Any) -> Generator[Step, None, None]:
        self.runs.append(images)
        for index in range(images):
            self._before(seed + index)
            image = image_of({"prompt": prompt, "seed": seed + index})
            yield Step(index, images, image, functools.partial(getattr, image, "pixels"))

    def batch(self, requests: Sequence[Request], **_: Any) -> list[Image]:
        self.batches.append(len(requests))
        for request in requests:
            assert request.seed is not None
            self._before(request.seed)
        return [image_of({"prompt": request.prompt, "seed": request.seed}) for request in requests]
