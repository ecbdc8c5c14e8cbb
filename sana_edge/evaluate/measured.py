"""What was measured of each kind of metric: as a row of the table, as JSON, and in words."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sana_edge.errors import CheckpointError
from sana_edge.evaluate import means, paired
from sana_edge.evaluate.judge import scores as shares
from sana_edge.evaluate.judge.scores import Outcome, by_category
from sana_edge.evaluate.means import Difference, Mean
from sana_edge.evaluate.paired import Likeness

FEW = 5
# the digits of a test's p that a table shows
_P = 3


@dataclass(frozen=True)
class Row:
    """A row of the table: cells are empty where there is nothing to say."""

    title: str
    values: tuple[str, ...]
    difference: str = ""
    interval: str = ""
    p: str = ""


class Measured(ABC):
    """A metric's result for one source, or for two of which the second is compared with the first."""

    title: str
    worst_first: Sequence[int] = ()
    """Places of the pairs on the sheet, the worst first; empty where there is no pair or no picture's own."""

    @abstractmethod
    def row(self) -> Row:
        """The first of the table."""

    def rows(self) -> list[Row]:
        """All that the table has of it."""
        return [self.row()]

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """As JSON values."""

    @abstractmethod
    def words(self) -> str:
        """What the second costs, a part of a sentence; of one source what it got."""

    def remark(self, place: int) -> str:
        """What the sheet says of the pair at a place."""
        return ""


class Score(Measured):
    """A number for each picture, the larger the better: CLIP score and ImageReward."""

    def __init__(self, title: str, digits: int, scores: Sequence[Sequence[float]]) -> None:
        """Args: scores: of each source, picture by picture in the same order."""
        self.title, self._digits, self.scores = title, digits, [list(of) for of in scores]
        if not all(math.isfinite(score) for of in scores for score in of):
            raise CheckpointError(f"{title} of a picture is no number", "the scoring model is damaged")
        self.means = [means.mean(of) for of in scores]
        self.difference = means.difference(*scores) if len(scores) == 2 else None
        if len(scores) == 2:
            self.changes = [b - a for a, b in zip(*scores, strict=True)]
            lost = sorted(range(len(self.changes)), key=lambda i: self.changes[i])
            self.worst_first = [i for i in lost if self.changes[i] < 0]

    def row(self) -> Row:
        values = tuple(f"{found.value:.{self._digits}f}" for found in self.means)
        if self.difference is None:
            return Row(self.title, values, "", _interval(self.means[0], self._digits))
        return Row(self.title, values, *_differing(self.difference, self._digits))

    def facts(self) -> dict[str, Any]:
        digits = self._digits + 2
        found: dict[str, Any] = {"means": [mean.facts(digits) for mean in self.means]}
        if self.difference is not None:
            found["difference"] = self.difference.facts(digits)
        return {**found, "scores": [[round(score, digits) for score in of] for of in self.scores]}

    def words(self) -> str:
        if self.difference is None:
            return f"{self.title} {self.row().values[0]} (95 % interval {self.row().interval})"
        return _cost(self.difference, self._digits, f"of {self.title}")

    def remark(self, place: int) -> str:
        return f"{self.title} {self.changes[place]:+.{self._digits}f}"


class Verdicts(Measured):
    """sana-tiny's judge: the share of right pictures, a mean of categories as in GenEval.

    Where a category has fewer than FEW prompts, all count as one: its own spread would say nothing.
    """

    title = "right pictures"
    _digits = 3

    def __init__(self, outcomes: Sequence[Sequence[Outcome]]) -> None:
        self.outcomes = [list(of) for of in outcomes]
        self._few = min(len(of) for of in by_category(outcomes[0]).values()) < FEW
        self._scores = [self._share(of) for of in outcomes]
        self.difference: Difference | None = None
        if len(outcomes) == 2:
            first, second = self.outcomes
            found = paired.counts(first, second)
            everything = paired.together(found)
            found = {"all": everything} if self._few else found
            p = paired.mcnemar(everything.first, everything.second)
            low, high = paired.interval(found)
            if not everything.first + everything.second:
                # drawing these prompts again cannot show what none of them does: Clopper and Pearson's bound
                high = 1 - 0.025 ** (1 / everything.total)
                low = -high
            self.difference = Difference(paired.difference(found), low, high, everything.total, p)
            self.worst_first = [i for i in range(len(first)) if not first[i].fault and second[i].fault]

    def _share(self, outcomes: Sequence[Outcome]) -> shares.Score:
        if self._few:
            return shares.wilson([not outcome.fault for outcome in outcomes])
        return shares.overall(shares.categories(outcomes))

    def row(self) -> Row:
        values = tuple(f"{found.share:.{self._digits}f}" for found in self._scores)
        if self.difference is None:
            low, high = self._scores[0].low, self._scores[0].high
            return Row(self.title, values, "", f"{low:.{self._digits}f} to {high:.{self._digits}f}")
        return Row(self.title, values, *_differing(self.difference, self._digits))

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"sources": [shares.summary(of) for of in self.outcomes]}
        if self.difference is not None:
            first, second = self.outcomes
            found["paired"] = paired.facts(first, second, ("first", "second"))
            found["difference"] = {**self.difference.facts(4), "test": "McNemar", "one_category": self._few}
        return found

    def words(self) -> str:
        if self.difference is None:
            only = self.row()
            return f"{only.values[0]} of the pictures right (95 % interval {only.interval})"
        return _cost(self.difference, self._digits, "of the right pictures")

    def remark(self, place: int) -> str:
        return self.outcomes[1][place].fault


class Distance(Measured):
    """A number for all pictures together, the smaller the better: FID."""

    title = "FID"

    def __init__(self, values: Sequence[float], count: int) -> None:
        self.values, self._count = list(values), count
        if not all(math.isfinite(value) for value in values):
            raise CheckpointError("FID is no number", "give other weights of its network")

    def row(self) -> Row:
        values = tuple(f"{value:.2f}" for value in self.values)
        if len(self.values) == 1:
            return Row(self.title, values)
        return Row(self.title, values, f"{self.values[1] - self.values[0]:+.2f}")

    def facts(self) -> dict[str, Any]:
        return {"values": [round(value, 4) for value in self.values], "n": self._count}

    def words(self) -> str:
        if len(self.values) == 1:
            return f"an FID of {self.values[0]:.2f}"
        return f"{self.values[1] - self.values[0]:+.2f} of FID (no interval)"


class Alike(Measured):
    """PSNR and SSIM of the pairs."""

    title = "PSNR"

    def __init__(self, likenesses: Sequence[Likeness], texts: Sequence[str]) -> None:
        self.likenesses, self._texts = list(likenesses), list(texts)
        self.median = means.median([like.psnr for like in likenesses])
        self.worst_first = [
            i
            for i in sorted(range(len(self.likenesses)), key=lambda i: self.likenesses[i].psnr)
            if math.isfinite(self.likenesses[i].psnr)
        ]

    def row(self) -> Row:
        return Row(
            "PSNR in dB, median", ("", _decibels(self.median.value)), "", _decibel_interval(self.median)
        )

    def rows(self) -> list[Row]:
        low = sorted(like.psnr for like in self.likenesses)[len(self.likenesses) // 20]
        ssim = means.mean([like.ssim for like in self.likenesses])
        return [
            self.row(),
            Row("PSNR in dB, 5 % below", ("", _decibels(low))),
            Row("SSIM, mean", ("", f"{ssim.value:.3f}"), "", _interval(ssim, 3)),
        ]

    def facts(self) -> dict[str, Any]:
        # by number, as texts may be alike
        numbered = {
            f"{i}: {text}": like
            for i, (text, like) in enumerate(zip(self._texts, self.likenesses, strict=True))
        }
        finite = paired.finite
        interval = [finite(self.median.low, 2), finite(self.median.high, 2)]
        return {**paired.likeness_facts(numbered), "median_interval_95": interval}

    def words(self) -> str:
        if math.isinf(self.median.value):
            share = "at least half" if self.worst_first else "all"
            return f"{share} of its pictures are equal to the last bit"
        interval = f"95 % interval {_decibel_interval(self.median)}"
        return f"its pictures are {self.median.value:.1f} dB from the others in the median ({interval})"

    def remark(self, place: int) -> str:
        return self.likenesses[place].text


def _differing(found: Difference, digits: int) -> tuple[str, str, str]:
    """The last three cells of a row."""
    return f"{found.value:+.{digits}f}", _interval(found, digits), f"{found.p:.{_P}f}"


def _interval(found: Mean, digits: int) -> str:
    return f"{found.low:.{digits}f} to {found.high:.{digits}f}"


def _decibels(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal"


def _decibel_interval(found: Mean) -> str:
    return f"{_decibels(found.low)} to {_decibels(found.high)}"


def _cost(found: Difference, digits: int, of: str) -> str:
    """A difference as a loss or a gain, or neither where the interval has both."""
    if found.low <= 0 <= found.high:
        change = (
            f"{found.value:+.{digits}f}, 95 % interval {found.low:+.{digits}f} to {found.high:+.{digits}f}"
        )
        return f"nothing {of} that {found.count} prompts can show ({change})"
    kind, sign = ("", -1) if found.value < 0 else ("a gain of ", 1)
    low, high = sorted((sign * found.low, sign * found.high))
    return f"{kind}{sign * found.value:.{digits}f} {of} (95 % interval {low:.{digits}f} to {high:.{digits}f})"
