"""Scenes as plain data, and their pictures: captions, split and judge work on facts, not on pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .backdrops import FLOATING, backdrop
from .catalogue import kinds
from .colours import coloured
from .source import assets

ART = 0.96
"""An object's picture is this share of its box."""
ONE_WAY = ("ambulance", "alarm clock", "laptop", "camera", "guitar")
"""Never mirrored."""


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` its centre and `radius` its half box, in units of the picture's side.

    `colour` is "" for the kind's own; `size` is "small", "medium" or "large"; `mirrored` left for right.
    """

    kind: str
    colour: str
    size: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """A background, its form, and its objects in order; `relation`, if any, is of the first to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None
    variant: int = 0


def render(scene: Scene, side: int = 256) -> Image.Image:
    """Draws a scene.

    Returns: RGB image of (side, side) pixels.
    """
    image = Image.fromarray(shaded(scene, side))
    for thing in scene.things:
        width = max(1, round(2 * ART * thing.radius * side))
        art = sized(assets(), thing.kind, thing.colour, width, thing.mirrored and thing.kind not in ONE_WAY)
        corner = (round(thing.x * side - width / 2), round(thing.y * side - width / 2))
        image.paste(art, corner, art)
    return image


@lru_cache(maxsize=8192)
def sized(pictures: Path, kind: str, colour: str, width: int, mirrored: bool) -> Image.Image:
    """The picture of a kind, of the folder `pictures`, (width, width) RGBA."""
    art = coloured(pictures, kinds()[kind].code, colour)
    if mirrored:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return art.resize((width, width), Image.Resampling.LANCZOS if width < 256 else Image.Resampling.BICUBIC)


def shaded(scene: Scene, side: int) -> NDArray[np.uint8]:
    """The background with a soft shadow below each object, (side, side, 3)."""
    ground: NDArray[np.uint8] = backdrop(scene.background, side, scene.variant)
    if scene.background in FLOATING:
        return ground
    pixels: NDArray[np.uint8] = ground.copy()
    for thing in scene.things:
        middle = thing.y + 0.96 * thing.radius
        top, bottom = (int(np.clip((middle + s * 0.36 * thing.radius) * side, 0, side)) for s in (-1, 1))
        left, right = (int(np.clip((thing.x + s * 1.4 * thing.radius) * side, 0, side)) for s in (-1, 1))
        v = ((np.arange(top, bottom) + 0.5) / side - middle) / (0.12 * thing.radius)
        u = ((np.arange(left, right) + 0.5) / side - thing.x) / (0.55 * thing.radius)
        dark = 1 - 0.28 * np.exp(-(u[None, :] ** 2 + v[:, None] ** 2) / 2)
        part = pixels[top:bottom, left:right]
        pixels[top:bottom, left:right] = (part * dark[..., None]).astype(np.uint8)
    return pixels
