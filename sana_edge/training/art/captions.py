"""Captions of a scene in several styles, from an emoji to whole sentences, all of the same facts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from .backdrops import PLACES, PLAINS
from .catalogue import Kind, kinds, plural_of
from .layout import MIRRORED, draw_scene
from .scenes import Scene, Thing

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
UNCOUNTED = ("bread", "cheese", "coffee")
HEADS = {"loaf": "loaves", "slice": "slices", "piece": "pieces", "cup": "cups"}
WHERE: dict[str, tuple[str, ...]] = {
    "meadow": ("on a meadow", "on a green meadow", "in the grass", "in front of green hills", "on the lawn"),
    "snow": ("in the snow", "in a snowy landscape", "on a snowy day", "in winter"),
    "sea": ("at the sea", "on the ocean", "in the water", "in front of the sea"),
    "beach": ("on the beach", "at the beach", "on the sand by the sea", "on a sandy beach"),
    "desert": ("in the desert", "among sand dunes", "in a hot desert"),
    "night": ("at night", "under the night sky", "in a starry night", "in the dark"),
    "room": ("in a room", "indoors", "at home", "in a cosy room", "inside on a rug"),
    "mountains": ("in the mountains", "in front of snowy mountains", "before a mountain"),
    "sunset": ("at sunset", "in the evening", "at dusk", "in front of a sunset"),
    "sky": ("in the sky", "above the clouds", "among the clouds", "in a blue sky"),
    "forest": ("in the forest", "in the woods", "in front of trees", "among green trees"),
    "space": ("in space", "in outer space", "among the stars", "in the universe"),
}
PLAIN = ("on a plain background", "on a white background", "on a plain backdrop")
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a 3d render of ", "a cute ", "an illustration of ")
FREE = ("show me ", "please draw ", "i would like ", "i want ", "draw ", "make ", "give me ", "can you draw ")
DETAILS = (
    "soft light",
    "3d style",
    "high quality",
    "colourful",
    "cute",
    "rounded shapes",
    "glossy",
    "smooth",
)
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("",),
    "large": ("large", "big", "huge"),
}


def article(words: str) -> str:
    """The words with "a" or "an" before them, where one belongs there."""
    if words.split()[-1] in UNCOUNTED and " of " not in words:
        return words
    if re.match(r"[^\w]", words) or words.startswith(("uni", "ufo")):
        return "a " + words
    return ("an " if words[0] in "aeiou" else "a ") + words


def named(kind: Kind, rng: random.Random) -> str:
    """The kind's name, or another of its names."""
    if kind.others and rng.random() < 0.35:
        return rng.choice(kind.others)
    return kind.name


def many(kind: Kind, rng: random.Random) -> str:
    """The plural of one of its names."""
    name = named(kind, rng)
    if name == kind.name:
        return kind.plural
    head, of, rest = name.partition(" of ")
    if of:
        return HEADS.get(head, plural_of(head)) + of + rest
    return plural_of(name)


def adjectives(thing: Thing, rng: random.Random) -> str:
    """Size and colour as they are said, each followed by a space."""
    words = [rng.choice(SIZE_WORDS[thing.size]), thing.colour]
    return "".join(word + " " for word in words if word)


def one(thing: Thing, rng: random.Random, emoji: bool = False) -> str:
    """One object with its article: "a small red car", "a red 🚗", or the emoji alone."""
    kind = kinds()[thing.kind]
    said = adjectives(thing, rng)
    if emoji:
        return article(said + kind.emoji) if said else kind.emoji
    return article(said + named(kind, rng))


def listing(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def is_group(scene: Scene) -> bool:
    """Several objects of one kind, told by their number."""
    return len(scene.things) > 1 and len({t.kind for t in scene.things}) == 1


def subject(scene: Scene, rng: random.Random, emoji: bool = False) -> str:
    """The objects as one phrase: a number, a relation or a list."""
    things = scene.things
    if is_group(scene):
        kind, said = kinds()[things[0].kind], adjectives(things[0], rng)
        return f"{NUMBERS[len(things)]} {said}{kind.emoji if emoji else many(kind, rng)}"
    if scene.relation is not None:
        first, second, relation = things[0], things[1], scene.relation
        if rng.random() < 0.3:
            first, second, relation = second, first, MIRRORED[relation]
        between = rng.choice(RELATION_WORDS[relation])
        return f"{one(first, rng, emoji)} {between} {one(second, rng, emoji)}"
    words = [one(t, rng, emoji) for t in things]
    return " and ".join(words) if rng.random() < 0.2 else listing(words)


def where(scene: Scene, rng: random.Random) -> str:
    """Where it is, after a space; the plain background is mostly not said."""
    if scene.background in PLACES:
        return " " + rng.choice(WHERE[scene.background])
    colour = scene.background.removeprefix("plain").strip()
    if colour:
        return " " + rng.choice((f"on a {colour} background", f"in front of a {colour} wall", f"on {colour}"))
    return " " + rng.choice(PLAIN) if rng.random() < 0.2 else ""


def terse(scene: Scene, rng: random.Random) -> str:
    """Key words: "red car, snow"."""
    if scene.relation is not None or is_group(scene):
        phrase = subject(scene, rng)
    else:
        phrase = rng.choice((", ", " ")).join(
            adjectives(t, rng) + named(kinds()[t.kind], rng) for t in scene.things
        )
    if scene.background in PLAINS:
        return phrase + where(scene, rng)
    return phrase + rng.choice((", ", " ")) + scene.background


def plain(scene: Scene, rng: random.Random) -> str:
    opening = rng.choice(OPENINGS)
    phrase = subject(scene, rng)
    if opening == "a cute ":
        # "a cute fox", and nothing before a number
        opening = "" if not phrase.startswith(("a ", "an ")) else opening
        phrase = re.sub(r"^an? ", "", phrase) if opening else phrase
    if rng.random() < 0.15 and scene.background in PLACES:
        return f"{where(scene, rng).strip()}: {opening}{phrase}"
    return opening + phrase + where(scene, rng)


def emoji(scene: Scene, rng: random.Random) -> str:
    """Emoji as words: "🦊 in the snow"; a group now and then as so many of them."""
    things = scene.things
    if is_group(scene) and not things[0].colour and rng.random() < 0.5:
        return kinds()[things[0].kind].emoji * len(things) + where(scene, rng)
    return subject(scene, rng, emoji=True) + where(scene, rng)


def detailed(scene: Scene, rng: random.Random) -> str:
    extra = ", ".join(rng.sample(DETAILS, rng.choice((1, 2, 3))))
    return f"{subject(scene, rng)}{where(scene, rng)}, {extra}"


def free(scene: Scene, rng: random.Random) -> str:
    return rng.choice(FREE) + subject(scene, rng) + where(scene, rng) + rng.choice(("", "", ", please", "!"))


def sentences(scene: Scene, rng: random.Random) -> str:
    """Facts one after the other."""
    verb = "are" if len(scene.things) > 1 and scene.relation is None else "is"
    ending = where(scene, rng)
    told = rng.choice((f". the scene is{ending}", f". this is{ending}", ending)) if ending else ""
    return f"there {verb} {subject(scene, rng)}{told}."


def portrait(scene: Scene, rng: random.Random) -> str:
    """A single large object."""
    kind, thing = kinds()[scene.things[0].kind], scene.things[0]
    words = rng.choice(("a portrait of ", "a close-up of ", "a close up of "))
    said = f"{thing.colour} " if thing.colour else ""
    return words + article(said + named(kind, rng)) + where(scene, rng)


STYLES: dict[str, Callable[[Scene, random.Random], str]] = {
    "terse": terse,
    "plain": plain,
    "emoji": emoji,
    "detailed": detailed,
    "free": free,
    "sentences": sentences,
}
WEIGHTS = (0.15, 0.38, 0.12, 0.12, 0.12, 0.11)


def caption(scene: Scene, rng: random.Random, style: str | None = None) -> str:
    """One caption of the scene, lower case as the text encoder sees it, in `style` or a random one."""
    if style is None and len(scene.things) == 1 and scene.things[0].size == "large" and rng.random() < 0.3:
        return portrait(scene, rng)
    return STYLES[style or rng.choices(list(STYLES), WEIGHTS)[0]](scene, rng)


def texts(count: int) -> Iterator[str]:
    """All names, and so many captions of scenes: every word that there is."""
    rng = random.Random("vocabulary")
    for _ in range(count):
        yield caption(draw_scene(rng), rng)
    for kind in kinds().values():
        yield " ".join((kind.name, kind.plural, kind.emoji, *kind.others, *map(plural_of, kind.others)))
