"""What the commands of the training share: errors in one line, exit codes, and options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sana_edge.errors import SanaError, one_line
from sana_edge.system.memory import memory_errors
from sana_edge.system.threads import termination_as_interrupt

Run = Callable[[argparse.Namespace], None]


def start(parser: argparse.ArgumentParser, run: Run, argv: Sequence[str] | None = None) -> int:
    """Parse and run: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    arguments = parser.parse_args(argv)
    try:
        with termination_as_interrupt(), memory_errors("this command"):
            run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except SanaError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint:  {error.hint}", file=sys.stderr)
        return 1
    except Exception as error:  # also what nobody foresaw is one line to the user
        print(f"error: {one_line(f'{type(error).__name__}: {error}')}", file=sys.stderr)
        return 1
    return 0


def add_model_options(parser: argparse.ArgumentParser, model: str) -> None:
    """Options of a command that a frozen model adds to a folder's metadata with."""
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="pictures, with a metadata.jsonl or without")
    add("--model", type=Path, required=True, metavar="DIR", help=f"local folder of {model}")
    add("--batch", type=_positive, default=8, metavar="N", help="pictures at a time (default: %(default)s)")
    add("--device", metavar="NAME", help="torch device (default: cuda where it can be used, or cpu)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
