"""The 553 prompts of GenEval, made by its published rules (Ghosh et al. 2023, arXiv 2310.11513; MIT licence).

Six templates over the 80 classes of COCO under GenEval's names, drawn by numpy's generator from seed 43, a
hundred a template (single object: each class once), repeated ones dropped: 80, 99, 80, 94, 100 and 100.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sana_edge.errors import SanaError

SEED = 43
DRAWS = 100
"""Of each template but the first, before repeated prompts are dropped."""
PERSON = "person"
"""The first class: it is never asked for in a colour."""
CLASSES = (
    *(PERSON, "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase"),
    *("frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard"),
    *("surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake"),
    *("chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse"),
    *("tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink"),
    *("refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
CHECKSUM = "4de60dfc3c29f9d3db69ec45cf03a964627c2d82f2c224c3f75645e137f7126b"
"""SHA-256 of the prompts, one a line."""


@dataclass(frozen=True)
class GenEvalPrompt:
    category: str
    text: str


@lru_cache(maxsize=1)
def prompts() -> tuple[GenEvalPrompt, ...]:
    """All prompts in GenEval's order.

    Raises:
        SanaError: this numpy draws other numbers, so that these would be other prompts.
    """
    rng = np.random.default_rng(SEED)
    found = tuple(dict.fromkeys(GenEvalPrompt(name, f"a photo of {text}") for name, text in _drawn(rng)))
    if hashlib.sha256("\n".join(prompt.text for prompt in found).encode()).hexdigest() != CHECKSUM:
        raise SanaError(f"numpy {np.__version__} draws other prompts than GenEval's", "install numpy 1 or 2")
    return found


def _drawn(rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False):
        yield "single object", _a(CLASSES[i])
    for _ in range(DRAWS):
        first, second = _two(rng)
        yield "two objects", f"{_a(first)} and {_a(second)}"
    for _ in range(DRAWS):
        name, count = CLASSES[rng.choice(len(CLASSES))], int(rng.integers(2, 4, endpoint=True))
        yield "counting", f"{NUMBERS[count]} {name}{'es' if name.endswith('s') else 's'}"
    for _ in range(DRAWS):
        name = CLASSES[rng.choice(len(CLASSES) - 1) + 1]
        yield "colours", f"{_a(COLOURS[rng.choice(len(COLOURS))])} {name}"
    for _ in range(DRAWS):
        first, second = _two(rng)
        yield "position", f"{_a(first)} {POSITIONS[rng.choice(len(POSITIONS))]} {_a(second)}"
    for _ in range(DRAWS):
        names = [CLASSES[i + 1] for i in rng.choice(len(CLASSES) - 1, size=2, replace=False)]
        shades = [COLOURS[i] for i in rng.choice(len(COLOURS), size=2, replace=False)]
        yield (
            "colour attribution",
            " and ".join(f"{_a(shade)} {name}" for shade, name in zip(shades, names, strict=True)),
        )


def _two(rng: np.random.Generator) -> tuple[str, str]:
    first, second = rng.choice(len(CLASSES), size=2, replace=False)
    return CLASSES[first], CLASSES[second]


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
