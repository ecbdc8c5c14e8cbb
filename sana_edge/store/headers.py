"""The names in files of weights: a safetensors header, and the text of a pickle, of which nothing is run."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from sana_edge.system.json_values import parse
from sana_edge.system.regular import open_regular

# bytes of a header or a pickle that are looked at
MOST = 64 << 20
_BLOCK = 1 << 20
# older files of torch are several pickles, one after the other
_PICKLES = 4
# of a pickle, which has some twenty for a tensor; and values of a header, which has seven
_STEPS, _VALUES = 1 << 20, 1 << 20
# bytes of a zip archive's directory that are looked at, and parts in it
_DIRECTORY, _PARTS = 8 << 20, 50_000


class TooMuch(ValueError):
    """A file has more of something than any checkpoint, and its reader would take for ever."""


def stored_names(path: Path) -> list[str]:
    """The names in a safetensors file's header; empty for other files."""
    try:
        with open_regular(path) as file:
            header = safetensors_header(file, path.stat().st_size)
    except (OSError, ValueError):
        return []
    return [name for name in header or {} if name != "__metadata__"]


def header_length(head: bytes, size: int) -> int | None:
    """Bytes of the header that a safetensors file begins with; None for other files."""
    if len(head) < 9 or head[8:9] != b"{":
        return None
    length = int(struct.unpack("<Q", head[:8])[0])
    return length if length <= min(size - 8, MOST) else None


def safetensors_header(file: IO[bytes], size: int) -> dict[str, Any] | None:
    """The entries of a safetensors file of so many bytes; None for other files.

    Raises:
        ValueError: the header is no JSON.
    """
    file.seek(0)
    length = header_length(file.read(9), size)
    if length is None:
        return None
    file.seek(8)
    header = parse(file.read(length), _VALUES)
    return header if isinstance(header, dict) else None


def is_covered(file: IO[bytes]) -> bool:
    """Whether a safetensors file ends where its last tensor does; it is at its beginning then.

    What follows may be a hole of a terabyte, which takes no room on a disk and hours to read.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        header = safetensors_header(file, size)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        ends = [entry["data_offsets"][1] for name, entry in (header or {}).items() if name != "__metadata__"]
        covered = header is not None and 8 + length + max(ends, default=0) == size
    except (ValueError, TypeError, LookupError):
        covered = False
    file.seek(0)
    return covered


def pickled_objects(path: Path) -> list[str]:
    """The functions and classes, "module.name", that a checkpoint of torch asks for; none is looked up."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(path):
            found = _asked(file)
        else:
            with open_archive(file) as archive, open_pickle(archive) as content:
                found = _asked(content)
    # Python 2's name, which the oldest protocols have
    return sorted({re.sub("^__builtin__", "builtins", name) for name in found})


def _asked(file: IO[bytes]) -> set[str]:
    return {argument.replace(" ", ".", 1) for name, argument in _opcodes(file) if name == "GLOBAL"}


def check_archive(path: Path) -> None:
    """See that the parts of a checkpoint of torch are what was written: by their CRC-32, where they have one.

    Raises:
        ValueError: a part is damaged, or compressed, as torch never does and which could be endless; or parts
            are the same bytes.
    """
    if not zipfile.is_zipfile(path):
        return
    with open_regular(path) as file, open_archive(file) as archive:
        if sum(part.compress_size for part in archive.infolist()) > path.stat().st_size:
            raise ValueError("it has parts that lie in one another")
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size:
                raise ValueError(f"{part.filename} in it is compressed: save it again with torch.save")
            # a file may be written without
            if part.CRC == 0:
                continue
            try:
                with archive.open(part) as content:
                    while content.read(_BLOCK):
                        pass
            except zipfile.BadZipFile as error:
                raise ValueError(f"its part {part.filename} is damaged: {error}") from error


def open_archive(file: IO[bytes]) -> zipfile.ZipFile:
    """A zip archive, whose directory is at its end and takes ten times as much in memory.

    Raises:
        TooMuch: it has more parts than any checkpoint.
        zipfile.BadZipFile: it is none.
    """
    file.seek(max(file.seek(0, os.SEEK_END) - _DIRECTORY, 0))
    # how each entry begins
    if file.read(_DIRECTORY).count(b"PK\1\2") > _PARTS:
        raise TooMuch(f"it has more than {_PARTS} parts")
    return zipfile.ZipFile(file)


def pickle_in(archive: zipfile.ZipFile) -> str:
    """The pickle in a file of torch; empty where a zip archive is none."""
    return next((name for name in archive.namelist() if name.endswith("data.pkl")), "")


def open_pickle(archive: zipfile.ZipFile) -> IO[bytes]:
    """The content of `pickle_in`, also in a file that was written without checksums."""
    part = copy.copy(archive.getinfo(pickle_in(archive)))
    if part.CRC == 0:
        # as zipfile knows one that has none
        del part.CRC
    return archive.open(part)


def pickled_text(file: IO[bytes]) -> list[str]:
    """The strings of a pickle, dictionaries' keys among them.

    A key inside of a dictionary does not tell in which: networks are found by their own tensors' names.
    """
    return [argument for name, argument in _opcodes(file) if "UNICODE" in name]


def _opcodes(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """The opcodes of a pickle that have text, and the text; nothing is run.

    Raises:
        TooMuch: there are more than any network has.
    """
    # a length that a pickle lies about is then of no more than this
    content = io.BytesIO(file.read(MOST))
    steps = 0
    # what is no pickle, or cut off, ends there
    with contextlib.suppress(ValueError):
        for _ in range(_PICKLES):
            for opcode, argument, _ in itertools.islice(pickletools.genops(content), _STEPS + 1 - steps):
                steps += 1
                if isinstance(argument, str):
                    yield opcode.name, argument
    if steps > _STEPS:
        raise TooMuch(f"its pickle has more than {_STEPS} steps")
