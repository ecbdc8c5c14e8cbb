"""The 553 prompts of `quality.py`: GenEval's six categories (Ghosh et al. 2023) on what training never shows.

Each category tests its own kind of held-out combination and uses trained ones for everything else: single
object (kind, size, background); two objects {kind, kind}; counting (kind, number); colours (kind, colour);
position (kind, relation, kind); colour attribution two (kind, colour), one of them held out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from judge import Detection, Judgement

from sana_edge.training.captions import caption, plural
from sana_edge.training.layout import arrange, held_out, mirrored
from sana_edge.training.scenes import BACKGROUNDS, COLOURS, KINDS, Scene, Thing

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
class Wanted:
    """So many objects of a kind, all of them of the colour where one is named."""

    kind: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What to ask for, and what the picture must show for it.

    `relation` is of the first wanted object to the second; `exact` allows no more objects of a kind than its
    count. `scene` is one picture that is right.
    """

    category: str
    text: str
    wanted: tuple[Wanted, ...]
    relation: str | None
    exact: bool
    scene: Scene

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

    @property
    def combinations(self) -> set[Hashable]:
        """What of `combinations` no training scene shows."""
        things, scene = self.scene.things, self.scene
        if self.category == "single object":
            return {(things[0].kind, things[0].size, scene.background)}
        if self.category == "two objects":
            return {frozenset(t.kind for t in things)}
        if self.category == "counting":
            return {(things[0].kind, len(things))}
        if self.category == "colours":
            return {(things[0].kind, things[0].colour)}
        if self.category == "position":
            return {(things[0].kind, scene.relation, things[1].kind)}
        return {frozenset((t.kind, t.colour) for t in things)}


def combinations(scene: Scene) -> set[Hashable]:
    """Every combination of a scene, in any category's form."""
    things = scene.things
    pairs = list(itertools.combinations(things, 2))
    shown: set[Hashable] = {(t.kind, t.colour) for t in things}
    shown |= {frozenset((a.kind, b.kind)) for a, b in pairs}
    shown |= {frozenset(((a.kind, a.colour), (b.kind, b.colour))) for a, b in pairs}
    shown |= {(t.kind, sum(o.kind == t.kind for o in things)) for t in things}
    if len(things) == 1:
        shown.add((things[0].kind, things[0].size, scene.background))
    if scene.relation:
        first, second = things[0].kind, things[1].kind
        shown |= {(first, scene.relation, second), (second, mirrored(scene.relation), first)}
    return shown


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


@lru_cache(maxsize=1)
def prompts() -> tuple[Prompt, ...]:
    """All prompts, category after category, the same every time."""
    rng = random.Random(SEED)
    made: list[Prompt] = []
    texts: set[str] = set()
    for category, count in COUNTS.items():
        start = len(made)
        for scene in _scenes(category, rng):
            prompt = _prompt(category, scene, rng)
            if prompt is not None and prompt.text not in texts:
                texts.add(prompt.text)
                made.append(prompt)
            if len(made) - start == count:
                break
    return tuple(made)


def _prompt(category: str, scene: Scene, rng: random.Random) -> Prompt | None:
    """The scene in words, or None if the words leave out a colour that the category tests."""
    text = caption(scene, rng)
    coloured = category in ("colours", "colour attribution")
    words = text.replace(".", " ").split()
    if coloured and not all(thing.colour in words for thing in scene.things):
        return None
    if category == "counting":
        wanted: tuple[Wanted, ...] = (Wanted(scene.things[0].kind, len(scene.things)),)
    else:
        wanted = tuple(Wanted(t.kind, 1, t.colour if coloured else None) for t in scene.things)
    return Prompt(category, text, wanted, scene.relation, category == "counting", scene)


def _scenes(category: str, rng: random.Random) -> Iterator[Scene]:
    """Scenes without end, every combination of the category in turn, colours and backgrounds at random."""
    draw: Callable[[Any, random.Random], Scene] = _DRAW[category]
    split = held_out()
    known: dict[str, list[Any]] = {
        "single object": sorted(split.singles),
        "two objects": sorted(tuple(sorted(pair)) for pair in split.pairs),
        "counting": sorted(split.counts),
        "colours": sorted(split.colours),
        "position": sorted(split.relations),
        "colour attribution": sorted(split.colours),
    }
    choices = known[category]
    while True:
        rng.shuffle(choices)
        for choice in choices:
            yield draw(choice, rng)


def _single(choice: tuple[str, str, str], rng: random.Random) -> Scene:
    kind, size, background = choice
    return arrange([replace(_thing(kind, rng), size=size)], background, None, rng)


def _two(choice: tuple[str, str], rng: random.Random) -> Scene:
    kinds = rng.sample(choice, 2)
    return arrange([_thing(kind, rng) for kind in kinds], rng.choice(BACKGROUNDS), None, rng)


def _counting(choice: tuple[str, int], rng: random.Random) -> Scene:
    kind, count = choice
    return arrange([_thing(kind, rng)] * count, rng.choice(BACKGROUNDS), None, rng)


def _colours(choice: tuple[str, str], rng: random.Random) -> Scene:
    kind, colour = choice
    thing = replace(_thing(kind, rng), colour=colour)
    trained = [b for b in BACKGROUNDS if (kind, thing.size, b) not in held_out().singles]
    return arrange([thing], rng.choice(trained), None, rng)


def _position(choice: tuple[str, str, str], rng: random.Random) -> Scene:
    first, relation, second = choice
    return arrange([_thing(first, rng), _thing(second, rng)], rng.choice(BACKGROUNDS), relation, rng)


def _attribution(choice: tuple[str, str], rng: random.Random) -> Scene:
    kind, colour = choice
    others = [k for k in KINDS if k != kind and frozenset((kind, k)) not in held_out().pairs]
    other = _thing(rng.choice(others), rng)
    while other.colour == colour:
        other = _thing(other.kind, rng)
    things = [replace(_thing(kind, rng), colour=colour), other]
    rng.shuffle(things)
    return arrange(things, rng.choice(BACKGROUNDS), None, rng)


_DRAW: dict[str, Callable[..., Scene]] = {
    "single object": _single,
    "two objects": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour attribution": _attribution,
}


def _thing(kind: str, rng: random.Random) -> Thing:
    """Medium, in a colour that it has in training."""
    colour = rng.choice([c for c in COLOURS if (kind, c) not in held_out().colours])
    return Thing(kind, colour, "medium", 0.0, 0.0, 0.0)
