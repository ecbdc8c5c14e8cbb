"""The diary of a long run: what is finished, so that the same command goes on after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


class Diary:
    """Rows of JSON beside the output, the first one saying which run they belong to.

    Rows of another run (other settings, model or benchmark code) are thrown away when the diary is opened.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self.rows = _read(self.path, run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # written again without a line that an interruption may have cut
        self._file = self.path.open("w", encoding="utf-8")
        for row in (run, *self.rows):
            self._write(row)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write(row)

    def finish(self) -> None:
        """Removes the file: the results are written."""
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Diary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def digest(paths: Iterable[Path]) -> str:
    """Changes when a file is written again, without reading models of gigabytes."""
    known = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        stat = path.stat()
        known.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return known.hexdigest()


def _read(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows[1:] if rows and rows[0] == run else []
