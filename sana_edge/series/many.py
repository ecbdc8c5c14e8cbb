"""A series: what is asked for, what is there already, and the drawing of the rest into a folder."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image import is_whole, read_metadata
from sana_edge.progress import Progress
from sana_edge.request import MAX_SEED, random_seed
from sana_edge.series.draw import MOST_BATCH, BatchSize, Outcome, chunks, draw
from sana_edge.series.entries import Bad, Line, read_file, read_prompts
from sana_edge.series.manifest import Manifest, known_seed
from sana_edge.series.pictures import NAME, Picture, Settings, plan_pictures
from sana_edge.system.atomic import write_bytes
from sana_edge.system.json_values import shown

if TYPE_CHECKING:
    from sana_edge.pipeline import Sana

# bad lines, changed pictures and failures that a message names
_NAMED = 5
# of the model, what changes pixels by roundings alone
_SAME = ("backend",)


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
            raise InvalidInput(f"{folder} was drawn with seed {known}, not {seed}", _OTHER)
        wanted = known if known is not None else random_seed() if seed is None else seed
        settings = dataclasses.replace(settings, seed=wanted)
        self.pictures, self.bad = plan_pictures(lines, settings)
        if self.bad and (not skip_bad or not self.pictures):
            count = f"{len(self.bad)} line{'s are' if len(self.bad) > 1 else ' is'} bad"
            hint = "mend them, or pass over them with --skip-bad, in Python skip_bad=True"
            raise InvalidInput(f"{count}: {_list(map(str, self.bad), len(self.bad), '; ')}", hint)
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
        left = self._missing(model, force)
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
        return SanaError(f"{count}: {_list(named, len(self.failed), '; ')}", hint)

    def _taken(self, outcome: Outcome, model: Mapping[str, Any]) -> Drawn:
        picture = outcome.picture
        path = self.folder / picture.name
        drawn = Drawn(picture.index, picture.line, path, picture.options)
        if outcome.data is None:
            drawn = dataclasses.replace(drawn, error=outcome.error, hint=outcome.hint)
            self._manifest.write(picture, model, "failed", error=outcome.error, hint=outcome.hint)
            self.failed[picture.name] = drawn
            return drawn
        write_bytes(path, outcome.data)
        seconds = {stage: round(value, 3) for stage, value in outcome.timings.items()}
        more = {"metadata": outcome.metadata, "timings": seconds, "notes": list(outcome.notes)}
        self._manifest.write(picture, model, "done", **more)
        self.failed.pop(picture.name, None)
        return dataclasses.replace(
            drawn, metadata=outcome.metadata, timings=outcome.timings, notes=outcome.notes
        )

    def _missing(self, model: Mapping[str, Any], force: bool) -> list[Picture]:
        """What is to be drawn.

        Raises:
            InvalidInput: without ``force``, a file is there that was drawn otherwise, or by something else.
        """
        left, changed, foreign = [], [], []
        for picture in self.pictures:
            path, entry = self.folder / picture.name, self._manifest.entries.get(picture.name)
            if not os.path.lexists(path):
                left.append(picture)
            elif entry is None or entry.get("state") != "done":
                left.append(picture)
                if not _is_own(path, picture):
                    foreign.append(picture.name)
            elif not path.is_file():
                left.append(picture)
                foreign.append(picture.name)
            elif difference := _difference(entry, picture, model):
                left.append(picture)
                changed.append(f"{picture.name} ({difference})")
            elif not is_whole(path):
                left.append(picture)
        if foreign and not force:
            found = f"{len(foreign)} files in {self.folder} are in the way: {_list(foreign, len(foreign))}"
            raise InvalidInput(found, "choose another --output, or replace them with --force")
        if changed and not force:
            count = f"{len(changed)} pictures in {self.folder} were drawn otherwise"
            raise InvalidInput(f"{count}: {_list(changed, len(changed))}", _OTHER + ", or add --force")
        return left


_OTHER = "draw as before, or choose another --output"


def _list(parts: Iterable[str], count: int, between: str = ", ") -> str:
    """The first of some parts."""
    first = [part for part, _ in zip(parts, range(_NAMED), strict=False)]
    return between.join([*first, *([f"and {count - len(first)} more"] if count > len(first) else [])])


def _difference(entry: Mapping[str, Any], picture: Picture, model: Mapping[str, Any]) -> str:
    """What is different now; empty where nothing is."""
    before = {**_object(entry.get("model")), **_object(entry.get("options"))}
    now = {**model, **picture.options}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            was, today = (shown(of[name]) if name in of else "not given" for of in (before, now))
            return f"{name} was {was}, is {today}"
    return ""


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_own(path: Path, picture: Picture) -> bool:
    """Whether a file is the picture of a process that was killed before it could say so."""
    try:
        metadata = read_metadata(path)
    except SanaError:
        return False
    return all(metadata.get(name) == picture.options[name] for name in ("prompt", "seed"))


def check_batch(batch: Any) -> int | None:
    """A batch's size, None for "auto"."""
    if batch in (None, "auto"):
        return None
    if type(batch) is not int or not 1 <= batch <= MOST_BATCH:
        hint = f"choose a whole number from 1 to {MOST_BATCH}, or auto"
        raise InvalidInput(f"batch is {shown(batch)}", hint)
    return batch


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
