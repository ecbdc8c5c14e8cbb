"""Command-line arguments that several commands take, and prompts from stdin."""

from __future__ import annotations

import argparse
import re
import sys

from sana_edge.errors import InvalidInput

SIZE = re.compile(r"(-?\d+)x(-?\d+)")
# what is read of stdin, in bytes: far more than the 300 tokens that a model reads
_MOST_PROMPT = 1 << 20


def size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(match.group(1)), int(match.group(2))


def add_revision(parser: argparse.ArgumentParser, of: str = "a repository") -> None:
    """Add ``--revision``."""
    text = f"of {of}: a branch, a tag or a commit (default: main, or the only one that is cached)"
    parser.add_argument("--revision", metavar="NAME", help=text)


def prompt_from_stdin() -> str:
    """All of stdin without white space around it.

    Raises:
        InvalidInput: it is longer than 1 MiB, or not UTF-8.
    """
    data = sys.stdin.buffer.read(_MOST_PROMPT + 1)
    if len(data) > _MOST_PROMPT:
        raise InvalidInput(
            f"stdin has more than {_MOST_PROMPT} bytes", "a model reads 300 tokens of a prompt"
        )
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt on stdin is not UTF-8: {error}", "convert it to UTF-8") from error
