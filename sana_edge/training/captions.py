"""Captions of a scene, from terse to detailed and in free phrasing, all of the same facts."""

from __future__ import annotations

import random
from collections.abc import Callable

from .layout import mirrored
from .scenes import Scene, Thing

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLURALS = {"fish": "fish"}
PLACES = {
    "plain": ("on a plain background", "on a plain backdrop"),
    "meadow": ("on a green meadow", "in a meadow", "in front of green hills"),
    "desert": ("in the desert", "among sand dunes", "in a sandy desert"),
    "sea": ("at the sea", "in front of the sea", "by the ocean waves"),
    "snow": ("in the snow", "in a snowy landscape", "on a snowy day"),
    "night": ("at night", "under the night sky", "in a starry night"),
}
OPENINGS = ("", "", "an illustration of ", "a picture of ", "a flat illustration of ", "a drawing of ")
FREE_OPENINGS = ("show me ", "please draw ", "i would like ", "there is ", "draw ", "make a picture with ")
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath"),
}


def plural(kind: str) -> str:
    return PLURALS.get(kind, kind + "s")


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def noun(thing: Thing, colour: bool = True) -> str:
    """For example "small red house"; a medium size is not said."""
    size = "" if thing.size == "medium" else thing.size + " "
    return f"{size}{thing.colour + ' ' if colour else ''}{thing.kind}"


def listing(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def is_group(scene: Scene) -> bool:
    """Several objects of one kind, told by their number."""
    return len(scene.things) > 1 and len({t.kind for t in scene.things}) == 1


def subject(scene: Scene, rng: random.Random, colour: bool) -> str:
    """The objects as one phrase: a number, a relation or a list."""
    things = scene.things
    if is_group(scene):
        word = plural(things[0].kind)
        if len({t.colour for t in things}) == 1:
            return f"{NUMBERS[len(things)]} {things[0].colour + ' ' if colour else ''}{word}"
        return f"{NUMBERS[len(things)]} {word}" + (
            f", {listing([t.colour for t in things])}" if colour else ""
        )
    if scene.relation is not None:
        first, second, relation = things[0], things[1], scene.relation
        if rng.random() < 0.3:
            first, second, relation = second, first, mirrored(relation)
        words = rng.choice(RELATION_WORDS[relation])
        return f"{article(noun(first, colour))} {words} {article(noun(second, colour))}"
    return listing([article(noun(t, colour)) for t in things])


def place_words(scene: Scene, rng: random.Random) -> str:
    """Where it is; a plain background is mostly not said."""
    if scene.background == "plain" and rng.random() < 0.8:
        return ""
    return " " + rng.choice(PLACES[scene.background])


def terse(scene: Scene, rng: random.Random) -> str:
    if scene.relation is not None or is_group(scene):
        return (
            subject(scene, rng, True).replace("a ", "").replace("an ", "") + place_words(scene, rng)
        ).strip()
    tail = "" if scene.background == "plain" else f", {scene.background}"
    return ", ".join(noun(t) for t in scene.things) + tail


def plain(scene: Scene, rng: random.Random) -> str:
    return rng.choice(OPENINGS) + subject(scene, rng, rng.random() < 0.88) + place_words(scene, rng)


def detailed(scene: Scene, rng: random.Random) -> str:
    tail = rng.choice(
        (
            ", flat vector art",
            ", clean shapes and soft colours",
            " with thick outlines",
            ", children's book style",
        )
    )
    return f"a charming flat illustration of {subject(scene, rng, True)}{place_words(scene, rng)}{tail}"


def free(scene: Scene, rng: random.Random) -> str:
    return rng.choice(FREE_OPENINGS) + subject(scene, rng, True) + place_words(scene, rng)


def sentences(scene: Scene, rng: random.Random) -> str:
    """Facts one after the other: first the objects, then their colours, then the place."""
    things = scene.things
    where = "" if scene.background == "plain" else f". the scene is {rng.choice(PLACES[scene.background])}"
    if is_group(scene) or len({t.kind for t in things}) < len(things):
        return f"there are {subject(scene, rng, True)}{where}"
    colours = listing([f"the {t.kind} is {t.colour}" for t in things])
    verb = "is" if len(things) == 1 else "are"
    return f"there {verb} {subject(scene, rng, False)}. {colours}{where}"


STYLES: dict[str, Callable[[Scene, random.Random], str]] = {
    "terse": terse,
    "plain": plain,
    "detailed": detailed,
    "free": free,
    "sentences": sentences,
}


def caption(scene: Scene, rng: random.Random, style: str | None = None) -> str:
    """One caption of the scene, lower case as the text encoder sees it, in `style` or a random one."""
    name = style or rng.choices(list(STYLES), (0.15, 0.4, 0.12, 0.15, 0.18))[0]
    return STYLES[name](scene, rng)
