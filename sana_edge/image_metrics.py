"""How alike two pictures are: PSNR and SSIM of RGB pictures (H, W, 3) uint8."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from sana_edge.errors import InvalidInput

PEAK = 255.0
"""The largest value of a pixel."""
WINDOW, SIGMA = 11, 1.5
"""SSIM's Gaussian window, in pixels."""
NEAR = 35.0
"""PSNR in dB from which on pictures count as near."""
K1, K2 = 0.01, 0.03
"""SSIM's constants against division by zero, as shares of the peak."""

Pixels = NDArray[np.uint8]
_Plane = NDArray[np.float64]


def psnr(picture: Pixels, reference: Pixels) -> float:
    """Peak signal to noise ratio in dB over all pixels and channels; infinite for equal pictures.

    Raises: InvalidInput for pictures of unequal shapes.
    """
    a, b = _pair(picture, reference)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(PEAK**2 / error)


def ssim(picture: Pixels, reference: Pixels) -> float:
    """Structural similarity, -1 to 1 for equal pictures: the mean over the three channels.

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window of 11 x 11 pixels, sigma 1.5, only where
    it fits inside; variances are those of the population.

    Raises: InvalidInput for pictures of unequal shapes, or with a side below 11 pixels.
    """
    x, y = _pair(picture, reference)
    if min(x.shape[:2]) < WINDOW:
        raise InvalidInput(
            f"a picture of {x.shape[1]}x{x.shape[0]} has no SSIM", f"its sides need {WINDOW} pixels"
        )
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x**2
    variance_y = _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return float(np.mean(above / below))


def _pair(picture: Pixels, reference: Pixels) -> tuple[_Plane, _Plane]:
    if picture.shape != reference.shape:
        raise InvalidInput(
            f"pictures of shapes {picture.shape} and {reference.shape} cannot be compared",
            "make both with the same size",
        )
    return picture.astype(np.float64), reference.astype(np.float64)


def _blurred(planes: _Plane) -> _Plane:
    """(H, W, C) to (H - 10, W - 10, C): the weighted mean under the window, one axis after the other."""
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    weights /= weights.sum()
    high, wide = planes.shape[0] - WINDOW + 1, planes.shape[1] - WINDOW + 1
    rows: _Plane = sum((w * planes[i : i + high] for i, w in enumerate(weights)), np.zeros(()))
    columns: _Plane = sum((w * rows[:, i : i + wide] for i, w in enumerate(weights)), np.zeros(()))
    return columns
