"""Variations of a picture: the noise of its seed, a part of the way to that of other seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


def varied(
    source: Callable[[int], Callable[[], NDArray[np.float32]]],
    seed: int,
    variation: Sequence[tuple[int, float]],
) -> Callable[[], NDArray[np.float32]]:
    """Draws of a seed's noise with other seeds' noise mixed in, one after the other.

    Along the great circle between the two (arXiv 1609.04468), which keeps the variance: a strength of 0 is
    the first noise, 1 the other. It is what Automatic1111's web UI does for its "variation seed".

    Args:
        source: what draws N(0, 1) fp32 for a seed.
        variation: seeds, and strengths above 0 to 1.
    """
    draw, others = source(seed), [(source(other), strength) for other, strength in variation]

    def mixed() -> NDArray[np.float32]:
        noise = draw()
        for other, strength in others:
            noise = _slerp(noise, other(), strength)
        return noise

    return mixed


def _slerp(a: NDArray[np.float32], b: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    flat = [np.float64(x).ravel() for x in (a, b)]
    cosine = float(flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    # of one direction: the same seed
    if math.sin(angle) < 1e-4:
        return a
    shares = [np.float32(math.sin(part * angle) / math.sin(angle)) for part in (1 - strength, strength)]
    mixed: NDArray[np.float32] = shares[0] * a + shares[1] * b
    return mixed
