"""Bounds of what can be asked for, and what is taken where it is not; errors that name both."""

from __future__ import annotations

import numbers
from typing import Any

from sana_edge.config import LATENT_CELL
from sana_edge.errors import InvalidInput
from sana_edge.system.json_values import shown

MAX_SIDE = 8192
MAX_STEPS = 1000
MAX_IMAGES = 10_000
MAX_GUIDANCE = 1000
MAX_SHIFT = 100
MAX_INSTRUCTION = 20_000
# characters, of which 300 tokens are read
MAX_PROMPT = 100_000
MAX_SEED = 2**63 - 1
# as diffusers has it
DEFAULT_STRENGTH = 0.6
# of variations: of a seed's noise, and of an image
VARIATION_STRENGTH = 0.2
IMAGE_VARIATION_STRENGTH = 0.3
# of one picture, each a variation of the one before
MAX_VARIATION = 16


def check_text(text: Any, name: str, most: int = MAX_PROMPT) -> None:
    if not isinstance(text, str):
        raise InvalidInput(f"the {name} is {shown(text)}", "give a string")
    if len(text) > most:
        raise InvalidInput(f"the {name} has {len(text)} characters", f"give at most {most}")


def plain(value: Any) -> Any:
    """Numbers of any library, alone or in a row, as Python's own, which JSON and torch take.

    What is no number is returned as it is, to be refused in its own words.
    """
    # numpy's scalars and arrays, and torch's
    if callable(convert := getattr(value, "tolist", None)):
        value = convert()
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    if isinstance(value, bool | int | float):
        return value
    try:
        if isinstance(value, numbers.Integral):
            return int(value)
        return float(value) if isinstance(value, numbers.Real) else value
    # a fraction of huge numbers
    except OverflowError:
        return value


def check_whole(value: Any, name: str, low: int, high: int, usual: str = "") -> None:
    # bool is an int to Python
    if type(value) is not int or not low <= value <= high:
        raise InvalidInput(
            f"{name} is {shown(value)}",
            f"choose a whole number from {low} to {high}" + (f"; {usual}" if usual else ""),
        )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_guidance(value: Any) -> None:
    if not is_number(value) or not 0 <= value <= MAX_GUIDANCE:
        raise InvalidInput(
            f"guidance is {shown(value)}",
            f"choose a number from 0 to {MAX_GUIDANCE}; 4.5 is usual, 1 turns guidance off",
        )


def check_strength(value: Any, name: str = "strength", usual: str = "0.6") -> None:
    if not is_number(value) or not 0 < value <= 1:
        hint = (
            f"choose a number above 0, at most 1, where nothing of the first picture stays; {usual} is usual"
        )
        raise InvalidInput(f"{name} is {shown(value)}", hint)


def pairs(variation: Any) -> tuple[tuple[Any, Any], ...]:
    """Seeds and strengths.

    Raises:
        InvalidInput: the value is no list of pairs, or too long.
    """
    pairs = isinstance(variation, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 for pair in variation
    )
    if not pairs or len(variation) > MAX_VARIATION:
        hint = f"give at most {MAX_VARIATION} pairs of a seed and a strength, such as [[8, 0.2]]"
        raise InvalidInput(f"variation is {shown(variation)}", hint)
    return tuple(variation)


def check_variation(variation: Any, images: int) -> None:
    found = pairs(variation)
    for number, (seed, strength) in enumerate(found, start=1):
        counted = images - 1 if number == len(found) else 0
        check_whole(seed, "variation seed", 0, MAX_SEED - counted)
        check_strength(strength, "variation strength", "0.2")


def check_shift(value: Any) -> None:
    if not is_number(value) or not 0 < value <= MAX_SHIFT:
        hint = f"choose a number above 0, at most {MAX_SHIFT}; 3 is usual, 4 for the 0.6B at 1024 px"
        raise InvalidInput(f"flow shift is {shown(value)}", hint)


def check_tile(value: Any) -> None:
    fits = type(value) is int and (value == 0 or (2 * LATENT_CELL <= value <= MAX_SIDE))
    if not fits or value % LATENT_CELL:
        hint = f"choose a multiple of {LATENT_CELL} from {2 * LATENT_CELL} to {MAX_SIDE}, 1024 is usual;"
        raise InvalidInput(f"tile is {shown(value)}", f"{hint} or 0 for none, which is --tile off")


def check_size(size: Any, *, exact: bool) -> None:
    if not isinstance(size, tuple) or len(size) != 2 or any(type(side) is not int for side in size):
        raise InvalidInput(f"size is {shown(size)}", "give width and height in pixels, such as (512, 512)")
    width, height = size
    named, least = f"{shown(width)}x{shown(height)}", LATENT_CELL if exact else 1
    if min(size) < least:
        raise InvalidInput(f"size {named} is too small", f"choose sides of at least {least}")
    if max(size) > MAX_SIDE:
        raise InvalidInput(f"size {named} is too large", f"choose sides of at most {MAX_SIDE}")
    if exact and (width % LATENT_CELL or height % LATENT_CELL):
        below = "x".join(str(max(side // LATENT_CELL, 1) * LATENT_CELL) for side in size)
        above = "x".join(str(-(-side // LATENT_CELL) * LATENT_CELL) for side in size)
        hint = f"try {below} or {above}, or leave out the exact size: any is then resized to"
        raise InvalidInput(f"size {named} is not a multiple of {LATENT_CELL}", hint)
