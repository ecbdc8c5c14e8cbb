"""The command-line parser: argparse, whose errors name what was meant and can be told as JSON."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import NoReturn

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")


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
