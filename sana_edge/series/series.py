"""A series: the pictures that are asked for, and the drawing into a folder of those that are not there."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.progress import Progress
from sana_edge.request.bounds import MAX_SEED
from sana_edge.request.plan import random_seed
from sana_edge.series.draw import Outcome
from sana_edge.series.entries import Bad, Line
from sana_edge.series.folder import OTHER, listed, missing
from sana_edge.series.manifest import Manifest, known_seed
from sana_edge.series.painter import Painter
from sana_edge.series.pictures import Settings, plan_pictures
from sana_edge.system.atomic import write_bytes
from sana_edge.system.json_values import shown

# of the model, what changes pixels by roundings alone
_SAME = ("backend",)


@dataclass(frozen=True)
class Drawn:
    """A picture of a series that is on the disk now, or has failed.

    Attributes:
        index: from 1, over the pictures of the series.
        line: of the prompts, from 1.
        path: of its file.
        options: what was asked for, as arguments of `sana_edge.Sana.generate`.
        metadata, timings, notes: those of `sana_edge.Image`; empty where it failed.
        error, hint: why it failed; empty where it did not.
    """

    index: int
    line: int
    path: Path
    options: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""


class Series:
    """The pictures of a file of prompts in a folder, which is this process's alone until `close`.

    Attributes:
        folder: where they go.
        pictures: all of them.
        bad: lines that are passed over.
        kept: how many were there already, once `draw` has begun.
        failed: those that have failed, by the names of their files.

    Args:
        lines: of prompts.
        settings: what holds for all; without a seed of its own that of the folder's series goes on.
        seed: of the first picture.
        skip_bad: pass over bad lines.

    Raises:
        InvalidInput: a line is bad, the folder is a file, another process draws into it, or it was drawn
            with another seed.
        SanaError: the folder cannot be written to.
    """

    def __init__(
        self,
        lines: Iterable[Line | Bad],
        folder: Path,
        settings: Settings,
        *,
        seed: int | None = None,
        skip_bad: bool = False,
    ) -> None:
        self.folder = folder
        self.kept = 0
        self.failed: dict[str, Drawn] = {}
        known = known_seed(folder)
        if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
            raise InvalidInput(f"seed is {shown(seed)}", f"choose a whole number from 0 to {MAX_SEED}")
        if None not in (seed, known) and seed != known:
            raise InvalidInput(f"{folder} was drawn with seed {known}, not {seed}", OTHER)
        wanted = known if known is not None else random_seed() if seed is None else seed
        settings = dataclasses.replace(settings, seed=wanted)
        self.pictures, self.bad = plan_pictures(lines, settings)
        if self.bad and (not skip_bad or not self.pictures):
            count = f"{len(self.bad)} line{'s are' if len(self.bad) > 1 else ' is'} bad"
            hint = "mend them, or pass over them with --skip-bad, in Python skip_bad=True"
            raise InvalidInput(f"{count}: {listed(map(str, self.bad), len(self.bad), '; ')}", hint)
        self._manifest = Manifest(folder, wanted)
        if self._manifest.seed != wanted:
            self.close()
            raise InvalidInput(f"another process has just drawn into {folder}", "give the same command again")

    def __enter__(self) -> Series:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes draw into the folder."""
        self._manifest.close()

    def draw(
        self,
        painter: Painter,
        *,
        force: bool = False,
        retries: int = 0,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Drawn]:
        """Draw what is not there yet, and yield each picture when it is on the disk, or has failed.

        Args:
            force: replace pictures that were drawn with other options, and files that are no pictures of it.
            retries: how often those that failed are drawn again at the end.

        Raises:
            InvalidInput: something is there that is not replaced.
            Cancelled: ``cancel`` was set.
            SanaError: a picture could not be written; those before it are kept.
        """
        model = {name: value for name, value in painter.model.items() if name not in _SAME}
        left = missing(self.pictures, self.folder, self._manifest.entries, model, force=force)
        self.kept = len(self.pictures) - len(left)
        for _ in range(retries + 1):
            for outcome in painter.outcomes(left, on_progress, cancel):
                yield self._taken(outcome, model)
            left = [picture for picture in left if picture.name in self.failed]
            if not left:
                return

    @property
    def failures(self) -> SanaError | None:
        """What to say of those that have failed."""
        if not self.failed:
            return None
        named = (f"{one.path.name} (line {one.line}): {one.error}" for one in self.failed.values())
        count = f"{len(self.failed)} of {len(self.pictures)} pictures failed"
        hint = "the same command draws them again; manifest.jsonl names them"
        return SanaError(f"{count}: {listed(named, len(self.failed), '; ')}", hint)

    def _taken(self, outcome: Outcome, model: Mapping[str, Any]) -> Drawn:
        picture = outcome.picture
        path = self.folder / picture.name
        drawn = Drawn(picture.index, picture.line, path, picture.options)
        if outcome.data is None:
            drawn = dataclasses.replace(drawn, error=outcome.error, hint=outcome.hint)
            self._manifest.write(picture, model, "failed", error=outcome.error, hint=outcome.hint)
            self.failed[picture.name] = drawn
            return drawn
        write_bytes(path, outcome.data, follow=False)
        seconds = {stage: round(value, 3) for stage, value in outcome.timings.items()}
        more = {"metadata": outcome.metadata, "timings": seconds, "notes": list(outcome.notes)}
        self._manifest.write(picture, model, "done", **more)
        self.failed.pop(picture.name, None)
        return dataclasses.replace(
            drawn, metadata=outcome.metadata, timings=outcome.timings, notes=outcome.notes
        )
