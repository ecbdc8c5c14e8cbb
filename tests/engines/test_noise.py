"""Noise without torch is torch's noise: over seeds, shapes and draws that go on, but for the last bits."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from sana_edge.engines.noise import NoiseSource

SEEDS = (0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**63 - 1)
# around 16, where torch changes its way, around multiples of it, and latents
SHAPES = (
    *((1,), (2,), (3, 5), (16,), (17,), (4, 4), (31,), (32,), (33,), (2, 3, 5)),
    *((1, 32, 1, 1), (1, 32, 8, 8), (1, 32, 5, 3), (1, 31, 3, 3), (1, 32, 32, 32)),
)

# The radius is at most sqrt(-2 ln 2^-24) = 5.77. An angle is a product of fp32 numbers below 2 pi, rounded to
# multiples of 2^-21: by 2^-22 here; on some processors torch multiplies in fp64 by 2 pi, which fp32 has
# 1.7e-7 too large, and rounds by 2^-22 too. Its own cosines and logarithms are good to a few 2^-24.
RADIUS = math.sqrt(48 * math.log(2))
TOLERANCE = RADIUS * (2 * 2**-22 + 1.8e-7 + 4 * 2**-24)


def theirs(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torch(seed: int, shape: tuple[int, ...]) -> None:
    ours = NoiseSource(seed).normal(shape)
    expected = torch.randn(shape, generator=theirs(seed)).numpy()
    assert ours.dtype == np.float32 and ours.shape == shape
    assert np.abs(ours - expected).max() <= TOLERANCE
    if ours.size < 16:
        # these are drawn in fp64 and rounded once: they differ where the 53 bits do
        assert np.abs(ours - expected).max() <= np.spacing(np.abs(expected)).max()


def test_many_seeds() -> None:
    for seed in range(1000, 1200):
        expected = torch.randn(4, 37, generator=theirs(seed)).numpy()
        assert np.abs(NoiseSource(seed).normal((4, 37)) - expected).max() <= TOLERANCE, seed


@pytest.mark.parametrize("seed", SEEDS)
def test_draws_go_on(seed: int) -> None:
    """As scm's do; of an odd number of single ones the next small tensor gets the half of a pair."""
    source, generator = NoiseSource(seed), theirs(seed)
    for count in (1, 20, 3, 16, 15, 1, 47, 2, 1024, 5, 5):
        expected = torch.randn(count, generator=generator).numpy()
        assert np.abs(source.normal((count,)) - expected).max() <= TOLERANCE, count


def test_seeds_and_draws_differ() -> None:
    one, two = NoiseSource(1), NoiseSource(2)
    first = one.normal((64,))
    assert np.abs(first - two.normal((64,))).max() > 0.5
    assert np.abs(first - one.normal((64,))).max() > 0.5


def test_it_is_normal() -> None:
    # standard errors of mean, variance and share beyond 2 over a million numbers: 0.001, 0.0014, 0.0002
    values = NoiseSource(3).normal((1 << 20,)).astype(np.float64)
    assert abs(values.mean()) < 0.005 and abs(values.var() - 1) < 0.007
    assert abs((np.abs(values) > 2).mean() - 0.0455) < 0.001
    assert np.isfinite(values).all()


def test_numpys_own_generator_is_left_alone() -> None:
    np.random.seed(5)
    expected = np.random.rand(3)
    np.random.seed(5)
    NoiseSource(7).normal((64,))
    assert np.array_equal(np.random.rand(3), expected)


def test_nothing_is_an_array_too() -> None:
    assert NoiseSource(1).normal((0, 4)).shape == (0, 4)


def test_needs_no_torch() -> None:
    code = "import sys, sana_edge.engines.noise; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
