"""What commands share: options, what is kept of a long run, names of results, and the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from harness import RESULTS
from sana_edge.errors import SanaError
from sana_edge.system.atomic import check_writable

# takes a line of progress
Say = Callable[[str], None]
# what results files call the implementations
OURS = "sana-edge"
INT8 = "sana-edge int8"
BASELINE = "diffusers"
HALF = "diffusers bf16"
# of the text encoder
BASELINE_TEXT = "transformers"
# its network under torch.compile, on a GPU
COMPILED = "diffusers compiled"
NAIVE_INT8 = "naive openvino int8"
NAIVE_INT8_BF16 = "naive openvino int8 bf16"
FASTEST = "openvino int8 bf16"
REFERENCES = (BASELINE, HALF, NAIVE_INT8, NAIVE_INT8_BF16)


def ended(run: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Runs a command: 0, 1 for an error, 130 for Ctrl-C, which `interrupted` is said to."""
    try:
        run()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (SanaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SanaError) and error.hint:
            print(f"hint:  {error.hint}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """The argument of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def words(text: str) -> list[str]:
    """The argument of an option that lists names."""
    return text.split(",")


def sizes(text: str) -> list[int]:
    """The argument of an option that lists sizes in pixels."""
    return [positive(part) for part in text.split(",")]


def output_for(options: argparse.Namespace, name: str) -> Path:
    """Where the results go, `--output` or a file of `RESULTS`.

    Raises:
        SanaError: nothing can be written there, said before anything is measured.
    """
    path: Path = options.output or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    return path


def say(title: str, line: str) -> None:
    """A line of progress."""
    print(f"{title}: {line}", file=sys.stderr, flush=True)


class Diary:
    """Rows of JSON beside the output, the first one saying which run they belong to.

    Rows of another run (other settings, model or benchmark code) are thrown away when the diary is opened.
    """

    def __init__(self, output: Path, run: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        self.rows = _earlier(self.path, run)
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


def _earlier(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows[1:] if rows and rows[0] == run else []


def files(results: Path, *patterns: str) -> list[dict[str, Any]]:
    """What files of these names hold, in order."""
    paths = [path for pattern in patterns for path in sorted(results.glob(f"{pattern}.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
