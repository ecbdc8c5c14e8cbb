"""Finds the object that explains most of what a picture still shows: what, where, how large, which colour.

Objects are laid on it as stamps, cut out of their background by the drawing code itself: the judge has no
weights and knows nothing of any model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from sana_edge.training.scenes import BACKGROUNDS, COLOURS, KINDS, SUPERSAMPLE, Brush, Thing, backdrop

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
MISS = 2.0
"""A pixel that an object gets wrong costs this much more than a pixel that it puts right gains."""
CAP = 3 * 40.0**2
"""Squared colour differences count up to this much, so that no outline outweighs an area."""
MARGIN = SIDE // 2
"""Arrays have this many pixels around the picture, so that stamps may reach over its edge."""
CANDIDATES = 5
ALIKE = 2e5
"""Gains of the first search, in squared colour differences, that say nothing about which kind is better."""
LEVELS = range(1, LARGEST, 3)
MOVES = (
    *((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)),
    *((1, 0, 1), (1, 0, -1), (-1, 0, 1), (-1, 0, -1)),
)
"""Steps of a climb in level, x and y; size and y go together, as most objects are heavier at one end."""


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


@dataclass(frozen=True)
class Fit:
    """An object at a place: its centre in pixels of SIDE, and what drawing it gains, in pixels put right."""

    kind: str
    colour: str
    level: float
    x: float
    y: float
    gain: float = 0.0

    @property
    def stamp(self) -> Stamp:
        return stamp(self.kind, self.colour, self.level, self.x - round(self.x), self.y - round(self.y))

    @property
    def window(self) -> tuple[slice, slice]:
        """The stamp's rows and columns in an array with MARGIN."""
        half = self.stamp.half
        x, y = round(self.x) + MARGIN, round(self.y) + MARGIN
        return slice(y - half, y + half), slice(x - half, x + half)

    def draw(self, canvas: Array) -> None:
        canvas[self.window] = self.stamp.laid(canvas[self.window])


class Fitter:
    """The search for the next object of one picture, (SIDE + 2 MARGIN, SIDE + 2 MARGIN, 3)."""

    def __init__(self, picture: Array) -> None:
        self.picture = picture
        self._small = _shrunk(_inner(picture))
        paints, _, energy = _bank()
        spectrum = np.fft.rfft2(self._small, axes=(0, 1)).transpose(2, 0, 1)
        product = np.einsum("cyx,klhcyx->klhyx", spectrum, paints, optimize=True)
        self._match = MISS * (2 * np.fft.irfft2(product, s=self._small.shape[:2]) - energy[..., None, None])

    def best(self, canvas: Array) -> Fit:
        """The object that brings `canvas` closest to the picture; it gains nothing (<= 0) if none does."""
        rough = [self._climbed(fit, canvas, steps=3) for fit in self._candidates(canvas)]
        fit = self._climbed(max(rough, key=_gain), canvas, steps=12)
        fit = max((self._weighed(fit, canvas, colour=colour) for colour in COLOURS), key=_gain)
        return self._polished(fit, canvas)

    def _candidates(self, canvas: Array) -> list[Fit]:
        """The best place of each kind in steps of SHRINK pixels and three levels, of the most gainful kinds.

        What a stamp gains is a sum of correlations with it: over its pixels, alpha |I - C|^2 less MISS alpha
        |I - paint / alpha|^2, where I is the picture and C the canvas.
        """
        _, alphas, _ = _bank()
        side = self._small.shape[0]
        worth = _squares(self._small - _shrunk(_inner(canvas))) - MISS * _squares(self._small)
        # (kinds, levels, colours, y, x)
        gains = np.fft.irfft2(np.fft.rfft2(worth) * alphas, s=(side, side))[:, :, None] + self._match
        fits = []
        for kind, maps in zip(KINDS, gains, strict=True):
            level, colour, y, x = (int(i) for i in np.unravel_index(maps.argmax(), maps.shape))
            gain = float(maps[level, colour, y, x])
            fits.append(Fit(kind, list(COLOURS)[colour], LEVELS[level], SHRINK * x, SHRINK * y, gain))
        fits.sort(key=_gain, reverse=True)
        least = 0.5 * fits[0].gain - ALIKE
        return [fit for fit in fits[:CANDIDATES] if fit.gain >= least]

    def _weighed(self, fit: Fit, canvas: Array, **change: Any) -> Fit:
        """The fit with something changed, and what it then gains."""
        fit = replace(fit, **change)
        piece, picture, under = fit.stamp, self.picture[fit.window], canvas[fit.window]
        before = np.minimum(_squares(picture - under), CAP)
        after = np.minimum(_squares(picture - piece.laid(under)), CAP)
        return replace(fit, gain=float((piece.alpha[..., 0] * (before - MISS * after)).sum()) / CAP)

    def _climbed(self, fit: Fit, canvas: Array, steps: int) -> Fit:
        """Moves, grows or shrinks the object for as long as that gains."""
        best = self._weighed(fit, canvas)
        for _ in range(steps):
            start = best
            for level, dx, dy in MOVES:
                change = {
                    "level": min(max(best.level + level, 0), LARGEST),
                    "x": min(max(best.x + dx, 0), SIDE),
                    "y": min(max(best.y + dy, 0), SIDE),
                }
                best = max(best, self._weighed(best, canvas, **change), key=_gain)
            if best is start:
                break
        return best

    def _polished(self, fit: Fit, canvas: Array) -> Fit:
        """The fit between the steps of a climb: at the vertices of parabolas through the gains around it."""
        change = {}
        for name, top in (("level", LARGEST), ("x", SIDE), ("y", SIDE)):
            here = getattr(fit, name)
            low, high = (
                self._weighed(fit, canvas, **{name: min(max(here + step, 0), top)}).gain for step in (-1, 1)
            )
            bend = low - 2 * fit.gain + high
            if bend < 0:
                change[name] = here + min(max(0.5 * (low - high) / bend, -0.5), 0.5)
        return max(fit, self._weighed(fit, canvas, **change), key=_gain)


def framed(image: Array) -> Array:
    """With MARGIN pixels of its own edge around it."""
    return np.pad(image, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), mode="edge")


def _inner(image: Array) -> Array:
    return image[MARGIN:-MARGIN, MARGIN:-MARGIN]


def _gain(fit: Fit) -> float:
    return fit.gain


def _squares(difference: Array) -> Array:
    """(..., 3) to the squared length."""
    squares: Array = np.einsum("...c,...c->...", difference, difference)
    return squares


@lru_cache(maxsize=1)
def _bank() -> tuple[NDArray[np.complex64], NDArray[np.complex64], Array]:
    """Spectra of paint, (kinds, levels, colours, 3, side, side / 2 + 1), and alpha; the paint's energy."""
    side = SIDE // SHRINK
    paints = np.zeros((len(KINDS), len(LEVELS), len(COLOURS), 3, side, side // 2 + 1), dtype=np.complex64)
    alphas = np.zeros((len(KINDS), len(LEVELS), side, side // 2 + 1), dtype=np.complex64)
    energy = np.zeros(paints.shape[:3], dtype=np.float32)
    for i, kind in enumerate(KINDS):
        for j, level in enumerate(LEVELS):
            for k, colour in enumerate(COLOURS):
                piece = stamp(kind, colour, level)
                paint, alpha = _shrunk(piece.paint), _shrunk(piece.alpha)
                paints[i, j, k] = _spectrum(paint)
                energy[i, j, k] = (_squares(paint) / np.maximum(alpha[..., 0], 1e-3)).sum()
                alphas[i, j] = _spectrum(alpha)[0]
    return paints, alphas, energy


def _spectrum(piece: Array) -> NDArray[np.complex64]:
    """(S, S, C) to the conjugate spectrum (C, side, side / 2 + 1), the middle of the piece at the origin."""
    side, half = SIDE // SHRINK, piece.shape[0] // 2
    wrapped = np.zeros((piece.shape[2], side, side), dtype=np.float32)
    index = np.arange(-half, half) % side
    for channel, layer in zip(wrapped, piece.transpose(2, 0, 1), strict=True):
        np.add.at(channel, np.ix_(index, index), layer)
    return np.conj(np.fft.rfft2(wrapped))


def _shrunk(image: Array) -> Array:
    side = image.shape[0] // SHRINK
    small: Array = image.reshape(side, SHRINK, side, SHRINK, -1).mean(axis=(1, 3), dtype=np.float32)
    return small


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
