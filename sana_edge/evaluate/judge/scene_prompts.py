"""The 553 prompts of the art's world, on what no training shows; see `sana_edge.evaluate.judge.prompts`.

No part of the model, text encoder and autoencoder included, has seen any of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from sana_edge.evaluate.judge.prompts import Prompt, Wanted, collected
from sana_edge.training.art.backdrops import BACKGROUNDS
from sana_edge.training.art.captions import caption
from sana_edge.training.art.catalogue import kinds
from sana_edge.training.art.colours import COLOURS
from sana_edge.training.art.layout import (
    RELATIONS,
    SIZES,
    arrange,
    background_of,
    is_held_out,
    pair_is_held_out,
    relation_is_held_out,
)
from sana_edge.training.art.scenes import Scene, Thing

STYLES = ("plain", "plain", "free", "sentences", "detailed")
"""How prompts are worded: emoji and key words are left to training."""


@lru_cache(maxsize=1)
def prompts() -> tuple[Prompt, ...]:
    """All prompts, category after category, the same every time."""
    return collected(_scenes, _prompt)


def held_out(category: str) -> list[tuple[Any, ...]]:
    """The combinations that a category tests, in the order of the catalogue."""
    names = list(kinds())
    coloured = [k.name for k in kinds().values() if k.coloured]
    if category == "single object":
        return [c for c in itertools.product(names, SIZES, BACKGROUNDS) if is_held_out("singles", *c)]
    if category == "two objects":
        return [c for c in itertools.combinations(names, 2) if pair_is_held_out(*c)]
    if category == "counting":
        return [c for c in itertools.product(names, (2, 3, 4)) if is_held_out("counts", *c)]
    if category == "position":
        pairs = itertools.permutations(names, 2)
        free = (c for c in pairs if not pair_is_held_out(*c))
        return [(a, r, b) for a, b in free for r in RELATIONS if relation_is_held_out(a, r, b)]
    return [c for c in itertools.product(coloured, COLOURS) if is_held_out("colours", *c)]


def _prompt(category: str, scene: Scene, rng: random.Random) -> Prompt:
    text, things = caption(scene, rng, rng.choice(STYLES)), scene.things
    if category == "counting":
        wanted: tuple[Wanted, ...] = (Wanted(things[0].kind, len(things)),)
    else:
        wanted = tuple(Wanted(t.kind, 1, t.colour or None) for t in things)
    return Prompt(category, text, wanted, scene.relation, category == "counting", scene)


def _scenes(category: str, rng: random.Random) -> Iterator[Scene]:
    """Scenes without end, every combination of the category in turn, all else at random."""
    draw, choices = _DRAW[category], held_out(category)
    while True:
        rng.shuffle(choices)
        for choice in choices:
            yield draw(*choice, rng)


def _single(kind: str, size: str, background: str, rng: random.Random) -> Scene:
    return arrange([Thing(kind, "", size)], background, None, rng)


def _two(first: str, second: str, rng: random.Random) -> Scene:
    things = [Thing(kind, "", "medium") for kind in rng.sample((first, second), 2)]
    return arrange(things, background_of(rng), None, rng)


def _counting(kind: str, count: int, rng: random.Random) -> Scene:
    return arrange([Thing(kind, "", "medium")] * count, background_of(rng), None, rng)


def _colours(kind: str, colour: str, rng: random.Random) -> Scene:
    background = background_of(rng)
    while is_held_out("singles", kind, "medium", background):
        background = background_of(rng)
    return arrange([Thing(kind, colour, "medium")], background, None, rng)


def _position(first: str, relation: str, second: str, rng: random.Random) -> Scene:
    things = [Thing(first, "", "medium"), Thing(second, "", "medium")]
    return arrange(things, background_of(rng), relation, rng)


def _attribution(kind: str, colour: str, rng: random.Random) -> Scene:
    """A held-out colour beside another thing in a colour of training."""
    free = [(k.name, c) for k in kinds().values() if k.coloured for c in COLOURS if c != colour]
    while True:
        other, shade = rng.choice(free)
        if other != kind and not pair_is_held_out(kind, other) and not is_held_out("colours", other, shade):
            break
    things = [Thing(kind, colour, "medium"), Thing(other, shade, "medium")]
    rng.shuffle(things)
    return arrange(things, background_of(rng), None, rng)


_DRAW: dict[str, Callable[..., Scene]] = {
    "single object": _single,
    "two objects": _two,
    "counting": _counting,
    "colours": _colours,
    "position": _position,
    "colour attribution": _attribution,
}
