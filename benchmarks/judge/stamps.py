"""Stamps: the objects of the scenes cut out of their background, for the judge to lay on a picture.

They come from the drawing code itself: the judge has no weights and knows nothing of any model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sana_edge.training.scenes import BACKGROUNDS, KINDS, SUPERSAMPLE, Brush, Thing, backdrop

SIDE = 128
"""Pictures are judged at this many pixels per side."""
BLUR = 1.0
"""Sigma, in pixels of SIDE, by which pictures and stamps are blurred: noise and soft edges matter less."""
SHRINK = 4
"""The first search sees one pixel for so many, and half a stamp is a multiple of it."""
RIM = 3
"""This many pixels around an object belong to its place."""
LARGEST = 23
"""Levels of size go from 0 to this."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Stamp:
    """An object alone: laid on `under`, the picture is `paint + (1 - alpha) * under`.

    paint: (S, S, 3), premultiplied, 0 to 255; alpha: (S, S, 1); near: (S, S) bool, the object and a rim;
    extent: the left, top, right and bottom of the object in pixels from the middle.
    """

    paint: Array
    alpha: Array
    near: NDArray[np.bool_]
    extent: tuple[int, int, int, int]

    @property
    def half(self) -> int:
        return len(self.alpha) // 2

    def laid(self, under: Array) -> Array:
        return self.paint + (1 - self.alpha) * under


def radius(level: float) -> float:
    """The half box in pixels, 5 % more each level: 0.125 to 0.384 of the side; scenes have 0.135 to 0.373."""
    return 0.125 * SIDE * math.pow(1.05, level)


@lru_cache(maxsize=1500)
def stamp(kind: str, colour: str, level: float, dx: float = 0.0, dy: float = 0.0) -> Stamp:
    """The object at a level of size, its centre `dx`, `dy` pixels from the middle of its square."""
    half = SHRINK * math.ceil((radius(level) * 1.06 + 2 * RIM) / SHRINK)
    thing = Thing(kind, colour, "medium", (half + dx) / SIDE, (half + dy) / SIDE, radius(level) / SIDE)
    dark, light = (_drawn(thing, half, grey) for grey in (0, 255))
    alpha = 1 - (light - dark).mean(axis=2, keepdims=True, dtype=np.float32) / 255
    inside = np.argwhere(alpha[..., 0] > 0.3) - half
    (top, left), (bottom, right) = inside.min(axis=0).tolist(), (inside.max(axis=0) + 1).tolist()
    solid = Image.fromarray((alpha[..., 0] > 0.1).astype(np.uint8))
    near = np.asarray(solid.filter(ImageFilter.MaxFilter(2 * RIM + 1))) > 0
    return Stamp(dark, alpha, near, (left, top, right, bottom))


@lru_cache(maxsize=1)
def grounds() -> dict[str, Array]:
    """The backdrops by name, (SIDE, SIDE, 3)."""
    return {name: soften(backdrop(name, SIDE * SUPERSAMPLE).reduce(SUPERSAMPLE)) for name in BACKGROUNDS}


def soften(image: Image.Image) -> Array:
    """RGB image to (H, W, 3) of 0 to 255, blurred by BLUR."""
    return np.asarray(image.filter(ImageFilter.GaussianBlur(BLUR)), dtype=np.float32)


def _drawn(thing: Thing, half: int, grey: int) -> Array:
    """(2 half, 2 half, 3): the object on an even ground."""
    image = Image.new("RGB", (2 * half * SUPERSAMPLE,) * 2, (grey,) * 3)
    KINDS[thing.kind](Brush(ImageDraw.Draw(image), thing, SIDE * SUPERSAMPLE))
    return soften(image.reduce(SUPERSAMPLE))
