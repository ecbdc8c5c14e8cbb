"""Types of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import re

SIZE = re.compile(r"(-?\d+)x(-?\d+)")


def size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels."""
    match = SIZE.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512")
    return int(match.group(1)), int(match.group(2))
