"""Means, medians and paired differences with their intervals and test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sana_edge.evaluate import means
from sana_edge.evaluate.paired import SAMPLES

# a percentile of SAMPLES is off by sqrt(0.025 0.975 / SAMPLES) over the normal density there, 0.058: 0.019
# standard deviations; three of those
PERCENTILE = 0.06


def test_interval_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = means.mean(values.tolist())
    deviation = values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * deviation, abs=PERCENTILE * deviation)
    assert found.high == pytest.approx(values.mean() + 1.96 * deviation, abs=PERCENTILE * deviation)
    assert means.mean(values.tolist()) == found


def test_difference_is_paired() -> None:
    """Scores spread by 10, differences around -0.5 by 0.1: the interval is that of the differences."""
    rng = np.random.default_rng(2)
    first = rng.normal(0, 10, 100)
    second = first - 0.5 + rng.normal(0, 0.1, 100)
    found = means.difference(first.tolist(), second.tolist())
    assert found.value == pytest.approx(-0.5, abs=0.04)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.01, rel=0.3)
    assert found.p == 1 / (1 + SAMPLES)
    with pytest.raises(ValueError, match="zip"):
        means.difference([1.0, 2.0], [1.0])


def test_sign_flips_is_the_exact_test() -> None:
    """All patterns of twelve values, counted: a share of n samples is within 3 sqrt(p (1 - p) / n)."""
    values = [0.3, -0.1, 0.25, 0.4, -0.2, 0.1, 0.05, 0.35, -0.3, 0.15, 0.2, 0.1]
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=12)
    ]
    exact = sum(total >= abs(sum(values)) - 1e-9 for total in sums) / len(sums)
    assert means.sign_flips(values) == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / SAMPLES))
    assert 0.02 < exact < 0.5


def test_nothing_differs() -> None:
    found = means.difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_median_of_pictures_that_may_be_equal() -> None:
    values = [30.0 + i / 10 for i in range(99)] + [math.inf] * 2
    found = means.median(values)
    assert found.value == 35.0 and 32 < found.low < 35 < found.high < 38
    assert means.median([math.inf] * 3) == means.Mean(math.inf, math.inf, math.inf, 3)
    assert means.median([28.0]) == means.Mean(28.0, 28.0, 28.0, 1)
