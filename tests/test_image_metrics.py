"""PSNR and SSIM by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sana_edge.errors import InvalidInput
from sana_edge.image_metrics import psnr, ssim


def picture(seed: int = 0, side: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(40, 200, (side, side, 3), dtype=np.uint8)


def test_psnr_by_hand() -> None:
    """An error of 1 in every value: 20 log10 255; of 255: none."""
    assert psnr(picture(), picture() + 1) == pytest.approx(20 * math.log10(255))
    black = np.zeros((8, 8, 3), np.uint8)
    assert psnr(black, black + 255) == 0.0
    assert psnr(black, black) == math.inf


def test_ssim_is_its_definition_at_every_window() -> None:
    """The formula with the two-dimensional window, one place after the other. fp64: 1e-12 is rounding."""
    x, y = picture(0).astype(float), picture(1).astype(float)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / 4.5)
    window /= window.sum()
    values = []
    for top, left, channel in np.ndindex(14, 14, 3):
        a, b = (p[top : top + 11, left : left + 11, channel] for p in (x, y))
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = 2.55**2, 7.65**2
        light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        values.append(light * (2 * cov + c2) / (var_a + var_b + c2))
    assert ssim(picture(0), picture(1)) == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(picture(), picture()) == pytest.approx(1.0, abs=1e-12)
    assert ssim(picture(), 255 - picture()) < -0.9


def test_pictures_that_cannot_be_compared() -> None:
    with pytest.raises(InvalidInput, match=r"\(24, 24, 3\) and \(23, 23, 3\)"):
        psnr(picture(), picture(side=23))
    with pytest.raises(InvalidInput, match="10x10"):
        ssim(picture(side=10), picture(side=10))
