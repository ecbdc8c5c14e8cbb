"""From verdicts to scores with their intervals, and the control of shuffled prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sana_edge.evaluate.judge.prompts import COUNTS, Detection, Judgement, Prompt

Z = 1.96
"""Standard deviations on either side of a 95 % interval."""


@dataclass(frozen=True)
class Outcome:
    """A prompt, what the judge saw in its picture, and what is wrong with that; empty if it is right."""

    prompt: Prompt
    judgement: Judgement

    @property
    def fault(self) -> str:
        return self.prompt.check(self.judgement)

    def row(self) -> dict[str, Any]:
        """As JSON values."""
        found = [
            {
                "kind": d.kind,
                "colour": d.colour,
                "x": round(d.x, 3),
                "y": round(d.y, 3),
                "box": [round(side, 3) for side in d.box],
                "score": round(d.score, 3),
            }
            for d in self.judgement.detections
        ]
        return {"fault": self.fault, "background": self.judgement.background, "found": found}


def judgement(row: dict[str, Any]) -> Judgement:
    """The inverse of `Outcome.row`."""
    found = tuple(Detection(**{**d, "box": tuple(d["box"])}) for d in row["found"])
    return Judgement(row["background"], found)


@dataclass(frozen=True)
class Score:
    """A share of right pictures of `count`, with its 95 % interval."""

    share: float
    count: int
    low: float
    high: float

    @property
    def right(self) -> int:
        return round(self.share * self.count)


def by_category(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The outcomes of every category that has any."""
    found = {name: [o for o in outcomes if o.prompt.category == name] for name in COUNTS}
    return {name: members for name, members in found.items() if members}


def categories(outcomes: Sequence[Outcome]) -> dict[str, Score]:
    """The share of right pictures in every category, with Wilson's interval."""
    return {name: wilson([not o.fault for o in members]) for name, members in by_category(outcomes).items()}


def overall(scores: dict[str, Score]) -> Score:
    """The mean of the categories' shares, as in GenEval, with the normal interval of a mean of shares."""
    share = fmean(s.share for s in scores.values())
    variance = sum(s.share * (1 - s.share) / s.count for s in scores.values()) / len(scores) ** 2
    reach = Z * math.sqrt(variance)
    count = sum(s.count for s in scores.values())
    return Score(share, count, max(share - reach, 0.0), min(share + reach, 1.0))


def wilson(verdicts: Sequence[bool]) -> Score:
    """The share of true verdicts with Wilson's score interval (1927), sound near 0 and 1."""
    count = len(verdicts)
    share = fmean(verdicts)
    shrink = 1 + Z * Z / count
    middle = (share + Z * Z / (2 * count)) / shrink
    reach = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / shrink
    return Score(share, count, max(middle - reach, 0.0), min(middle + reach, 1.0))


def shuffled(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The control: the share of right pictures, each judged against every other prompt of its category.

    What a generator would score that ignores its prompt but draws good pictures of the category.
    """
    control = {}
    for name, members in by_category(outcomes).items():
        swapped = [not a.prompt.check(b.judgement) for a in members for b in members if a is not b]
        control[name] = fmean(swapped) if swapped else 0.0
    return control


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The numbers of one generator's pictures as JSON values, with every prompt's verdict."""
    scores, control = categories(outcomes), shuffled(outcomes)
    return {
        "overall": _plain(overall(scores)),
        "categories": {
            name: {**_plain(s), "shuffled": round(control[name], 4)} for name, s in scores.items()
        },
        "results": [_result(outcome) for outcome in outcomes],
    }


def _result(outcome: Outcome) -> dict[str, Any]:
    row = outcome.row()
    found = [{name: value for name, value in d.items() if name != "box"} for d in row["found"]]
    return {**outcome.prompt.facts(), **row, "found": found}


def _plain(score: Score) -> dict[str, Any]:
    interval = [round(score.low, 4), round(score.high, 4)]
    return {"score": round(score.share, 4), "n": score.count, "interval_95": interval}
