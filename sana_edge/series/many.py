"""A file of prompts drawn into a folder: prompts, settings and a painter become a series."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_edge.progress import Progress
from sana_edge.series.entries import read_file, read_prompts
from sana_edge.series.painter import Local, Painter, check_batch
from sana_edge.series.pictures import NAME, Settings
from sana_edge.series.series import Drawn, Series

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana


def generate_many(
    painter: Sana | Painter,
    prompts: str | os.PathLike[str] | Iterable[str | Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    images: int = 1,
    seed: int | None = None,
    combinations: bool = False,
    wildcards: str | os.PathLike[str] | None = None,
    literal: bool = False,
    name: str = NAME,
    quality: int | None = None,
    batch: int | str = 1,
    skip_bad: bool = False,
    force: bool = False,
    retries: int = 0,
    on_progress: Progress | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Iterator[Drawn]:
    """Draw a file of prompts into a folder, and yield each picture once it is there, or has failed.

        with Sana.load("sana-tiny") as sana:
            for drawn in generate_many(sana, ["a red house", {"prompt": "a boat", "seed": 7}], "pictures"):
                print(drawn.path, drawn.error)

    What the folder's manifest.jsonl has as drawn is not drawn again. Lines are checked at once; the folder is
    this process's alone from then until the iterator is used up, closed or collected.

    Args:
        painter: a loaded model, or the workers of a `sana_edge.series.cluster.Cluster`.
        prompts: a .txt, .jsonl or .csv file; or prompts, and objects as a line of JSON has them.
        output: the folder.
        images: pictures of each prompt whose line does not say.
        seed: of the first picture, from which those of prompts without a seed count up; left out, that of
            the folder's manifest, or a random one.
        combinations: draw every text that a template stands for; else a random one, by the picture's seed.
        wildcards: a folder of .txt files that templates name.
        literal: prompts are no templates.
        name: of files, with {index}, {seed}, {line} and {prompt}.
        quality: of .jpg and .webp.
        batch: pictures that go through the denoiser at once; "auto" for what is the fastest here. More than
            one changes pixels by roundings: see `sana_edge.Sana.batch`.
        skip_bad: pass over lines that are bad.
        force: replace pictures that were drawn with other options, and files that are in the way.
        retries: how often those that failed are drawn again at the end.
        on_progress, cancel: as of `sana_edge.Sana.generate`.
        options: of `sana_edge.Sana.generate`, for what a line leaves open.

    Raises:
        InvalidInput: a line is bad, or the folder has something that is not replaced; nothing was drawn.
        Cancelled: ``cancel`` was set; what was drawn stays.
        SanaError: a picture could not be written.
    """
    from sana_edge.pipeline import Sana

    size = check_batch(batch)
    settings = Settings(
        options=options,
        images=images,
        combinations=combinations,
        literal=literal,
        wildcards=None if wildcards is None else Path(wildcards),
        name=name,
        quality=quality,
        folder=Path(prompts).parent if isinstance(prompts, str | os.PathLike) else Path(),
    )
    lines = read_file(Path(prompts)) if isinstance(prompts, str | os.PathLike) else read_prompts(prompts)
    series = Series(lines, Path(output), settings, seed=seed, skip_bad=skip_bad)
    used = Local(painter, size, quality) if isinstance(painter, Sana) else painter

    def drawn() -> Iterator[Drawn]:
        with series:
            yield from series.draw(used, force=force, retries=retries, on_progress=on_progress, cancel=cancel)

    return drawn()
