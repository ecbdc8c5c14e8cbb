"""The 553 prompts of the flat shapes, on what training never shows; see `prompts`."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from sana_edge.evaluate.judge.prompts import Prompt, Wanted, collected
from sana_edge.training.captions import caption
from sana_edge.training.layout import arrange, held_out
from sana_edge.training.scenes import BACKGROUNDS, COLOURS, KINDS, Scene, Thing


@lru_cache(maxsize=1)
def prompts() -> tuple[Prompt, ...]:
    """All prompts, category after category, the same every time."""
    return collected(_scenes, _prompt)


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
