"""The judge of the flat shapes: an analytic detector of the scenes' objects, with no learned weights.

Analysis by synthesis: the background is the backdrop that leaves the least; then, one after the other, the
object that explains most of what is left is drawn on it. An object counts if all its parts have their edges
where the drawing has them: a disc in the right colour is no balloon.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from judge.fitting import CAP, MARGIN, SIDE, Array, Fit, Fitter, framed, grounds, soften
from sana_edge.evaluate.judge.prompts import Detection, Judgement, check_picture

THRESHOLD = 0.6
"""The least score of an object that counts."""
MOST = 8
"""More objects than any scene has: the search ends."""
REACH = 2
"""Edges may be this many pixels of SIDE from where the drawing has them (4 of 256)."""
STRONG, FAINT = 30.0, 4.0
"""Colour differences per pixel from which an edge is as strong as any, and up to which it is noise."""
WRONG = 3 * 25.0**2
"""The squared colour difference at which an edge is lost."""
CELLS = 6
"""Parts of an object: CELLS x CELLS over its box."""


def judge(pixels: NDArray[np.uint8]) -> Judgement:
    """Says what is in a picture.

    pixels: (H, H, 3) uint8 RGB, at least 128 pixels a side.
    Raises: ValueError for another shape or type.
    """
    check_picture(pixels, SIDE)
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    name, ground, picture = _background(soften(small))
    kept = _agreeing(_fits(picture, ground), picture, ground)
    return Judgement(name, tuple(_detection(fit, score) for score, fit in kept))


def _background(picture: Array) -> tuple[str, Array, Array]:
    """The nearest backdrop's name; it, framed; and the picture without its colour cast, framed by it."""
    costs = {name: np.minimum(_squares(picture - ground), CAP).mean() for name, ground in grounds().items()}
    name = min(costs, key=lambda n: costs[n])
    ground = grounds()[name]
    near = _squares(picture - ground) < 3 * 20.0**2
    if near.mean() > 0.1:
        picture = picture - np.median((picture - ground)[near], axis=0)
    # beyond the edge the picture equals the backdrop: an object gains nothing there
    backdrop, whole = framed(ground), framed(ground)
    whole[MARGIN:-MARGIN, MARGIN:-MARGIN] = picture
    return name, backdrop, whole


def _fits(picture: Array, ground: Array) -> list[Fit]:
    """The objects that gain most, one after the other, no two of them in one place."""
    fits: list[Fit] = []
    canvas = ground.copy()
    fitter = Fitter(picture)
    for _ in range(MOST):
        fit = fitter.best(canvas)
        if fit.gain <= 0:
            break
        fits.append(fit)
        # nothing is left to explain here
        near = fit.stamp.near
        canvas[fit.window][near] = picture[fit.window][near]
    return fits


def _agreeing(fits: list[Fit], picture: Array, ground: Array) -> list[tuple[float, Fit]]:
    """The fits that score THRESHOLD, surest first: as long as one does not, the worst is taken away."""
    while fits:
        scored = []
        for fit in fits:
            canvas = ground.copy()
            for other in fits:
                if other is not fit:
                    other.draw(canvas)
            scored.append((_score(fit, picture, canvas), fit))
        scored.sort(key=lambda pair: -pair[0])
        if scored[-1][0] >= THRESHOLD:
            return scored
        fits = [fit for _, fit in scored[:-1]]
    return []


def _detection(fit: Fit, score: float) -> Detection:
    left, top, right, bottom = fit.stamp.extent
    box = ((fit.x + left) / SIDE, (fit.y + top) / SIDE, (fit.x + right) / SIDE, (fit.y + bottom) / SIDE)
    return Detection(fit.kind, fit.colour, fit.x / SIDE, fit.y / SIDE, box, score)


def _score(fit: Fit, picture: Array, canvas: Array) -> float:
    """How well a drawing of the object on `canvas` agrees with the picture, 0 to 1.

    It is 1 less the share of the drawing's edges that the picture lacks, or of the picture's that the drawing
    lacks if that is more, in the worst quarter of the object's parts.
    """
    want, have = picture[fit.window], fit.stamp.laid(canvas[fit.window])
    return 1 - max(_lost(have, want, fit), _lost(want, have, fit))


def _lost(image: Array, other: Array, fit: Fit) -> float:
    """The share of the edges of `image` that `other` has nowhere near, in the worst quarter of the parts."""
    down, right = np.gradient(image, axis=(0, 1))
    slope = np.sqrt(_squares(np.asarray(down)) + _squares(np.asarray(right)))
    edges = np.clip(slope - FAINT, 0, STRONG) * fit.stamp.near
    least = np.full(edges.shape, WRONG, dtype=np.float32)
    shifted = np.pad(other, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="edge")
    rows, columns = edges.shape
    for y in range(2 * REACH + 1):
        for x in range(2 * REACH + 1):
            np.minimum(least, _squares(image - shifted[y : y + rows, x : x + columns]), out=least)
    parts = _parts(fit).ravel()
    total = np.bincount(parts, edges.ravel(), CELLS**2)
    lost = np.bincount(parts, (edges * least).ravel(), CELLS**2) / WRONG
    counted = total > 0.1 * total.max(initial=1e-6)
    shares = np.sort(lost[counted] / total[counted])
    return float(shares[-math.ceil(len(shares) / 4) :].mean()) if len(shares) else 0.0


def _parts(fit: Fit) -> NDArray[np.intp]:
    """(S, S): the number of the part that each pixel of the stamp belongs to."""
    left, top, right, bottom = fit.stamp.extent
    steps = np.arange(-fit.stamp.half, fit.stamp.half)
    row = np.clip((steps - top) * CELLS // (bottom - top), 0, CELLS - 1)
    column = np.clip((steps - left) * CELLS // (right - left), 0, CELLS - 1)
    parts: NDArray[np.intp] = row[:, None] * CELLS + column[None, :]
    return parts


def _squares(difference: Array) -> Array:
    squares: Array = np.einsum("...c,...c->...", difference, difference)
    return squares
