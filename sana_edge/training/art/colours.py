"""Pictures in named colours: the hue that leads in a picture is turned to another, all others stay."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .source import picture

Array = NDArray[np.floating[Any]]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.985, 1.0, 0.95),
    "orange": (0.07, 1.0, 1.0),
    "yellow": (0.135, 0.95, 1.04),
    "green": (0.37, 0.85, 0.82),
    "blue": (0.595, 0.95, 0.98),
    "purple": (0.75, 0.75, 0.92),
    "pink": (0.92, 0.5, 1.08),
    "black": (0.7, 0.25, 0.3),
    "white": (0.6, 0.07, 1.15),
}
"""Hue (0 to 1), and the factors of saturation and value, of pictures that are about as strong as red ones."""
NEAR, FAR = 0.1, 0.15
"""Hues up to NEAR of the leading one are turned whole, those beyond FAR not at all."""


@lru_cache(maxsize=2048)
def coloured(pictures: Path, code: str, colour: str) -> Image.Image:
    """The art of `code`, of the folder `pictures`, in `colour` ("" for its own), (256, 256) RGBA."""
    image = picture(pictures, code)
    return image if not colour else recolour(image, colour)


def recolour(image: Image.Image, colour: str) -> Image.Image:
    """An RGBA picture whose leading hue has become `colour`, with its light and shade."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    hue, saturation, value = split(pixels[..., :3])
    weight = pixels[..., 3] * saturation * value * (saturation > 0.2)
    leading = leading_hue(hue, weight)
    offset = (hue - leading + 0.5) % 1 - 0.5
    share = np.clip((FAR - abs(offset)) / (FAR - NEAR), 0, 1) * np.clip((saturation - 0.08) / 0.17, 0, 1)
    near = weight * (abs(offset) < NEAR)
    strength, light = (float((near * part).sum() / max(near.sum(), 1e-6)) for part in (saturation, value))
    target, more, brighter = COLOURS[colour]
    painted = join(
        (target + 0.35 * offset) % 1,
        np.clip(saturation * more * (0.85 / max(strength, 0.3)), 0, 1),
        np.clip(value * brighter * (0.9 / max(light, 0.6)), 0, 1),
    )
    mixed = pixels[..., :3] + share[..., None] * (painted - pixels[..., :3])
    whole = np.concatenate((mixed, pixels[..., 3:]), axis=2)
    return Image.fromarray(np.rint(255 * whole).astype(np.uint8), "RGBA")


def leading_hue(hue: Array, weight: Array) -> float:
    """The hue with most weight within NEAR of it, of 72."""
    counts, _ = np.histogram(hue, bins=72, range=(0, 1), weights=weight)
    reach = round(NEAR * 72)
    sums = [counts[[(i + d) % 72 for d in range(-reach, reach + 1)]].sum() for i in range(72)]
    best = int(np.argmax(sums))
    around = (hue - best / 72 + 0.5) % 1 - 0.5
    near = weight * (abs(around) < NEAR)
    return float((best / 72 + (near * around).sum() / max(float(near.sum()), 1e-6)) % 1)


def split(rgb: Array) -> tuple[Array, Array, Array]:
    """Hue, saturation and value, each (H, W) in 0 to 1, of (H, W, 3) in 0 to 1."""
    high, low = rgb.max(2), rgb.min(2)
    span = np.maximum(high - low, 1e-6)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sixths = np.where(
        high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4)
    )
    return sixths / 6, np.where(high > low, (high - low) / np.maximum(high, 1e-6), 0), high


def join(hue: Array, saturation: Array, value: Array) -> Array:
    """The inverse of `split`."""
    shift = np.array([5, 3, 1], dtype=np.float32)
    k = (shift + 6 * hue[..., None]) % 6
    ramp = np.clip(np.minimum(k, 4 - k), 0, 1)
    mixed: Array = value[..., None] * (1 - saturation[..., None] * ramp)
    return mixed
