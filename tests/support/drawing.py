"""A model that draws at once: an even grey by its seed, lighter in INT8 the larger the seed."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np

from sana_edge.errors import SanaError
from sana_edge.evaluate.pictures import Source
from sana_edge.image import Image

SIDE = 32


class Grey:
    """Counts what it draws; `fails` has the prompts that it cannot draw."""

    def __init__(self, source: Source, fails: frozenset[str] = frozenset()) -> None:
        self.source, self.fails = source, fails
        self.drawn: list[str] = []
        # of how many pictures Ctrl-C comes after
        self.interrupt: int | None = None

    def __enter__(self) -> Grey:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def generate(self, prompt: str, *, seed: int, **options: Any) -> Image:
        if prompt in self.fails:
            raise SanaError("the numbers overflowed")
        if self.interrupt is not None and len(self.drawn) == self.interrupt:
            raise KeyboardInterrupt
        self.drawn.append(prompt)
        pixels = np.full((SIDE, SIDE, 3), 50 + 20 * seed + (seed + 1 if self.source.int8 else 0))
        metadata = {"prompt": prompt, "seed": seed, "version": "0"}
        return Image(pixels.astype(np.uint8), seed, metadata)
