"""Which scenes are drawn, and which combinations no training of any part ever sees.

A fact that a caption may leave out has a default (plain background, medium size, own colour), so that a terse
caption still says what the picture will be.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from hashlib import blake2b

from .backdrops import BACKGROUNDS, PLACES, PLAINS, VARIANTS
from .catalogue import kinds
from .colours import COLOURS
from .scenes import Scene, Thing

RELATIONS = ("left of", "right of", "above", "below")
MIRRORED = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
SLOTS: dict[str, tuple[tuple[float, float], ...]] = {
    "one": ((0.5, 0.54),),
    "row": ((0.27, 0.55), (0.73, 0.55)),
    "column": ((0.5, 0.26), (0.5, 0.75)),
    "three": ((0.5, 0.27), (0.26, 0.74), (0.74, 0.74)),
    "line": ((0.185, 0.56), (0.5, 0.56), (0.815, 0.56)),
    "four": ((0.27, 0.27), (0.73, 0.27), (0.27, 0.74), (0.73, 0.74)),
}
RADII = {"one": 0.31, "row": 0.21, "column": 0.21, "three": 0.2, "line": 0.15, "four": 0.2}
SIZES: dict[str, float] = {"small": 0.68, "medium": 1.0, "large": 1.32}
SHAKE = {"one": 0.06, "row": 0.035, "column": 0.03, "three": 0.03, "line": 0.02, "four": 0.03}
"""Objects move by at most this, in units of the side, from their slot."""
SHARES = {"colours": 0.1, "pairs": 0.08, "relations": 0.06, "counts": 0.1, "singles": 0.08}
"""Which share of all combinations of a sort is held out."""
EVEN, EXTRA = 12288, 4
"""The first EVEN scenes take all kinds alike; later ones take each coloured kind 1 + EXTRA times as often."""


def is_held_out(sort: str, *names: object) -> bool:
    """Whether a combination belongs to the held-out share of its sort, by its hash."""
    digest = blake2b("|".join((sort, *map(str, names))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < SHARES[sort]


def pair_is_held_out(first: str, second: str) -> bool:
    return is_held_out("pairs", *sorted((first, second)))


def relation_is_held_out(first: str, relation: str, second: str) -> bool:
    """The same told from either object."""
    if relation in ("right of", "below"):
        first, relation, second = second, MIRRORED[relation], first
    return is_held_out("relations", first, relation, second)


def holds(scene: Scene) -> bool:
    """Whether the scene shows any held-out combination."""
    things = scene.things
    if any(t.colour and is_held_out("colours", t.kind, t.colour) for t in things):
        return True
    names = [t.kind for t in things]
    if any(a != b and pair_is_held_out(a, b) for a, b in itertools.combinations(names, 2)):
        return True
    if len(things) == 1:
        return is_held_out("singles", names[0], things[0].size, scene.background)
    if len(set(names)) == 1:
        return is_held_out("counts", names[0], len(names))
    return scene.relation is not None and relation_is_held_out(names[0], scene.relation, names[1])


def place(things: list[Thing], arrangement: str, rng: random.Random) -> tuple[Thing, ...]:
    """Puts things into the slots of an arrangement, in order."""
    placed = []
    for thing, (x, y) in zip(things, SLOTS[arrangement], strict=True):
        size = SIZES[thing.size] if arrangement == "one" else 1 + 0.6 * (SIZES[thing.size] - 1)
        dx, dy = (SHAKE[arrangement] * (2 * rng.random() - 1) for _ in range(2))
        radius = RADII[arrangement] * size * (0.94 + 0.1 * rng.random())
        low, high = min(radius, 0.5), max(1 - radius, 0.5)
        placed.append(
            replace(
                thing,
                x=min(max(x + dx, low), high),
                y=min(max(y + dy, low), high),
                radius=radius,
                mirrored=rng.random() < 0.5,
            )
        )
    return tuple(placed)


def arrange(things: list[Thing], background: str, relation: str | None, rng: random.Random) -> Scene:
    """A scene with the given objects; for two objects `relation` is of the first to the second."""
    variant = rng.randrange(VARIANTS)
    if len(things) != 2:
        form = {1: "one", 3: rng.choice(("three", "line")), 4: "four"}[len(things)]
        return Scene(background, place(things, form, rng), None, variant)
    ordered = relation in (None, "left of", "above")
    form = "row" if relation in (None, "left of", "right of") else "column"
    placed = place(things if ordered else things[::-1], form, rng)
    return Scene(background, placed if ordered else placed[::-1], relation, variant)


def draw_scene(rng: random.Random, extra: int = 0) -> Scene:
    """One random scene, held-out combinations included; kinds in colours come 1 + `extra` times as often."""
    forms = {"one": 1, "related": 2, "two": 2, "same": rng.choice((2, 3, 4)), "mixed": rng.choice((3, 4))}
    form = rng.choices(list(forms), (0.4, 0.2, 0.14, 0.17, 0.09))[0]
    count = forms[form]
    names = [*kinds(), *(k.name for k in kinds().values() if k.coloured for _ in range(extra))]
    chosen = [rng.choice(names)] * count if form == "same" else distinct(names, count, rng)
    colours = [colour_of(name, rng) for name in chosen]
    if form == "same":
        colours = colours[:1] * count
    sizes = ["medium"] * count
    if count == 1 and rng.random() < 0.45:
        sizes = [rng.choice(("small", "large", "large"))]
    elif form in ("related", "two") and rng.random() < 0.15:
        sizes = rng.choice((["small", "large"], ["large", "small"]))
    things = [Thing(k, c, s) for k, c, s in zip(chosen, colours, sizes, strict=True)]
    relation = rng.choice(RELATIONS) if form == "related" else None
    return arrange(things, background_of(rng), relation, rng)


def distinct(names: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` different ones of `names`, which may stand there several times."""
    while True:
        chosen = rng.sample(names, count)
        if len(set(chosen)) == count:
            return chosen


def colour_of(name: str, rng: random.Random) -> str:
    """A named colour for two of three objects of the kinds that have them, else their own."""
    return rng.choice(list(COLOURS)) if kinds()[name].coloured and rng.random() < 0.67 else ""


def background_of(rng: random.Random) -> str:
    """The plain one often, a coloured one seldom, else a place."""
    share = rng.random()
    if share < 0.25:
        return "plain"
    return rng.choice(list(PLAINS)[1:]) if share < 0.35 else rng.choice(list(PLACES))


def training_scene(rng: random.Random, extra: int = 0) -> Scene:
    """One random scene that shows no held-out combination."""
    while True:
        scene = draw_scene(rng, extra)
        if not holds(scene):
            return scene


def extra_of(number: int) -> int:
    """How much more often scene `number` takes kinds in colours."""
    return 0 if number < EVEN else EXTRA


def numbered_scene(number: int) -> Scene:
    """Training scene `number`, the same everywhere."""
    return training_scene(random.Random(f"scene {number}"), extra_of(number))


def held_out_scene(number: int) -> Scene:
    """Scene `number` of those that show something held out, the same everywhere."""
    rng = random.Random(f"held out {number}")
    while True:
        scene = draw_scene(rng)
        if holds(scene):
            return scene


__all__ = [
    "BACKGROUNDS",
    "RELATIONS",
    "arrange",
    "draw_scene",
    "held_out_scene",
    "holds",
    "numbered_scene",
    "training_scene",
]
