"""A walk over the pictures of a folder whose rows still lack something, in batches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from .imagefolder import BROKEN, LeftOut, open_picture
from .metadata import Metadata, Row, find_metadata


@dataclass(frozen=True)
class Batch:
    """Rows of one ``metadata.jsonl`` by name, and their pictures, RGB."""

    metadata: Metadata
    names: list[str]
    pictures: list[Image.Image]

    @property
    def rows(self) -> list[Row]:
        return [self.metadata.rows[name] for name in self.names]


def walk(folder: Path, lacks: Callable[[Row], bool], size: int, left_out: LeftOut) -> Iterator[Batch]:
    """Batches of at most ``size`` rows that lack something; what is updated in them is written at the end.

    Broken pictures are left out, and named there.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(metadata) for metadata in find_metadata(folder)]
        wanted = [(file, [name for name, row in file.rows.items() if lacks(row)]) for file in files]
        total = sum(len(names) for _, names in wanted)
        bar = stack.enter_context(tqdm(total=total, unit="picture", disable=not sys.stderr.isatty()))
        for metadata, names in wanted:
            for start in range(0, len(names), size):
                part = names[start : start + size]
                pictures = {name: found for name in part if (found := _open(metadata, name, left_out))}
                if pictures:
                    yield Batch(metadata, list(pictures), list(pictures.values()))
                bar.update(len(part))


def _open(metadata: Metadata, name: str, left_out: LeftOut) -> Image.Image | None:
    try:
        return open_picture(metadata.picture(name)).convert("RGB")
    except BROKEN as error:
        left_out.broken[name] = " ".join(str(error).split())
        return None
