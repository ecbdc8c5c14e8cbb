"""What of a series is in its folder already, and what else is in the way."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image import is_whole, read_metadata
from sana_edge.series.pictures import Picture, check_folders
from sana_edge.system.json_values import shown

OTHER = "draw as before, or choose another --output"
# bad lines, changed pictures and failures that a message names
_NAMED = 5


def missing(
    pictures: Sequence[Picture],
    folder: Path,
    entries: Mapping[str, Mapping[str, Any]],
    model: Mapping[str, Any],
    *,
    force: bool,
) -> list[Picture]:
    """What is to be drawn.

    Args:
        entries: of the folder's manifest, by the names of files.
        model: what draws.

    Raises:
        InvalidInput: a folder is a link; without ``force``, a file is there that was drawn otherwise, or by
            something else.
    """
    check_folders(folder, pictures)
    left, changed, foreign = [], [], []
    for picture in pictures:
        path, entry = folder / picture.name, entries.get(picture.name)
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
        found = f"{len(foreign)} files in {folder} are in the way: {listed(foreign, len(foreign))}"
        raise InvalidInput(found, "choose another --output, or replace them with --force")
    if changed and not force:
        count = f"{len(changed)} pictures in {folder} were drawn otherwise"
        raise InvalidInput(f"{count}: {listed(changed, len(changed))}", OTHER + ", or add --force")
    return left


def listed(parts: Iterable[str], count: int, between: str = ", ") -> str:
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
