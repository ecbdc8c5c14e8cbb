"""What is asked of a picture and what a judge saw in it: GenEval's six categories (Ghosh et al. 2023).

Each category tests its own kind of held-out combination and uses trained ones for everything else: single
object (kind, size, background); two objects {kind, kind}; counting (kind, number); colours (kind, colour);
position (kind, relation, kind); colour attribution two (kind, colour), one of them held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.training.captions import plural

SEED = 553
COUNTS = {
    "single object": 80,
    "two objects": 99,
    "counting": 80,
    "colours": 94,
    "position": 100,
    "colour attribution": 100,
}
SLACK = 0.1
"""Two objects stand apart by the distance of their centres less this share of their sizes."""


@dataclass(frozen=True)
class Detection:
    """One object: centre and box (left, top, right, bottom) in units of the picture's side, y down."""

    kind: str
    colour: str
    x: float
    y: float
    box: tuple[float, float, float, float]
    score: float


@dataclass(frozen=True)
class Judgement:
    """What a picture shows, the surest object first; a colour is "" for the kind's own."""

    background: str
    detections: tuple[Detection, ...]


def check_picture(pixels: NDArray[np.uint8], least: int) -> None:
    """Raises ValueError for what is not (H, H, 3) uint8 with at least so many pixels a side."""
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1] or len(pixels) < least:
        raise ValueError(f"a picture must be (H, H, 3) with H >= {least}, got {pixels.shape}")
    if pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8, got {pixels.dtype}")


@dataclass(frozen=True)
class Wanted:
    """So many objects of a kind, all of them of the colour where one is named."""

    kind: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What to ask for, and what the picture must show for it.

    `relation` is of the first wanted object to the second; `exact` allows no more objects of a kind than its
    count. `scene` is one picture that is right, of the
    prompt's own world.
    """

    category: str
    text: str
    wanted: tuple[Wanted, ...]
    relation: str | None
    exact: bool
    scene: Any

    def check(self, judgement: Judgement) -> str:
        """What is wrong with a picture, empty if it is right.

        As in GenEval, objects that were not asked for do no harm, except that counting allows no more of its
        kind; of several objects of a kind the surest are taken.
        """
        chosen: list[Detection] = []
        for want in self.wanted:
            found = [d for d in judgement.detections if d.kind == want.kind]
            if len(found) < want.count or (self.exact and len(found) > want.count):
                return f"{len(found)} {plural(want.kind)}, wanted {want.count}"
            found = found[: want.count]
            for other in found:
                if want.colour not in (None, other.colour):
                    return f"{other.colour} {want.kind}, wanted {want.colour}"
            chosen += found
        if self.relation and self.relation not in relations(chosen[0], chosen[1]):
            return f"not {self.relation}"
        return ""

    def facts(self) -> dict[str, Any]:
        """The prompt and its facts as JSON values."""
        wanted = [{"kind": w.kind, "count": w.count, "colour": w.colour} for w in self.wanted]
        return {
            "category": self.category,
            "prompt": self.text,
            "wanted": wanted,
            "relation": self.relation,
            "exact": self.exact,
        }


def relations(first: Detection, second: Detection) -> set[str]:
    """How the first stands to the second: any of "left of", "right of", "above", "below"; none if too close.

    GenEval's rule: along an axis the distance of the centres, less SLACK of the sizes, must be more than half
    of the whole distance.
    """
    sizes = [b[2] - b[0] for b in (first.box, second.box)], [b[3] - b[1] for b in (first.box, second.box)]
    dx, dy = first.x - second.x, first.y - second.y
    distance = (dx * dx + dy * dy) ** 0.5
    across, down = (max(abs(d) - SLACK * sum(s), 0) for d, s in zip((dx, dy), sizes, strict=True))
    found = set()
    if across > 0.5 * distance:
        found.add("left of" if dx < 0 else "right of")
    if down > 0.5 * distance:
        found.add("above" if dy < 0 else "below")
    return found


def collected(
    scenes: Callable[[str, random.Random], Iterator[Any]],
    prompt: Callable[[str, Any, random.Random], Prompt | None],
) -> tuple[Prompt, ...]:
    """All prompts of a world, category after category, none twice, the same every time."""
    rng = random.Random(SEED)
    made: list[Prompt] = []
    texts: set[str] = set()
    for category, count in COUNTS.items():
        start = len(made)
        for scene in scenes(category, rng):
            found = prompt(category, scene, rng)
            if found is not None and found.text not in texts:
                texts.add(found.text)
                made.append(found)
            if len(made) - start == count:
                break
    return tuple(made)
