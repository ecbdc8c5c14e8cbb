"""The prompts of an evaluation, and GenEval's made by its rules."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from sana_edge.errors import SanaError
from sana_edge.evaluate import geneval
from sana_edge.evaluate.prompts import SETS, PromptSet, named


def test_geneval() -> None:
    """Counts are those of the paper; its checksum was compared with the rules' own output."""
    prompts = geneval.prompts()
    assert Counter(prompt.category for prompt in prompts) == {
        "single object": 80,
        "two objects": 99,
        "counting": 80,
        "colours": 94,
        "position": 100,
        "colour attribution": 100,
    }
    assert len({prompt.text for prompt in prompts}) == 553
    assert prompts[0].text == "a photo of a bench"
    coloured = [p.text for p in prompts if p.category in ("colours", "colour attribution")]
    assert not any("person" in text for text in coloured)
    assert any(" an " in prompt.text for prompt in prompts)
    assert not any(" a orange" in prompt.text or "buss" in prompt.text.split() for prompt in prompts)


def test_a_numpy_that_draws_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np.random, "default_rng", lambda seed: np.random.Generator(np.random.MT19937(seed)))
    with pytest.raises(SanaError, match="other prompts"):
        geneval.prompts.__wrapped__()


@pytest.mark.parametrize("name", SETS)
def test_named_sets(name: str) -> None:
    found = named(name)
    assert len(found.texts) == len(found.categories) == 553
    assert [fact.text for fact in found.facts] == (list(found.texts) if name == "sana-tiny" else [])
    # one of each of the six categories, and all of a smaller limit in a larger one
    assert len({found.categories[i] for i in found.choose(6)}) == 6
    assert found.choose(6) == sorted(found.choose(6)) and set(found.choose(6)) < set(found.choose(40))
    assert found.choose(None) == list(range(553)) == found.choose(10_000)


def test_a_users_prompts() -> None:
    found = PromptSet("own", ("a", "b", "c"))
    assert found.choose(2) == [0, 1] and found.choose(None) == [0, 1, 2]
    assert found.checksum != PromptSet("own", ("a", "c", "b")).checksum
