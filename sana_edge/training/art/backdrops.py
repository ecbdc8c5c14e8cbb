"""Backgrounds in the soft light of the art, drawn by code: gradients, rounded hills, blurred clouds.

Coordinates are shares of the side, y down. Every background has VARIANTS forms: other hills, other clouds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]
Colour = tuple[int, int, int]

VARIANTS = 12
PLAINS: dict[str, tuple[Colour, Colour]] = {
    "plain": ((250, 247, 242), (226, 222, 220)),
    "plain pink": ((255, 222, 230), (246, 186, 204)),
    "plain blue": ((212, 232, 252), (168, 204, 242)),
    "plain green": ((222, 242, 216), (180, 220, 178)),
    "plain yellow": ((255, 242, 200), (248, 220, 146)),
    "plain purple": ((232, 222, 250), (200, 184, 236)),
}


class Canvas:
    """A picture in the making: `pixels` (side, side, 3) in 0 to 255, `x` and `y` of each pixel's centre."""

    def __init__(self, side: int, variant: int, top: Colour, bottom: Colour) -> None:
        steps = (np.arange(side, dtype=np.float32) + 0.5) / side
        self.side, self.rng = side, random.Random(f"backdrop {variant}")
        self.x, self.y = np.meshgrid(steps, steps)
        self.pixels = np.empty((side, side, 3), dtype=np.float32)
        self.pixels[:] = self.ramp(self.y, top, bottom)

    @staticmethod
    def ramp(t: Array, top: Colour, bottom: Colour) -> Array:
        """From one colour to the other while t goes from 0 to 1."""
        first, last = (np.array(c, dtype=np.float32) for c in (top, bottom))
        mixed: Array = first + np.clip(t, 0, 1)[..., None] * (last - first)
        return mixed

    def lay(self, cover: Array, colour: Array | Colour) -> None:
        """Puts a colour, or a picture of colours, on top where `cover` (side, side) is 1."""
        self.pixels += np.clip(cover, 0, 1)[..., None] * (np.asarray(colour, dtype=np.float32) - self.pixels)

    def band(
        self, level: float, height: float, turns: float, light: Colour, dark: Colour, depth: float = 0.3
    ) -> None:
        """A rounded hill: everything below a sine line, light at its edge and darker further down."""
        phase = self.rng.uniform(0, 2 * math.pi)
        line = level + self.rng.uniform(-0.015, 0.015) - height * np.sin(2 * math.pi * turns * self.x + phase)
        under = self.y - line
        self.lay(under * self.side + 0.5, self.ramp(under / depth, light, dark))

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float = 1.0) -> None:
        """A soft round light."""
        square = (self.x - x) ** 2 + (self.y - y) ** 2
        self.lay(strength * np.exp(-square / (2 * radius**2)), colour)

    def disc(self, x: float, y: float, rx: float, ry: float, light: Colour, dark: Colour) -> None:
        """An ellipse, lit from above left."""
        u, v = (self.x - x) / rx, (self.y - y) / ry
        inside = (1 - np.sqrt(u**2 + v**2)) * min(rx, ry) * self.side
        self.lay(inside + 0.5, self.ramp(0.5 + 0.35 * u + 0.45 * v, light, dark))

    def cloud(self, x: float, y: float, size: float, colour: Colour = (255, 255, 255)) -> None:
        """Three blurred puffs."""
        for dx, dy, r in ((-0.9, 0.15, 0.7), (0.0, -0.2, 1.0), (0.95, 0.2, 0.65)):
            square = ((self.x - x - dx * size) / (1.25 * r * size)) ** 2 + (
                (self.y - y - dy * size) / (0.75 * r * size)
            ) ** 2
            self.lay(0.8 / (1 + np.exp(np.clip(7 * (square - 1), -30, 30))), colour)

    def dots(self, count: int, low: float, high: float, radius: float, colour: Colour) -> None:
        """Small soft lights between two heights."""
        for _ in range(count):
            x, y = self.rng.random(), self.rng.uniform(low, high)
            self.glow(x, y, radius * self.rng.uniform(0.6, 1.2), colour, 0.9)


def meadow(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (150, 208, 250), (224, 243, 252))
    c.cloud(c.rng.uniform(0.1, 0.4), c.rng.uniform(0.1, 0.2), 0.075)
    c.cloud(c.rng.uniform(0.6, 0.95), c.rng.uniform(0.1, 0.28), 0.06)
    c.band(0.60, 0.04, 1.0, (176, 224, 132), (120, 190, 96))
    c.band(0.74, 0.03, 1.3, (152, 212, 104), (92, 170, 76))
    return c


def snow(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (176, 202, 236), (226, 236, 248))
    c.band(0.6, 0.05, 1.0, (246, 250, 255), (204, 220, 242))
    c.band(0.76, 0.03, 1.4, (255, 255, 255), (214, 226, 246))
    c.dots(26, 0.02, 0.95, 0.011, (255, 255, 255))
    return c


def sea(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (140, 206, 248), (222, 244, 250))
    c.cloud(c.rng.uniform(0.15, 0.85), c.rng.uniform(0.12, 0.24), 0.07)
    c.band(0.52, 0.004, 2.0, (96, 196, 226), (52, 150, 208))
    c.band(0.66, 0.014, 3.0, (74, 178, 222), (40, 132, 198))
    c.band(0.82, 0.016, 2.5, (56, 160, 214), (30, 110, 182))
    return c


def beach(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (132, 206, 250), (214, 242, 250))
    c.cloud(c.rng.uniform(0.15, 0.85), c.rng.uniform(0.1, 0.22), 0.065)
    c.band(0.47, 0.002, 1.0, (92, 200, 224), (64, 176, 214), 0.15)
    c.band(0.605, 0.012, 1.5, (250, 253, 252), (240, 248, 246), 0.05)
    c.band(0.63, 0.012, 1.5, (252, 230, 178), (236, 200, 138))
    return c


def desert(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (252, 214, 152), (255, 238, 206))
    c.glow(c.rng.uniform(0.2, 0.8), 0.22, 0.1, (255, 250, 224))
    c.band(0.58, 0.05, 0.9, (250, 202, 130), (228, 166, 96))
    c.band(0.74, 0.04, 1.2, (246, 188, 112), (214, 146, 80))
    return c


def night(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (30, 34, 86), (92, 88, 162))
    c.dots(22, 0.03, 0.6, 0.006, (255, 246, 214))
    c.band(0.7, 0.04, 1.0, (74, 74, 140), (46, 48, 104))
    c.band(0.83, 0.03, 1.4, (58, 60, 122), (34, 36, 84))
    return c


def room(side: int, variant: int) -> Canvas:
    walls: tuple[tuple[Colour, Colour], ...] = (
        ((250, 226, 200), (238, 206, 178)),
        ((214, 232, 226), (190, 216, 208)),
        ((236, 222, 240), (216, 198, 226)),
    )
    c = Canvas(side, variant, *walls[variant % 3])
    c.glow(c.rng.uniform(0.2, 0.8), 0.1, 0.25, (255, 250, 236), 0.6)
    c.band(0.655, 0.0, 1.0, (250, 246, 240), (240, 232, 222), 0.04)
    c.band(0.685, 0.0, 1.0, (214, 164, 116), (176, 124, 82))
    c.disc(0.5, 0.88, 0.42, 0.085, (240, 190, 180), (216, 150, 146))
    return c


def mountains(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (150, 196, 242), (230, 240, 250))
    for _ in range(3):
        x, y = c.rng.uniform(0.05, 0.95), c.rng.uniform(0.2, 0.34)
        ridge = y + 0.85 * np.abs(c.x - x)
        under = c.y - ridge
        c.lay(under * side * 0.7 + 0.5, c.ramp((c.x - x + 0.08) / 0.16, (150, 164, 204), (116, 130, 178)))
        cap = np.minimum(under, 0.1 + 0.02 * np.sin(60 * c.x) - (c.y - y))
        c.lay(cap * side * 0.7 + 0.5, c.ramp((c.x - x + 0.08) / 0.16, (255, 255, 255), (224, 232, 246)))
    c.band(0.64, 0.03, 1.0, (140, 190, 150), (96, 152, 116))
    c.band(0.78, 0.025, 1.3, (120, 178, 128), (80, 140, 98))
    return c


def sunset(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (122, 96, 176), (255, 190, 130))
    x = c.rng.uniform(0.25, 0.75)
    c.glow(x, 0.56, 0.26, (255, 214, 130), 0.8)
    c.disc(x, 0.55, 0.1, 0.1, (255, 246, 190), (255, 200, 110))
    c.cloud(c.rng.uniform(0.1, 0.9), c.rng.uniform(0.12, 0.28), 0.06, (236, 150, 170))
    c.band(0.64, 0.03, 1.0, (196, 106, 122), (140, 72, 112))
    c.band(0.78, 0.03, 1.3, (158, 80, 118), (104, 54, 100))
    return c


def sky(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (120, 190, 248), (206, 234, 253))
    for _ in range(3):
        c.cloud(c.rng.uniform(0.0, 1.0), c.rng.uniform(0.1, 0.5), c.rng.uniform(0.05, 0.09))
    for i in range(5):
        c.cloud(i / 4, c.rng.uniform(0.9, 1.0), 0.13)
    return c


def forest(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (196, 226, 190), (226, 242, 206))
    for layer, (light, dark) in enumerate(
        (((140, 190, 136), (108, 160, 112)), ((94, 156, 98), (62, 122, 76)))
    ):
        for i in range(5):
            x = (i + c.rng.uniform(0.1, 0.9)) / 5
            top, wide = c.rng.uniform(0.1, 0.22) + 0.1 * layer, c.rng.uniform(0.1, 0.14)
            c.disc(x, top + 0.2, wide, 0.24, light, dark)
    c.band(0.6, 0.02, 1.2, (150, 200, 110), (104, 166, 84))
    c.band(0.76, 0.025, 1.4, (132, 186, 98), (86, 146, 72))
    return c


def space(side: int, variant: int) -> Canvas:
    c = Canvas(side, variant, (22, 16, 58), (52, 30, 96))
    c.glow(c.rng.uniform(0.1, 0.9), c.rng.uniform(0.2, 0.8), 0.28, (110, 60, 160), 0.6)
    c.glow(c.rng.uniform(0.1, 0.9), c.rng.uniform(0.2, 0.8), 0.2, (50, 90, 180), 0.5)
    c.dots(34, 0.02, 0.98, 0.006, (255, 250, 240))
    return c


PLACES: dict[str, Callable[[int, int], Canvas]] = {
    f.__name__: f
    for f in (meadow, snow, sea, beach, desert, night, room, mountains, sunset, sky, forest, space)
}
BACKGROUNDS = (*PLAINS, *PLACES)
FLOATING = ("sky", "space")
"""Places without a ground, where nothing casts a shadow."""


@lru_cache(maxsize=256)
def backdrop(name: str, side: int, variant: int) -> NDArray[np.uint8]:
    """A background, (side, side, 3) uint8 RGB.

    variant: 0 to VARIANTS - 1.
    """
    if name in PLAINS:
        canvas = Canvas(side, variant, *PLAINS[name])
        canvas.glow(canvas.rng.uniform(0.25, 0.75), 0.25, 0.3, (255, 255, 255), 0.35)
    else:
        canvas = PLACES[name](side, variant)
    return np.rint(canvas.pixels).clip(0, 255).astype(np.uint8)
