"""Flat-illustration scenes drawn by code: pictures to learn from without a download.

Every object is drawn in its own box, x and y from -1 to 1 (y down), supersampled and box-filtered. A scene
is plain data (`Scene`), so that captions, the held-out split and the judge of `benchmarks/judge` work
on facts, not on pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (226, 62, 68),
    "orange": (245, 134, 48),
    "yellow": (250, 210, 62),
    "green": (52, 160, 88),
    "blue": (58, 120, 220),
    "purple": (140, 88, 206),
    "pink": (244, 138, 182),
    "brown": (150, 96, 60),
    "black": (48, 48, 58),
    "white": (252, 250, 246),
}
BACKGROUNDS = ("plain", "meadow", "desert", "sea", "snow", "night")
SIZES: dict[str, float] = {"small": 0.72, "medium": 1.0, "large": 1.25}
CREAM: Colour = (255, 246, 222)
INK: Colour = (44, 44, 60)
TRUNK: Colour = (142, 98, 66)
GLASS: Colour = (206, 236, 248)
SUPERSAMPLE = 3


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` its centre and `radius` its half box, in units of the picture's side."""

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A background and its objects in order; `relation`, if any, is of the first object to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None


class Brush:
    """Draws in an object's own coordinates; outlines are a darker shade, as wide for every object size."""

    def __init__(self, draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
        self.draw, self.side = draw, side
        self.cx, self.cy, self.r = thing.x * side, thing.y * side, thing.radius * side
        self.fill = COLOURS[thing.colour]
        self.dark = shade(self.fill, 0.66 if thing.colour != "black" else 0.35)
        self.deep = shade(self.fill, 0.82) if thing.colour != "black" else (78, 78, 92)
        self.line = max(1, round(0.0125 * side))

    def at(self, x: float, y: float) -> Point:
        return (self.cx + x * self.r, self.cy + y * self.r)

    def polygon(self, points: Sequence[Point], fill: Colour | None = None, outline: bool = True) -> None:
        spots = [self.at(*p) for p in points]
        self.draw.polygon(spots, fill=fill or self.fill)
        if outline:
            self.draw.line(
                [*spots, spots[0], spots[1]], fill=self._edge(fill), width=self.line, joint="curve"
            )

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, fill: Colour | None = None, outline: bool = True
    ) -> None:
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        edge = self._edge(fill) if outline else None
        self.draw.ellipse(box, fill=fill or self.fill, outline=edge, width=self.line if outline else 0)

    def stroke(self, points: Sequence[Point], fill: Colour, width: float = 1.0) -> None:
        self.draw.line(
            [self.at(*p) for p in points], fill=fill, width=max(1, round(self.line * width)), joint="curve"
        )

    def _edge(self, fill: Colour | None) -> Colour:
        return self.dark if fill is None or fill in (self.fill, self.deep) else shade(fill, 0.66)


def shade(colour: Colour, factor: float) -> Colour:
    """The colour darkened (factor below 1) or lightened towards white (above 1)."""
    if factor <= 1:
        return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))
    mix = factor - 1
    return (
        int(colour[0] + (255 - colour[0]) * mix),
        int(colour[1] + (255 - colour[1]) * mix),
        int(colour[2] + (255 - colour[2]) * mix),
    )


def curve(formula: Callable[[float], Point], count: int = 48) -> list[Point]:
    """A closed curve: the formula over one turn, in radians."""
    return [formula(2 * math.pi * i / count) for i in range(count)]


def house(b: Brush) -> None:
    b.polygon([(-0.72, -0.12), (0.72, -0.12), (0.72, 0.95), (-0.72, 0.95)])
    b.polygon([(-1.0, -0.08), (0.0, -0.95), (1.0, -0.08)], b.deep)
    b.polygon([(-0.22, 0.32), (0.22, 0.32), (0.22, 0.95), (-0.22, 0.95)], TRUNK)
    for x in (-0.47, 0.47):
        b.polygon([(x - 0.14, 0.12), (x + 0.14, 0.12), (x + 0.14, 0.42), (x - 0.14, 0.42)], CREAM)


def tree(b: Brush) -> None:
    b.polygon([(-0.15, 0.2), (0.15, 0.2), (0.2, 0.98), (-0.2, 0.98)], TRUNK)
    b.polygon(
        curve(
            lambda t: (
                0.82 * math.cos(t) * (1 + 0.09 * math.cos(5 * t)),
                -0.3 + 0.68 * math.sin(t) * (1 + 0.09 * math.cos(5 * t)),
            )
        )
    )
    for x, y in ((-0.32, -0.38), (0.3, -0.1), (0.1, -0.6)):
        b.ellipse(x, y, 0.1, 0.1, b.deep, outline=False)


def car(b: Brush) -> None:
    b.polygon([(-0.55, -0.1), (-0.32, -0.6), (0.3, -0.6), (0.6, -0.1)])
    b.polygon([(-0.4, -0.12), (-0.24, -0.46), (-0.03, -0.46), (-0.03, -0.12)], GLASS)
    b.polygon([(0.07, -0.12), (0.07, -0.46), (0.24, -0.46), (0.43, -0.12)], GLASS)
    b.polygon([(-0.97, 0.0), (-0.85, -0.12), (0.8, -0.12), (0.97, 0.08), (0.97, 0.45), (-0.97, 0.45)])
    for x in (-0.5, 0.52):
        b.ellipse(x, 0.46, 0.27, 0.27, INK, outline=False)
        b.ellipse(x, 0.46, 0.11, 0.11, CREAM, outline=False)


def boat(b: Brush) -> None:
    b.stroke([(0.0, -0.95), (0.0, 0.4)], TRUNK, 2.0)
    b.polygon([(0.1, -0.85), (0.8, 0.22), (0.1, 0.22)], CREAM)
    b.polygon([(-0.1, -0.6), (-0.62, 0.22), (-0.1, 0.22)], CREAM)
    b.polygon([(-0.98, 0.36), (0.98, 0.36), (0.62, 0.9), (-0.62, 0.9)])


def fish(b: Brush) -> None:
    b.polygon([(0.42, 0.0), (0.98, -0.5), (0.86, 0.0), (0.98, 0.5)], b.deep)
    b.polygon([(-0.3, -0.4), (0.12, -0.78), (0.3, -0.3)], b.deep)
    b.ellipse(-0.2, 0.0, 0.76, 0.52)
    b.ellipse(-0.58, -0.12, 0.13, 0.13, CREAM, outline=False)
    b.ellipse(-0.6, -0.12, 0.065, 0.065, INK, outline=False)
    b.stroke([(-0.2, -0.3), (-0.08, 0.0), (-0.2, 0.3)], b.dark)


def cat(b: Brush) -> None:
    b.polygon([(-0.8, -0.05), (-0.78, -0.95), (-0.15, -0.5)])
    b.polygon([(0.8, -0.05), (0.78, -0.95), (0.15, -0.5)])
    b.ellipse(0.0, 0.14, 0.88, 0.76)
    for x in (-0.36, 0.36):
        b.ellipse(x, 0.0, 0.17, 0.2, CREAM, outline=False)
        b.ellipse(x, 0.02, 0.09, 0.15, INK, outline=False)
    b.polygon([(-0.12, 0.3), (0.12, 0.3), (0.0, 0.44)], (240, 140, 150), outline=False)
    b.stroke([(-0.24, 0.5), (-0.1, 0.62), (0.1, 0.62), (0.24, 0.5)], b.dark)


def star(b: Brush) -> None:
    spots = [
        (
            (1.0 if i % 2 == 0 else 0.46) * math.sin(math.pi * i / 5),
            0.06 - (1.0 if i % 2 == 0 else 0.46) * math.cos(math.pi * i / 5),
        )
        for i in range(10)
    ]
    b.polygon(spots)


def heart(b: Brush) -> None:
    b.polygon(
        curve(
            lambda t: (
                0.95 * math.sin(t) ** 3,
                -0.06
                - 0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)),
            )
        )
    )
    b.ellipse(-0.45, -0.4, 0.13, 0.1, shade(b.fill, 1.45), outline=False)


def mushroom(b: Brush) -> None:
    b.polygon([(-0.28, 0.0), (0.28, 0.0), (0.38, 0.9), (-0.38, 0.9)], CREAM)
    b.polygon(
        [(0.96 * math.cos(t), 0.12 + 0.98 * -math.sin(t)) for t in [math.pi * i / 24 for i in range(25)]]
    )
    for x, y, r in ((-0.45, -0.2, 0.15), (0.08, -0.5, 0.18), (0.52, -0.14, 0.13)):
        b.ellipse(x, y, r, r, CREAM, outline=False)


def balloon(b: Brush) -> None:
    b.stroke([(0.0, 0.45), (0.08, 0.65), (-0.08, 0.82), (0.0, 0.99)], INK, 0.9)
    b.polygon([(-0.12, 0.58), (0.12, 0.58), (0.0, 0.4)], b.deep)
    b.ellipse(0.0, -0.24, 0.66, 0.74)
    b.ellipse(-0.26, -0.5, 0.12, 0.18, shade(b.fill, 1.5), outline=False)


def rocket(b: Brush) -> None:
    b.polygon([(-0.2, 0.6), (0.2, 0.6), (0.0, 1.0)], (250, 160, 50), outline=False)
    b.polygon([(-0.3, 0.05), (-0.72, 0.68), (-0.25, 0.58)], b.deep)
    b.polygon([(0.3, 0.05), (0.72, 0.68), (0.25, 0.58)], b.deep)
    b.polygon(
        [(0.0, -1.0), (0.26, -0.66), (0.37, -0.2), (0.33, 0.62), (-0.33, 0.62), (-0.37, -0.2), (-0.26, -0.66)]
    )
    b.ellipse(0.0, -0.2, 0.19, 0.19, GLASS)


def flower(b: Brush) -> None:
    b.stroke([(0.0, 0.0), (0.0, 0.98)], (70, 140, 84), 2.4)
    b.polygon([(0.02, 0.8), (0.42, 0.42), (0.5, 0.62)], (96, 176, 104), outline=False)
    for i in range(6):
        angle = math.pi * (2 * i + 1) / 6
        b.ellipse(0.43 * math.cos(angle), -0.32 + 0.43 * math.sin(angle), 0.27, 0.27)
    b.ellipse(
        0.0, -0.32, 0.26, 0.26, (255, 222, 120) if b.fill != COLOURS["yellow"] else TRUNK, outline=False
    )


KINDS: dict[str, Callable[[Brush], None]] = {
    f.__name__: f for f in (house, tree, car, boat, fish, cat, star, heart, mushroom, balloon, rocket, flower)
}


def _band(
    draw: ImageDraw.ImageDraw, side: int, level: float, height: float, turns: float, fill: Colour
) -> None:
    """Everything below a sine line: hills, dunes, waves."""
    spots = [
        (side * i / 32, side * (level - height * math.sin(2 * math.pi * turns * i / 32 + 4 * level)))
        for i in range(33)
    ]
    draw.polygon([(0, side), *spots, (side, side)], fill=fill)


def _dots(draw: ImageDraw.ImageDraw, side: int, fill: Colour, radius: float) -> None:
    for i in range(14):
        x, y = (0.07 + 0.381966 * 2.3 * i) % 1.0 * side, (0.05 + 0.618034 * 1.7 * i) % 1.0 * side
        draw.ellipse((x - radius * side, y - radius * side, x + radius * side, y + radius * side), fill=fill)


@lru_cache(maxsize=32)
def backdrop(name: str, side: int) -> Image.Image:
    """The background alone, (side, side) RGB; the same for every scene of that name."""
    skies: dict[str, Colour] = {
        "plain": (222, 231, 236),
        "meadow": (190, 226, 244),
        "desert": (250, 222, 184),
        "sea": (198, 234, 236),
        "snow": (206, 214, 240),
        "night": (66, 72, 122),
    }
    image = Image.new("RGB", (side, side), skies[name])
    draw = ImageDraw.Draw(image)
    if name == "meadow":
        _band(draw, side, 0.70, 0.04, 1.0, (186, 222, 160))
        _band(draw, side, 0.84, 0.03, 1.5, (162, 208, 136))
    elif name == "desert":
        _band(draw, side, 0.70, 0.05, 1.0, (240, 204, 148))
        _band(draw, side, 0.85, 0.03, 1.5, (228, 186, 126))
    elif name == "sea":
        for level, fill in ((0.62, (150, 212, 224)), (0.75, (124, 196, 214)), (0.88, (102, 180, 204))):
            _band(draw, side, level, 0.016, 3.0, fill)
    elif name == "snow":
        _dots(draw, side, (228, 233, 248), 0.014)
        _band(draw, side, 0.76, 0.05, 1.0, (226, 232, 246))
    elif name == "night":
        _dots(draw, side, (156, 160, 204), 0.008)
        _band(draw, side, 0.82, 0.04, 1.0, (52, 58, 100))
    return image


def render(scene: Scene, side: int = 256) -> Image.Image:
    """Draw a scene, anti-aliased.

    Returns: RGB image of (side, side) pixels.
    """
    large = side * SUPERSAMPLE
    image = backdrop(scene.background, large).copy()
    draw = ImageDraw.Draw(image)
    for thing in scene.things:
        KINDS[thing.kind](Brush(draw, thing, large))
    return image.reduce(SUPERSAMPLE)
