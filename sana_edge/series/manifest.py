"""``manifest.jsonl`` of a folder: which pictures are drawn and how, one line each, for one process at a time.

A line is on the disk before the next picture begins, and after the picture's own file: a process that is
killed loses the picture in work. What is left of a line that was not written to its end is cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.series.pictures import Picture
from sana_edge.system.atomic import cannot_write
from sana_edge.system.json_values import parse, read_bounded

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FILE = "manifest.jsonl"
_VERSION = 1
# of the first line
_BEGIN = b'{"sana_edge_series": '
_MOST = 4 << 30


class Manifest:
    """The manifest of a folder, locked until `close`.

    Attributes:
        entries: the newest line of each picture, by its file's name.
        seed: of the series, which the first line has.

    Raises:
        InvalidInput: the folder is a file, another process draws into it, or its manifest is none.
        SanaError: it cannot be read or written.
    """

    _file = -1

    def __init__(self, folder: Path, seed: int) -> None:
        self.path = folder / FILE
        if os.path.lexists(folder) and not folder.is_dir():
            raise InvalidInput(f"{folder} exists and is not a folder", "choose another --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # a link that came with the folder may lead to anybody's file
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            flags |= getattr(os, "O_BINARY", 0)
            self._file = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        try:
            self._lock(folder)
            known, self.entries, self._end = _read(self.path)
            os.ftruncate(self._file, self._end)
            self.seed = seed if known is None else known
            if known is None:
                self._append({"sana_edge_series": _VERSION, "seed": seed})
        except OSError as error:
            self.close()
            raise cannot_write(self.path, error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Manifest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process draw into the folder."""
        if self._file >= 0:
            # with the lock
            os.close(self._file)
        self._file = -1

    def __del__(self) -> None:
        # of an iterator that was never begun
        self.close()

    def write(self, picture: Picture, model: Mapping[str, Any], state: str, **more: Any) -> None:
        """Say what became of a picture: it is "done" or "failed".

        Args:
            model: what made it, whose change is noticed later.
        """
        entry = {
            "file": picture.name,
            "state": state,
            "line": picture.line,
            "model": dict(model),
            "options": picture.options,
            **more,
        }
        try:
            self._append(entry)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self.entries[picture.name] = entry

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = f"{json.dumps(entry)}\n".encode()
        try:
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            # of a full disk half a line
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(line)

    def _lock(self, folder: Path) -> None:
        try:
            if fcntl is None:
                import msvcrt

                # a byte that is never written
                os.lseek(self._file, 1 << 40, os.SEEK_SET)
                msvcrt.locking(self._file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
            else:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            hint = "wait until it is done, or choose another --output"
            raise InvalidInput(f"another process draws into {folder}", hint) from error
        except OSError:
            # no locks on this file system
            return


def known_seed(folder: Path) -> int | None:
    """The seed of the series in a folder; None where there is none."""
    path = folder / FILE
    try:
        return _read(path)[0] if path.is_file() else None
    except OSError as error:
        raise SanaError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error


def _read(path: Path) -> tuple[int | None, dict[str, dict[str, Any]], int]:
    """The seed, the newest entries and where the last whole line ends."""
    try:
        content = read_bounded(path, _MOST)
    except ValueError as error:
        raise InvalidInput(f"{path}: {error}", "choose another --output") from error
    end = content.rfind(b"\n") + 1
    if not end and content.strip(b"\0 \r") and not content.startswith(_BEGIN[: len(content)]):
        # not half a first line of ours, which would be cut off
        _header(None, path)
    entries: dict[str, dict[str, Any]] = {}
    seed, first = None, True
    for line in content[:end].split(b"\n")[:-1]:
        # of a machine that lost its power
        if not line.strip(b"\0 \r"):
            continue
        try:
            entry = parse(line)
        except ValueError:
            entry = None
        if first:
            seed, first = _header(entry, path), False
        elif isinstance(entry, dict) and isinstance(entry.get("file"), str):
            entries[entry["file"]] = entry
        # a line that is none is a picture that is drawn again
    return seed, entries, end


def _header(entry: Any, path: Path) -> int:
    values = entry if isinstance(entry, dict) else {}
    version, seed = values.get("sana_edge_series"), values.get("seed")
    if type(version) is not int or type(seed) is not int or seed < 0:
        hint = "choose another --output, or remove it, which draws all again"
        raise InvalidInput(f"{path} is no manifest of a series", hint)
    if version > _VERSION:
        raise InvalidInput(f"{path} is of a later sana-edge", "upgrade sana-edge, or choose another --output")
    return seed
