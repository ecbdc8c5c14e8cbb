"""What can be asked for, what is left out by name, and what is said of what was measured."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from sana_edge.errors import CheckpointError, InvalidInput, MissingDependency, ModelNotFound, SanaError
from sana_edge.evaluate import clip, fid, image_reward, metrics
from sana_edge.evaluate.judge.prompts import Judgement
from sana_edge.evaluate.judge.scores import Outcome
from sana_edge.evaluate.measured import FEW, Alike, Distance, Measured, Score, Verdicts
from sana_edge.evaluate.metrics import Drawn, MetricOptions, parse_metrics
from sana_edge.evaluate.paired import Likeness
from sana_edge.evaluate.pictures import Source
from sana_edge.evaluate.prompts import PromptSet, named
from sana_edge.evaluate.report import Report
from sana_edge.progress import unseen

OWN = PromptSet("own", ("a red house", "a blue boat"))


def test_names() -> None:
    assert parse_metrics(" PSNR,clip,, psnr") == ("clip", "psnr")
    with pytest.raises(InvalidInput, match="unknown metric 'clib'") as refused:
        parse_metrics("psnr,clib")
    assert refused.value.hint.startswith("did you mean clip? ")
    with pytest.raises(InvalidInput, match="no metric"):
        parse_metrics(" ,")


def test_what_suits_is_measured() -> None:
    assert metrics.wanted(MetricOptions(), OWN, pair=True) == ("clip", "psnr")
    assert metrics.wanted(MetricOptions(), named("sana-tiny"), pair=False) == ("judge", "clip")
    assert metrics.wanted(MetricOptions(python="python"), OWN, pair=False) == ("clip", "imagereward")
    assert "fid" in metrics.wanted(MetricOptions(reference=Path()), OWN, pair=False)


@pytest.mark.parametrize("name", ["judge", "fid", "psnr"])
def test_what_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"metric {name} cannot") as refused:
        metrics.wanted(MetricOptions((name,)), OWN, pair=False)
    assert "--" in refused.value.hint


def test_what_is_missing_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_reward, "FOLDER", tmp_path)
    monkeypatch.setattr(image_reward, "find_spec", lambda name: None)
    monkeypatch.setattr(clip, "find_spec", lambda name: None)
    said: list[str] = []
    ready, left_out = metrics.prepare(("clip", "imagereward", "psnr"), MetricOptions(), said.append)
    assert list(ready) == ["psnr"] and list(left_out) == ["clip", "imagereward"]
    assert "pip install 'sana-edge[evaluate]'" in said[0] and "--imagereward-python" in said[1]
    with pytest.raises(MissingDependency, match="torchmetrics"):
        metrics.prepare(("clip", "imagereward"), MetricOptions(), said.append)
    with pytest.raises(ModelNotFound, match=r"no .*ImageReward\.pt"):
        image_reward.find_image_reward(sys.executable)


def test_fid_wants_pictures(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no folder"):
        fid.reference_pictures(tmp_path / "none")
    (tmp_path / "note.txt").touch()
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InvalidInput, match="has 1 pictures"):
        fid.reference_pictures(tmp_path)
    (tmp_path / "sub").mkdir()
    PILImage.new("RGB", (8, 8)).save(tmp_path / "sub" / "b.JPG")
    assert [path.name for path in fid.reference_pictures(tmp_path)] == ["a.png", "b.JPG"]


REWARD = """
def load(name, med_config=None):
    print("load checkpoint from", name)
    return Model()

class Model:
    def score(self, text, path):
        print("scoring")
        {body}
        return len(text) / 10
"""


def rewards(folder: Path, body: str, texts: Sequence[str]) -> list[float]:
    """By a module that stands in for the package, which needs another environment."""
    (folder / "ImageReward.py").write_text(REWARD.replace("{body}", body))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    paths = [folder / f"{i}.png" for i in range(len(texts))]
    return image_reward.image_rewards(folder, paths, texts, unseen, str(python))


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_image_reward_runs_in_its_own_python(tmp_path: Path) -> None:
    assert rewards(tmp_path, "pass", ["a" * 12, "ü\n"]) == [1.2, 0.2]
    with pytest.raises(SanaError, match="broke off: ValueError: no such picture"):
        rewards(tmp_path, "raise ValueError('no such picture')", ["a"] * 2000)
    with pytest.raises(SanaError, match="cannot start"):
        image_reward.image_rewards(tmp_path, [tmp_path], ["a"], unseen, str(tmp_path / "none"))


def test_scores_say_what_is_lost() -> None:
    rng = np.random.default_rng(3)
    first = rng.normal(28, 1, 60)
    lost = Score("CLIP score", 2, [first.tolist(), (first - 0.2 + rng.normal(0, 0.1, 60)).tolist()])
    assert lost.words().startswith("0.2") and " of CLIP score (95 % interval 0.1" in lost.words()
    gained = Score("CLIP score", 2, [first.tolist(), (first + 0.2).tolist()])
    assert gained.words() == "a gain of 0.20 of CLIP score (95 % interval 0.20 to 0.20)"
    unclear = Score("CLIP score", 2, [first.tolist(), (first + rng.normal(0, 1, 60)).tolist()])
    assert unclear.words().startswith("nothing of CLIP score that 60 prompts can show (")
    # on the sheet are those that lost, most of all first
    assert lost.changes[lost.worst_first[0]] == min(lost.changes) and gained.worst_first == []
    alone = Score("CLIP score", 2, [first.tolist()])
    assert alone.words() == f"CLIP score {first.mean():.2f} (95 % interval {alone.row().interval})"
    with pytest.raises(CheckpointError, match="no number"):
        Score("CLIP score", 2, [[1.0, float("nan")]])


class Told(Outcome):
    """An outcome that is told whether it is right."""

    wrong = False

    @property
    def fault(self) -> str:
        return "no house" if self.wrong else ""


def outcomes(per_category: int, wrong: int) -> list[Outcome]:
    """So many of each of the six categories, of which the first are wrong."""
    prompts = named("sana-tiny")
    found: list[Outcome] = []
    for i, number in enumerate(prompts.choose(6 * per_category)):
        outcome = Told(prompts.facts[number], Judgement("plain", ()))
        object.__setattr__(outcome, "wrong", i < wrong)
        found.append(outcome)
    return found


def test_verdicts() -> None:
    found = Verdicts([outcomes(FEW, 0), outcomes(FEW, 3)])
    # three of the five of the first category: a tenth of the mean over six
    assert found.row().values == ("1.000", "0.900") and found.row().difference == "-0.100"
    assert found.worst_first == [0, 1, 2] and found.remark(0) == "no house"
    assert found.difference is not None and found.difference.p == 0.25
    assert found.difference.low < -0.1 < found.difference.high


def test_verdicts_that_all_agree_have_an_interval() -> None:
    """A share of 0.117 stays unseen in 30 prompts with a probability of 0.025."""
    found = Verdicts([outcomes(FEW, 3), outcomes(FEW, 3)])
    assert found.difference is not None and found.difference.high == -found.difference.low
    assert (1 - found.difference.high) ** 30 == pytest.approx(0.025)
    assert found.words().startswith("nothing of the right pictures that 30 prompts can show (+0.000, 95 %")


def test_few_verdicts_count_as_one_category() -> None:
    """One prompt of a category has no spread: by categories the interval would have no width."""
    found = Verdicts([outcomes(1, 1), outcomes(1, 3)])
    assert found.difference is not None
    assert found.difference.low < found.difference.value < found.difference.high
    alone = Verdicts([outcomes(1, 2)])
    assert alone.row().values == ("0.667",) and alone.row().interval == "0.300 to 0.903"
    assert alone.words() == "0.667 of the pictures right (95 % interval 0.300 to 0.903)"


def drawn(folder: Path) -> Drawn:
    for label, grey in (("a", 100), ("b", 110)):
        (folder / label).mkdir()
        for i in range(2):
            PILImage.new("RGB", (32, 32), (grey + i, 0, 0)).save(folder / label / f"{i}.png")
    paths = tuple([folder / label / f"{i}.png" for i in range(2)] for label in "ab")
    return Drawn(paths, OWN.texts)


def report(folder: Path, measured: dict[str, Measured]) -> Report:
    sources = [Source("sana-0.6b-1024", "sana-0.6b-1024", False, ""), Source("x-int8", "x", True, "")]
    return Report(sources, "own", [0, 1], drawn(folder), measured, {}, {})


def test_the_papers_table_stands_beside(tmp_path: Path) -> None:
    scores = Score("CLIP score", 2, [[27.0, 29.0], [26.9, 28.8]])
    found = report(tmp_path, {"clip": scores, "psnr": Alike([Likeness(30.0, 0.9)] * 2, OWN.texts)})
    text = found.text()
    assert "paper fp16  paper INT8  difference" in text
    (line,) = (line for line in text.splitlines() if line.startswith("CLIP score") and "28.5" in line)
    assert line.split()[2:] == ["28.5", "28.3", "-0.20", "28.00", "27.85", "-0.15"]
    # other weights are said to be others
    assert "The paper's are of other weights (sana-0.6b-1024 and x-int8), other prompts" in text
    assert text.splitlines()[-1].startswith("What INT8 cost, over 2 prompts: 0.15 of CLIP score (")
    assert "ImageReward  1.03" not in text
    json.dumps(found.facts(), allow_nan=False)
    assert found.sheet() is not None


def test_one_model_has_no_comparison(tmp_path: Path) -> None:
    alone = drawn(tmp_path)
    alone = replace(alone, paths=alone.paths[:1])
    found = Report(
        [Source("x", "x", False, "")],
        "own",
        [0, 1],
        alone,
        {"clip": Score("CLIP score", 2, [[27.0, 29.0]]), "fid": Distance([12.5], 2)},
        {"judge": "no"},
        {},
    )
    text = found.text()
    assert "paper" not in text and "judge: not measured, no" in text and found.sheet() is None
    assert text.endswith(
        "x over 2 prompts: CLIP score 28.00 (95 % interval 27.00 to 29.00); an FID of 12.50."
    )


def test_a_distance_has_no_interval() -> None:
    found = Distance([12.0, 12.5], 100)
    assert found.row().difference == "+0.50" and found.words() == "+0.50 of FID (no interval)"
    with pytest.raises(CheckpointError, match="no number"):
        Distance([float("nan")], 2)


def test_pictures_that_the_judge_cannot_take_are_named(tmp_path: Path) -> None:
    prompts = named("sana-tiny")
    measure = metrics.prepare(("judge",), MetricOptions(), print)[0]["judge"]
    small = drawn(tmp_path)
    with pytest.raises(InvalidInput, match=r"0\.png: a picture must be"):
        measure(replace(small, facts=prompts.facts[:2]), unseen, print)
