"""The judge of sana-tiny's pictures, by its weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_edge.evaluate.judge.detector import judge
from sana_edge.evaluate.judge.scene_prompts import prompts

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_what_was_asked() -> None:
    """Its first picture: a red car left of a house on a meadow."""
    found = judge(np.asarray(Image.open(ROOT / "benchmarks" / "results" / "demo.png").convert("RGB")))
    left, right = sorted(found.detections, key=lambda d: d.x)
    assert (left.kind, left.colour, right.kind, right.colour) == ("car", "red", "house", "")
    assert found.background == "meadow"


@pytest.mark.slow
@pytest.mark.skipif("SANA_EDGE_ART" not in os.environ, reason="SANA_EDGE_ART names no art")
def test_true_scenes() -> None:
    from sana_edge.training.art.scenes import render

    faults = [prompt.check(judge(np.asarray(render(prompt.scene)))) for prompt in prompts()]
    assert faults.count("") >= 0.97 * len(faults)
