"""The folder of an evaluation: what is drawn is kept as PNGs, and drawn again only where that is needed.

evaluation.json     what the pictures are of: prompts, options, and the files of each model
NAME/00012.png      the picture of prompt 12 by that model
worst.png           the sheet of the worst pairs
results.json        the numbers
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sana_edge.errors import CheckpointError, InvalidInput, SanaError, reason
from sana_edge.evaluate.prompts import PromptSet
from sana_edge.image import Image, read_metadata
from sana_edge.init_image import read_image
from sana_edge.system import atomic
from sana_edge.system.json_values import read_json, shown
from sana_edge.system.regular import open_regular

RECORD = "evaluation.json"
SHEET, RESULTS = "worst.png", "results.json"
FORMAT = 1
_PICTURE = re.compile(r"\d{5,}\.png")
_ANEW = "choose another --output, or add --force to draw all of it anew"
_SLICES, _SLICE = 64, 4096
"""What a fingerprint reads of each file: so many pieces of so many bytes."""


@dataclass(frozen=True)
class Source:
    """Who draws.

    Attributes:
        label: the name of its folder, and in the table.
        model: as it was asked for.
        int8: whether it is loaded in INT8.
        files: the fingerprint of its files.
    """

    label: str
    model: str
    int8: bool
    files: str


def fingerprint(folder: Path) -> str:
    """Changes with a model's files, of which pieces all over are read: gigabytes take a moment.

    Raises: CheckpointError: a file cannot be read.
    """
    known = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            known.update(f"{path.relative_to(folder).as_posix()} ".encode(errors="surrogatepass"))
            for piece in _pieces(path):
                known.update(piece)
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error}", "see who may read its files") from error
    return known.hexdigest()


def _pieces(path: Path) -> Iterator[bytes]:
    """The size, and the whole content or slices at even distances."""
    size = path.stat().st_size
    yield f"{size}\n".encode()
    with open_regular(path) as file:
        if size <= _SLICES * _SLICE:
            yield file.read()
            return
        for i in range(_SLICES):
            file.seek(i * (size - _SLICE) // (_SLICES - 1))
            yield file.read(_SLICE)


class Pictures:
    """What was drawn of a prompt set with certain options, by source and number."""

    def __init__(self, folder: Path, prompts: PromptSet, options: Mapping[str, Any]) -> None:
        """Args: options: of the drawing, JSON values; "seed" is the first prompt's, counting up."""
        self.folder, self.prompts = folder, prompts
        self._about = {
            "prompts": {"name": prompts.name, "sha256": prompts.checksum, "count": len(prompts.texts)},
            "options": dict(options),
        }
        self._seed = int(options["seed"])

    def open(self, sources: list[Source], *, force: bool) -> None:
        """Make the folder, or see that what is there is of the same evaluation.

        Args:
            force: remove what is there, where it is an evaluation.

        Raises:
            InvalidInput: other prompts, options or models, or no evaluation; it says which.
            SanaError: it cannot be written.
        """
        if os.path.lexists(self.folder) and not os.path.isdir(self.folder):
            raise InvalidInput(f"{self.folder} exists and is not a folder", "choose another --output")
        record = self.folder / RECORD
        there = os.path.lexists(record)
        # a killed process may have left a scratch folder, whose name starts with a dot
        if not there and any(not path.name.startswith(".") for path in self.folder.glob("*")):
            raise InvalidInput(
                f"{self.folder} is not empty and no evaluation", "choose another --output for the pictures"
            )
        known: dict[str, Any] = {}
        # a record alone is of a run that drew nothing: nobody misses it
        if there and (force or not any(self.folder.glob("*/*.png"))):
            self._remove()
        elif there:
            known = self._check(record, sources)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise atomic.cannot_write(self.folder, error) from error
        made = known | {source.label: asdict(source) for source in sources}
        for source in sources:
            if (place := self.folder / source.label).is_symlink():
                raise InvalidInput(f"{place} is a link", "remove it, or choose another --output")
        atomic.write_json(record, {"format": FORMAT, **self._about, "sources": made}, follow=False)

    def _check(self, record: Path, sources: list[Source]) -> dict[str, Any]:
        """The sources of the record, if it is of the same evaluation."""
        try:
            found = read_json(record)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"cannot read {record}: {reason(error)}", _ANEW) from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise InvalidInput(f"{record} is not of this version", _ANEW)
        for part, now in self._about.items():
            then = _object(found.get(part))
            for name, value in now.items():
                what = {"sha256": part, "name": "the name of the prompts"}.get(name, name)
                _refuse_other(self.folder, what, then.get(name), value)
        known = _object(found.get("sources"))
        for source in sources:
            if source.label in known:
                then = _object(known[source.label])
                # a model may be named in several ways
                _refuse_other(self.folder, f"int8 of {source.label}", then.get("int8"), source.int8)
                _refuse_other(self.folder, f"the files of {source.label}", then.get("files"), source.files)
        return known

    def _remove(self) -> None:
        """Remove what an evaluation writes, and nothing else."""
        try:
            for path in [
                *self.folder.glob("*/*.png"),
                *self.folder.glob("*.png"),
                *self.folder.glob("*.json"),
            ]:
                # a linked folder is not one of an evaluation's
                own = _PICTURE.fullmatch(path.name) or path.name in (SHEET, RESULTS)
                if own and (path.parent == self.folder or not path.parent.is_symlink()):
                    path.unlink()
            (self.folder / RECORD).unlink()
        except OSError as error:
            raise atomic.cannot_write(self.folder, error) from error

    def path(self, source: Source, number: int) -> Path:
        return self.folder / source.label / f"{number:05}.png"

    def seed(self, number: int) -> int:
        return self._seed + number

    def has(self, source: Source, number: int) -> bool:
        """Whether the picture is there, whole, and of this prompt and seed."""
        path = self.path(source, number)
        try:
            made = read_metadata(path)
            read_image(path)
        except SanaError:
            return False
        return (made.get("prompt"), made.get("seed")) == (self.prompts.texts[number], self.seed(number))

    def add(self, source: Source, number: int, image: Image) -> None:
        """Keep a picture.

        Raises:
            SanaError: the disk is full, or the folder cannot be written.
        """
        path = self.path(source, number)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise atomic.cannot_write(path, error) from error
        atomic.write_bytes(path, image.png(), follow=False)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _refuse_other(folder: Path, name: str, then: Any, now: Any) -> None:
    if then != now:
        was, today = ("not given" if value is None else shown(value) for value in (then, now))
        told = f"was {was}, and is {today}"
        if isinstance(now, str) and len(now) == 64:
            told = "are others"
        raise InvalidInput(f"{folder} has another evaluation: {name} {told}", _ANEW)
