"""Where the pictures of ``generate`` go, and what it prints about each."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sana_edge.errors import InvalidInput

if TYPE_CHECKING:
    from sana_edge.image import Image

NAME = "sana-{seed}.png"
# in place of a path: the PNG's bytes
STDOUT = "-"


class Output:
    """The files of one call, or stdout; checked before anything is computed.

    Args:
        labels: of the pictures, see `sana_edge.request.request.Request.labels`.

    Raises:
        InvalidInput: a file is in the way, or the name's end is no format, or stdout cannot take a picture.
        SanaError: the folder cannot be written to.
    """

    def __init__(self, arguments: argparse.Namespace, labels: Sequence[str]) -> None:
        from sana_edge.image import format_of, refuse_overwrite
        from sana_edge.system.atomic import check_writable

        self._arguments = arguments
        self._said: set[str] = set()
        self._paths: Iterator[Path] = iter(())
        self.to_stdout = arguments.output == STDOUT
        if self.to_stdout:
            _check_stdout(arguments, len(labels))
            return
        paths = _paths(arguments.output, labels)
        for path in paths:
            format_of(path, arguments.quality)
            refuse_overwrite(path, force=arguments.force)
        check_writable(paths[0])
        self._paths = iter(paths)

    def write(self, image: Image, peak_memory: int | None) -> None:
        """Save a picture and print its path, or its JSON line, and on stderr its times and notes."""
        from tqdm import tqdm

        arguments = self._arguments
        seconds = {stage: round(value, 3) for stage, value in image.timings.items()}
        if self.to_stdout:
            sys.stdout.buffer.write(image.png())
        else:
            path = image.save(next(self._paths), force=arguments.force, quality=arguments.quality)
            line = str(path)
            if arguments.json:
                entry = {"path": line, **image.metadata, "timings": seconds, "peak_memory": peak_memory}
                line = json.dumps({**entry, "notes": image.notes})
            # tqdm.write keeps a bar on the same terminal intact
            tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
        if not arguments.quiet:
            width, height = image.metadata["size"]
            spent = ", ".join(f"{stage} {value:.2f} s" for stage, value in seconds.items())
            made = f"{width}x{height}, seed {image.seed}, {image.metadata['backend']}"
            tqdm.write(f"{made}: {spent}", file=sys.stderr)
            for note in image.notes:
                self.note(note)

    def note(self, note: str) -> None:
        """Print a note on stderr, once."""
        from tqdm import tqdm

        if note not in self._said and not self._arguments.quiet:
            tqdm.write(f"note:  {note}", file=sys.stderr)
        self._said.add(note)


def _check_stdout(arguments: argparse.Namespace, count: int) -> None:
    if arguments.json:
        raise InvalidInput("--json and --output - both write to stdout", "leave out one of them")
    if count != 1:
        raise InvalidInput(f"--output - is one picture, not {count}", "give a folder as the output")
    if arguments.quality is not None:
        raise InvalidInput("--output - writes a PNG, which has no quality", "leave out --quality")
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        raise InvalidInput("stdout is a terminal, which cannot show a PNG", "add > picture.png, or a pipe")


def _paths(output: str, labels: Sequence[str]) -> list[Path]:
    """One path for each picture: the seed stands where {seed} does, or at the end if there are several."""
    path = Path(output)
    if os.path.isdir(path):
        path = path / NAME
    if not path.suffix:
        raise InvalidInput(
            f"output {output} does not end in .png, .jpg or .webp", "give such a file or an existing folder"
        )
    if len(labels) > 1 and "{seed}" not in path.name:
        path = path.with_name(f"{path.stem}-{{seed}}{path.suffix}")
    return [path.with_name(path.name.replace("{seed}", label)) for label in labels]
