"""Two models on the same prompts and seeds: whether their scores differ, and how alike their pictures are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from sana_edge.evaluate.judge.scores import Outcome, by_category
from sana_edge.image_metrics import NEAR

SAMPLES = 20_000
"""Of the bootstrap."""
NAMES = ("float", "int8")
"""What JSON calls the two models."""


@dataclass(frozen=True)
class Counts:
    """Prompts that both models get right, only the first, only the second, and neither."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def total(self) -> int:
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """The second model's share of right pictures less the first's."""
        return (self.second - self.first) / self.total

    def facts(self, names: tuple[str, str] = NAMES) -> dict[str, Any]:
        """As JSON values."""
        return {
            "difference": round(self.difference, 4),
            "both": self.both,
            f"only_{names[0]}": self.first,
            f"only_{names[1]}": self.second,
            "neither": self.neither,
        }


@dataclass(frozen=True)
class Likeness:
    """How near two pictures of the same prompt are; psnr in dB, infinite if they are equal."""

    psnr: float
    ssim: float

    @property
    def text(self) -> str:
        return f"{self.psnr:.1f} dB, SSIM {self.ssim:.3f}" if math.isfinite(self.psnr) else "equal"


def counts(first: Sequence[Outcome], second: Sequence[Outcome]) -> dict[str, Counts]:
    """By category. Both sequences answer the same prompts in the same order."""
    found = {}
    others = by_category(second)
    for name, members in by_category(first).items():
        pairs = [(not a.fault, not b.fault) for a, b in zip(members, others[name], strict=True)]
        cells = [(True, True), (True, False), (False, True), (False, False)]
        found[name] = Counts(*(pairs.count(cell) for cell in cells))
    return found


def together(found: Mapping[str, Counts]) -> Counts:
    """All categories in one."""
    sums = (sum(getattr(c, name) for c in found.values()) for name in ("both", "first", "second", "neither"))
    return Counts(*sums)


def mcnemar(first: int, second: int) -> float:
    """The exact two-sided p of McNemar's test: where models are equal, either wins a prompt by a fair coin.

    first, second: prompts that only one of them gets right. 1 if there are none.
    """
    tail = sum(comb(first + second, k) for k in range(min(first, second) + 1))
    # the exponent is no float: its powers are too large for one
    p: float = 2 * tail / 2 ** (first + second)
    return min(1.0, p)


def difference(found: Mapping[str, Counts]) -> float:
    """The second model's overall score less the first's: the mean of the categories' differences."""
    return statistics.fmean(c.difference for c in found.values())


def interval(found: Mapping[str, Counts], *, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of `difference` by bootstrap (percentiles of SAMPLES).

    Prompts are drawn again within their category, each with both its verdicts. Categories where the models
    agree on every prompt add nothing to the width: of few prompts it says little.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(SAMPLES)
    for c in found.values():
        shares = np.array([c.second, c.first, c.both + c.neither]) / c.total
        drawn = rng.multinomial(c.total, shares, size=SAMPLES)
        total += (drawn[:, 0] - drawn[:, 1]) / c.total
    low, high = np.quantile(total / len(found), [0.025, 0.975])
    return float(low), float(high)


def facts(
    first: Sequence[Outcome], second: Sequence[Outcome], names: tuple[str, str] = NAMES
) -> dict[str, Any]:
    """The comparison of the scores as JSON values: shares, and the second model's less the first's."""
    found = counts(first, second)
    everything = together(found)
    low, high = interval(found)
    return {
        **everything.facts(names),
        # not that of all prompts in one: the overall score is a mean of categories
        "difference": round(difference(found), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "bootstrap_samples": SAMPLES,
        "mcnemar_p": float(f"{mcnemar(everything.first, everything.second):.4g}"),
        "categories": {name: c.facts(names) for name, c in found.items()},
    }


def likeness_facts(pictures: Mapping[str, Likeness]) -> dict[str, Any]:
    """`likeness_spread`, and each picture."""
    return {
        **likeness_spread(pictures),
        "pictures": [
            {"prompt": text, "psnr": finite(like.psnr, 2), "ssim": finite(like.ssim, 4)}
            for text, like in pictures.items()
        ],
    }


def likeness_spread(pictures: Mapping[str, Likeness]) -> dict[str, Any]:
    """PSNR and SSIM over the pictures as JSON values, by their prompts' texts.

    Equal pictures have no PSNR: they count as the largest, and are left out of the mean. "p5" is the value
    below which 5 % of the pictures lie, "near" the share of those with at least NEAR dB.
    """
    psnrs = {text: like.psnr for text, like in pictures.items()}
    ssims = {text: like.ssim for text, like in pictures.items()}
    differing = [value for value in psnrs.values() if math.isfinite(value)]
    return {
        "psnr": {**_spread(psnrs, 2), "mean": round(statistics.fmean(differing), 2) if differing else None},
        "ssim": {**_spread(ssims, 4), "mean": round(statistics.fmean(ssims.values()), 4)},
        "near": round(statistics.fmean(value >= NEAR for value in psnrs.values()), 4),
        "equal": len(psnrs) - len(differing),
    }


def _spread(values: Mapping[str, float], digits: int) -> dict[str, Any]:
    worst = min(values, key=lambda text: values[text])
    # not between two values, of which one may be infinite
    low = sorted(values.values())[len(values) // 20]
    return {
        "mean": None,
        "median": finite(statistics.median(values.values()), digits),
        "p5": finite(low, digits),
        "worst": finite(values[worst], digits),
        "worst_prompt": worst,
    }


def finite(value: float, digits: int) -> float | None:
    """A rounded number for JSON, which has no infinity."""
    return round(value, digits) if math.isfinite(value) else None
