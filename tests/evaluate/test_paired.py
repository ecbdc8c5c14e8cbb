"""The statistics of two models on the same prompts, and how alike their pictures are."""

from __future__ import annotations

import io
import json
import math
import random

import numpy as np
import pytest
from PIL import Image

from harness import quality_tables
from sana_edge.evaluate import paired
from sana_edge.evaluate.judge.prompts import Judgement
from sana_edge.evaluate.judge.scene_prompts import prompts
from sana_edge.evaluate.judge.scores import Outcome, categories, overall
from sana_edge.evaluate.paired import Counts, Likeness
from sana_edge.evaluate.sheet import AMPLIFIED, Pair, PairRow, pair_sheet


class Verdict(Outcome):
    """An outcome that is told whether it is right."""

    right = True

    @property
    def fault(self) -> str:
        return "" if self.right else "wrong"


def outcomes(rights: list[bool]) -> list[Outcome]:
    """For the first prompts; those of single object come first, then those of two objects."""
    found: list[Outcome] = []
    for prompt, right in zip(prompts(), rights, strict=False):
        outcome = Verdict(prompt, Judgement("plain", ()))
        object.__setattr__(outcome, "right", right)
        found.append(outcome)
    return found


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # 2 (1 + 12 + 66) / 2^12
        (10, 2, 158 / 4096),
        (2, 10, 158 / 4096),
        # 2 / 2^6
        (6, 0, 1 / 32),
        (1, 0, 1.0),
        (5, 5, 1.0),
        (0, 0, 1.0),
        # of an independent implementation of the binomial test
        (21, 12, 0.16275565745308995),
    ],
)
def test_mcnemar(first: int, second: int, p: float) -> None:
    assert paired.mcnemar(first, second) == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_prompts_does_not_overflow() -> None:
    assert paired.mcnemar(3000, 1000) < 1e-200
    assert paired.mcnemar(2000, 2001) == 1.0


def test_overall_difference_weighs_categories_alike() -> None:
    """80 prompts of one category, 99 of the other: not the difference over all 179 of them."""
    first = outcomes([True] * 8 + [False] * 171)
    second = outcomes([False] * 4 + [True] * 8 + [False] * 68 + [True] * 33 + [False] * 66)
    found = paired.counts(first, second)
    assert found == {"single object": Counts(4, 4, 4, 68), "two objects": Counts(0, 0, 33, 66)}
    assert paired.together(found) == Counts(4, 4, 37, 134)
    assert paired.difference(found) == pytest.approx((0 + 33 / 99) / 2)
    assert paired.difference(found) == pytest.approx(
        overall(categories(second)).share - overall(categories(first)).share
    )
    assert paired.difference(found) != pytest.approx(33 / 179)


def test_interval_is_that_of_the_normal_approximation() -> None:
    """With many discordant prompts. The variance of a category's difference is (b + c - (b - c)² / n) / n².

    The error of a percentile of 20 000 samples is 0.019 standard deviations (sqrt(0.025 · 0.975 / 20 000)
    over the density there, 0.058): three of those, and half a step of the difference, 1 / 800.
    """
    found = {"a": Counts(150, 60, 40, 150), "b": Counts(100, 100, 100, 100)}
    middle = (-20 / 400 + 0) / 2
    variance = ((100 - 20**2 / 400) / 400**2 + 200 / 400**2) / 4
    reach = 1.96 * math.sqrt(variance)
    low, high = paired.interval(found)
    assert low == pytest.approx(middle - reach, abs=0.06 * math.sqrt(variance) + 1 / 1600)
    assert high == pytest.approx(middle + reach, abs=0.06 * math.sqrt(variance) + 1 / 1600)


def test_interval_is_the_same_every_time() -> None:
    found = {"a": Counts(50, 12, 7, 30), "b": Counts(40, 3, 9, 20)}
    random.seed(1)
    np.random.seed(1)
    first = paired.interval(found)
    assert paired.interval(found) == first
    assert paired.interval(found, seed=1) != first
    assert first[0] < paired.difference(found) < first[1]


def test_agreement_has_no_width() -> None:
    assert paired.interval({"a": Counts(5, 0, 0, 4)}) == (0.0, 0.0)


def test_facts_survive_json_and_say_what_differs() -> None:
    first, second = outcomes([True] * 10 + [False] * 10), outcomes([True] * 8 + [False] * 3 + [True] * 9)
    found = json.loads(json.dumps(paired.facts(first, second)))
    assert (found["both"], found["only_float"], found["only_int8"], found["neither"]) == (8, 2, 9, 1)
    assert found["difference"] == 0.35
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 11 + 55) / 2**11, rel=1e-3)
    assert found["interval_95"][0] < 0.35 < found["interval_95"][1]
    assert found["categories"]["single object"]["only_int8"] == 9


def test_pairs_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired.counts(outcomes([True] * 3), outcomes([True] * 2))


def test_likeness_of_pictures() -> None:
    """Equal pictures count in the median and not in the mean, and JSON has no infinity."""
    alike = {"a": Likeness(30.0, 0.9), "b": Likeness(math.inf, 1.0), "c": Likeness(40.0, 0.95)}
    found = json.loads(json.dumps(paired.likeness_facts(alike), allow_nan=False))
    assert found["psnr"] == {"mean": 35.0, "median": 40.0, "p5": 30.0, "worst": 30.0, "worst_prompt": "a"}
    assert found["ssim"] == {"mean": 0.95, "median": 0.95, "p5": 0.9, "worst": 0.9, "worst_prompt": "a"}
    assert (found["equal"], found["near"]) == (1, round(2 / 3, 4))
    assert found["pictures"][1] == {"prompt": "b", "psnr": None, "ssim": 1.0}


def test_likeness_of_equal_pictures() -> None:
    found = paired.likeness_facts({"a": Likeness(math.inf, 1.0)})
    assert (found["psnr"]["mean"], found["psnr"]["median"], found["psnr"]["worst"]) == (None, None, None)
    assert quality_tables._spread(found["psnr"], " dB") == "mean infinite, median infinite, worst infinite"


def test_spread_of_many_pictures() -> None:
    """A hundred values of which five lie below the sixth; 35 dB itself is near."""
    alike = {str(i): Likeness(30.0 + i / 10, 0.9) for i in range(100)}
    found = paired.likeness_spread(alike)
    assert (found["psnr"]["p5"], found["psnr"]["median"], found["near"]) == (30.5, 34.95, 0.5)
    assert "pictures" not in found


def test_facts_of_two_models_with_other_names() -> None:
    first, second = outcomes([True, True, False]), outcomes([True, False, False])
    found = paired.facts(first, second, ("torch", "engine"))
    assert (found["only_torch"], found["only_engine"]) == (1, 0)
    assert found["categories"]["single object"]["only_torch"] == 1
    assert "only_float" not in found


def test_pair_sheet_shows_the_difference() -> None:
    """The third tile of the only row is |a - b|, amplified; 208 pixels from (476, 150) on."""
    even = np.full((64, 64, 3), 100, np.uint8)
    other = even.copy()
    other[..., 0] += 10
    other[..., 1] -= 10
    pair = Pair("a red house", (even, other), "28.1 dB", ("", "no house"))
    assert pair.difference[0, 0].tolist() == [10 * AMPLIFIED, 10 * AMPLIFIED, 0]
    png = pair_sheet("title", "note", [PairRow("worst", "mean 30 dB", [pair])])
    page = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert page[250, 20 + 104].tolist() == [100, 100, 100]
    assert page[250, 20 + 228 + 104].tolist() == [110, 90, 100]
    assert page[250, 20 + 456 + 104].tolist() == [80, 80, 0]
