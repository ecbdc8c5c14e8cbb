"""The command line's arguments: a parser whose errors name what was meant, and what several commands take."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from sana_edge.errors import InvalidInput

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
SIZE = re.compile(r"(-?\d+)x(-?\d+)")
# what is read of stdin, in bytes: far more than the 300 tokens that a model reads
_MOST_PROMPT = 1 << 20


class UsageError(Exception):
    """A command line that is none; ``parser`` is the one whose usage helps."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser, self.message = parser, message


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        choice = _CHOICE.search(message)
        if choice is not None:
            message += _meant(choice[1], re.split(r"[', ]+", choice[2]))
        raise UsageError(self, message)

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Say that there are no such arguments, and which option was meant."""
        message = f"unrecognized arguments: {' '.join(unknown)}"
        options = [word for word in unknown if word.startswith("-")]
        if options:
            message += _meant(options[0].partition("=")[0], self._option_string_actions)
        elif unknown:
            message += " (a prompt of several words stands in quotes)"
        self.error(message)


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


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
