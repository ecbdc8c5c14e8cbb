"""``metadata.jsonl`` of an imagefolder: read, added to row by row, never half written.

A row is an object with ``file_name``, relative to the file's folder, ``captions``, a list of strings (or
``text``, a string or such a list), and whatever else there is, which is kept. New values go to a journal
beside the file first. A killed process leaves it behind, and the next one reads it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.system.atomic import new_file
from sana_edge.system.json_values import parse
from sana_edge.system.regular import append_regular, open_regular

NAME = "metadata.jsonl"
_HALF = re.compile("[\ud800-\udfff]")
_FULL = "check the free space and the permissions; the same command goes on from here"

Row = dict[str, Any]


class Metadata:
    """One ``metadata.jsonl``; as a context it is written anew at the end, where something was updated.

    Attributes:
        rows: by ``file_name``, in the order of the file.
    """

    def __init__(self, file: Path) -> None:
        """Read the file, if there is one, and the journal of a killed process.

        Raises:
            InvalidInput: a line that is not a row.
        """
        self.file, self.journal = file, file.with_name(f".{file.name}.journal")
        self.rows: dict[str, Row] = {}
        if file.exists():
            for number, row in enumerate(_objects(file), 1):
                if not isinstance(row.get("file_name"), str):
                    raise InvalidInput(
                        f"{file}: row {number} has no file_name", "every row names its picture"
                    )
                self.rows[row["file_name"]] = row
        if self.journal.exists():
            for values in _objects(self.journal, cut=True):
                if not isinstance(values.get("file_name"), str):
                    continue
                self.rows.setdefault(values["file_name"], {}).update(values)

    def picture(self, name: str) -> Path:
        """The path of a row's picture."""
        return self.file.parent / name

    def update(self, name: str, **values: Any) -> None:
        """Give a row new values; from now on they survive the process.

        Raises:
            SanaError: they cannot be written.
        """
        self.rows[name].update(values)
        line = _line({"file_name": name, **values})
        try:
            # a line that a full disk cut before is ended first
            with append_regular(self.journal) as journal:
                journal.seek(max(journal.seek(0, 2) - 1, 0))
                journal.write(b"\n" * (journal.read(1) not in (b"", b"\n")) + line.encode())
        except OSError as error:
            raise SanaError(f"cannot write {self.journal}: {error}", _FULL) from error

    def __enter__(self) -> Metadata:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Write the file and remove the journal; after an error the journal stays where this fails."""
        if not self.journal.exists():
            return
        try:
            with new_file(self.file, follow=False) as partial:
                partial.write_text("".join(map(_line, self.rows.values())), encoding="utf-8")
            self.journal.unlink()
        except (OSError, SanaError) as problem:
            if kind is None:
                if isinstance(problem, SanaError):
                    raise SanaError(problem.message, _FULL) from problem
                raise SanaError(f"cannot write {self.file}: {problem}", _FULL) from problem


def find_metadata(folder: Path) -> list[Metadata]:
    """Every ``metadata.jsonl`` under a folder; one with a row for each picture where there is none yet.

    Raises:
        InvalidInput: no folder, or no pictures in it.
    """
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", "give a folder with pictures")
    other = [path.name for suffix in ("csv", "parquet") for path in folder.rglob(f"metadata.{suffix}")]
    if other:
        raise InvalidInput(f"{folder} has {other[0]}, which is not written here", f"make it a {NAME}")
    found = [Metadata(file) for file in sorted(folder.rglob(NAME))]
    if found:
        return found
    suffixes = Image.registered_extensions()
    metadata = Metadata(folder / NAME)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in suffixes and path.is_file():
            name = path.relative_to(folder).as_posix()
            metadata.rows.setdefault(name, {"file_name": name})
    if not metadata.rows:
        raise InvalidInput(f"{folder} has no pictures", "give a folder with .png, .jpg or .webp files")
    return [metadata]


def captions(row: Row) -> list[str]:
    """A row's captions as they stand, empty ones included."""
    found = row.get("captions") or row.get("text") or []
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return [text if isinstance(text, str) else "" for text in texts]


def captioned_by(row: Row) -> list[str]:
    """The models whose captions a row has."""
    found = row.get("captioned_by")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _line(row: Row) -> str:
    text = f"{json.dumps(row, ensure_ascii=False)}\n"
    # half of a surrogate pair, which a file may have in an escape, is no UTF-8
    return f"{json.dumps(row)}\n" if _HALF.search(text) else text


def _objects(file: Path, *, cut: bool = False) -> Iterator[Row]:
    """The objects of a file of JSON lines; where ``cut``, a line that was not written whole is left out."""
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8", errors="replace") as opened:
            text = opened.read()
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror or error}", "mend or remove it") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = parse(line)
        except ValueError as error:
            if cut:
                continue
            raise InvalidInput(f"{file}, line {number}, is not JSON: {error}", "mend or remove it") from error
        if cut and not isinstance(value, dict):
            continue
        if not isinstance(value, dict):
            raise InvalidInput(f"{file}, line {number}, is not an object", "mend or remove it")
        yield value
