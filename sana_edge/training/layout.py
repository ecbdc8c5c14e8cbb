"""Which scenes are drawn, and which combinations are held out of training for `benchmarks/quality.py`.

A fact that a caption may leave out has a default (plain background, medium size), so that a terse caption
still says what the picture will be; only an unnamed colour is free. Objects sit in slots, shaken a little.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import lru_cache

from .scenes import BACKGROUNDS, COLOURS, KINDS, SIZES, Scene, Thing

RELATIONS = ("left of", "right of", "above", "below")
SLOTS: dict[str, tuple[tuple[float, float], ...]] = {
    "one": ((0.5, 0.53),),
    "row": ((0.275, 0.53), (0.725, 0.53)),
    "column": ((0.5, 0.265), (0.5, 0.745)),
    "three": ((0.5, 0.27), (0.265, 0.74), (0.735, 0.74)),
    "four": ((0.27, 0.27), (0.73, 0.27), (0.27, 0.74), (0.73, 0.74)),
}
RADII = {"one": 0.29, "row": 0.19, "column": 0.185, "three": 0.185, "four": 0.18}
SHAKE = 0.025
"""Objects move by at most this, in units of the side, from their slot."""


class HeldOut:
    """Combinations that never occur in a scene the denoiser is trained on; drawn once from a fixed seed.

    colours: (kind, colour); pairs: unordered {kind, kind} of one scene; relations: (kind, relation, kind);
    counts: (kind, count); singles: (kind, size, background) of a scene with one object.
    """

    def __init__(self) -> None:
        rng = random.Random(20241014)
        kinds = list(KINDS)
        self.colours: set[tuple[str, str]] = set()
        shades = list(COLOURS)
        rng.shuffle(shades)
        for i, kind in enumerate(kinds):
            self.colours |= {(kind, shades[i % 10]), (kind, shades[(i + 3) % 10])}
        pairs = [frozenset(p) for p in itertools.combinations(kinds, 2)]
        self.pairs: set[frozenset[str]] = set(rng.sample(pairs, 16))
        free = [(a, r, b) for a in kinds for b in kinds if a != b for r in RELATIONS]
        free = [f for f in free if frozenset((f[0], f[2])) not in self.pairs]
        self.relations: set[tuple[str, str, str]] = set()
        for a, r, b in rng.sample(free, 56):
            self.relations |= {(a, r, b), (b, mirrored(r), a)}
        self.counts = {(kind, 2 + i % 3) for i, kind in enumerate(rng.sample(kinds, len(kinds)))}
        singles = list(itertools.product(kinds, SIZES, BACKGROUNDS))
        self.singles: set[tuple[str, str, str]] = set(rng.sample(singles, 40))

    def holds(self, scene: Scene) -> bool:
        """Whether the scene shows any held-out combination."""
        things = scene.things
        if any((t.kind, t.colour) in self.colours for t in things):
            return True
        names = [t.kind for t in things]
        if any(frozenset(p) in self.pairs for p in itertools.combinations(names, 2)):
            return True
        if len(things) == 1:
            return (names[0], things[0].size, scene.background) in self.singles
        if len(set(names)) == 1:
            return (names[0], len(names)) in self.counts
        return scene.relation is not None and (names[0], scene.relation, names[1]) in self.relations


@lru_cache(maxsize=1)
def held_out() -> HeldOut:
    """The one split of this project."""
    return HeldOut()


def mirrored(relation: str) -> str:
    """The same relation told from the other object."""
    return dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))[relation]


def place(things: list[Thing], arrangement: str, rng: random.Random) -> tuple[Thing, ...]:
    """Puts things into the slots of an arrangement, in order."""
    placed = []
    for thing, (x, y) in zip(things, SLOTS[arrangement], strict=True):
        radius = RADII[arrangement] * (1 + 0.2 * (SIZES[thing.size] - 1) * (5 if arrangement == "one" else 4))
        dx, dy = (SHAKE * (2 * rng.random() - 1) for _ in range(2))
        placed.append(replace(thing, x=x + dx, y=y + dy, radius=radius * (0.97 + 0.06 * rng.random())))
    return tuple(placed)


def arrange(things: list[Thing], background: str, relation: str | None, rng: random.Random) -> Scene:
    """A scene with the given objects; for two objects `relation` is of the first to the second."""
    if len(things) == 2:
        placed = place(
            things if relation in (None, "left of", "above") else things[::-1],
            "row" if relation in (None, "left of", "right of") else "column",
            rng,
        )
        return Scene(background, placed if relation in (None, "left of", "above") else placed[::-1], relation)
    return Scene(background, place(things, {1: "one", 3: "three", 4: "four"}[len(things)], rng))


def draw_scene(rng: random.Random) -> Scene:
    """One random scene, held-out combinations included."""
    form = rng.choices(("one", "related", "two", "same", "mixed"), (0.24, 0.28, 0.14, 0.2, 0.14))[0]
    count = {"one": 1, "related": 2, "two": 2, "same": rng.choice((2, 3, 4)), "mixed": rng.choice((3, 4))}[
        form
    ]
    kinds = [rng.choice(list(KINDS))] * count if form == "same" else rng.sample(list(KINDS), count)
    colours = rng.choices(list(COLOURS), k=count)
    if form == "same" and rng.random() < 0.8:
        colours = colours[:1] * count
    sizes = ["medium"] * count
    if count == 1 and rng.random() < 0.4:
        sizes = [rng.choice(("small", "large"))]
    elif form in ("related", "two") and rng.random() < 0.2:
        sizes = rng.choice((["small", "medium"], ["medium", "small"]))
    things = [Thing(k, c, s, 0.0, 0.0, 0.0) for k, c, s in zip(kinds, colours, sizes, strict=True)]
    background = "plain" if rng.random() < 0.4 else rng.choice(BACKGROUNDS)
    return arrange(things, background, rng.choice(RELATIONS) if form == "related" else None, rng)


def training_scene(rng: random.Random) -> Scene:
    """One random scene that shows no held-out combination."""
    while True:
        scene = draw_scene(rng)
        if not held_out().holds(scene):
            return scene
