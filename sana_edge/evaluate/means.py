"""Means of a score over pictures, and the difference of two models' on the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.evaluate.paired import SAMPLES

_CHUNK = 500
"""Samples at a time: 500 of 10,000 pictures are 40 MB."""

_Values = NDArray[np.float64]


@dataclass(frozen=True)
class Mean:
    """A mean, or a median, of ``count`` values with its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float
    count: int

    def facts(self, digits: int) -> dict[str, Any]:
        """As JSON values."""
        interval = [round(self.low, digits), round(self.high, digits)]
        return {"value": round(self.value, digits), "interval_95": interval, "n": self.count}


@dataclass(frozen=True)
class Difference(Mean):
    """The mean of the second model's scores less the first's, picture by picture.

    p: two-sided, of the test that flips signs: where models are equal, either may have drawn either picture.
    """

    p: float

    def facts(self, digits: int) -> dict[str, Any]:
        return {**super().facts(digits), "p": float(f"{self.p:.4g}"), "test": "sign flips"}


def mean(values: Sequence[float], *, seed: int = 0) -> Mean:
    """At least one value, all finite."""
    found = np.asarray(values, dtype=np.float64)
    low, high = _percentiles([sample.mean(axis=1) for sample in _samples(found, seed)])
    return Mean(float(found.mean()), low, high, len(found))


def median(values: Sequence[float], *, seed: int = 0) -> Mean:
    """At least one value; infinite ones count as the largest."""
    found = np.asarray(values, dtype=np.float64)
    # half a step between two values may be half of infinity: an order statistic is always a value
    middle = [
        np.partition(sample, len(found) // 2, axis=1)[:, len(found) // 2] for sample in _samples(found, seed)
    ]
    low, high = _percentiles(middle)
    return Mean(float(np.sort(found)[len(found) // 2]), low, high, len(found))


def difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """Both answer the same prompts in the same order.

    Raises:
        ValueError: they are not as many.
    """
    pairs = list(zip(first, second, strict=True))
    found = mean([b - a for a, b in pairs], seed=seed)
    return Difference(
        found.value, found.low, found.high, found.count, sign_flips([b - a for a, b in pairs], seed=seed)
    )


def sign_flips(differences: Sequence[float], *, seed: int = 0) -> float:
    """The share of sign patterns, SAMPLES at random and the one at hand, with as large a mean."""
    found = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # sums of the same values in another order differ in the last bits
    least = abs(float(found.sum())) * (1 - 1e-12)
    larger = 0
    for size in _sizes():
        signs = 2.0 * rng.integers(0, 2, size=(size, len(found)), dtype=np.int8) - 1
        larger += int((np.abs(signs @ found) >= least).sum())
    return (1 + larger) / (1 + SAMPLES)


def _samples(values: _Values, seed: int) -> Iterator[_Values]:
    rng = np.random.default_rng(seed)
    for size in _sizes():
        yield values[rng.integers(0, len(values), size=(size, len(values)))]


def _sizes() -> list[int]:
    return [min(_CHUNK, SAMPLES - start) for start in range(0, SAMPLES, _CHUNK)]


def _percentiles(found: Sequence[_Values]) -> tuple[float, float]:
    ordered = np.sort(np.concatenate(found))
    # no interpolation, as values may be infinite
    return float(ordered[int(0.025 * SAMPLES)]), float(ordered[int(0.975 * SAMPLES) - 1])
