"""What is drawn together: pictures of one prompt, and batches, whose size is asked for or found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import StandInSana

from sana_edge import Sana
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.request.request import Request
from sana_edge.series.draw import LARGEST, BatchSize, Outcome, chunks, draw
from sana_edge.series.entries import read_prompts
from sana_edge.series.pictures import Picture, Settings, plan_pictures


def plan(*lines: Any) -> list[Picture]:
    return plan_pictures(read_prompts(lines), Settings())[0]


def drawn(sana: Any, pictures: list[Picture], size: BatchSize) -> list[Outcome]:
    return [outcome for chunk in chunks(pictures, size) for outcome in draw(sana, chunk, size)]


def test_a_prompt_is_read_once_for_seeds_that_count_up() -> None:
    sana = StandInSana()
    lines = [
        {"prompt": "c", "seed": 1, "images": 2, "variation": [[5, 0.2]]},
        {"prompt": "a", "seed": 3, "images": 3},
        {"prompt": "a", "seeds": [6, 9]},
        {"prompt": "b", "seed": 10},
    ]
    outcomes = drawn(sana, plan(*lines), BatchSize())
    assert sana.runs == [1, 1, 4, 1, 1]
    assert [outcome.metadata["seed"] for outcome in outcomes] == [1, 2, 3, 4, 5, 6, 9, 10]


def test_one_that_fails_does_not_take_others_with_it() -> None:
    def before(seed: int) -> None:
        if seed in (4, 6):
            raise OutOfMemory("no", "hint")

    pictures = plan({"prompt": "a", "seed": 3, "images": 5})
    for size in (1, 5):
        outcomes = drawn(StandInSana(before), pictures, BatchSize(size))
        assert [bool(outcome.error) for outcome in outcomes] == [False, True, False, True, False]
        assert [outcome.picture for outcome in outcomes] == pictures
        noted = "batches of 2 from now on, as a larger one failed: no"
        assert {note for outcome in outcomes for note in outcome.notes} == ({noted} if size > 1 else set())


def test_batches_are_of_pictures_that_differ_in_text_and_seed() -> None:
    lines = [
        "a",
        {"prompt": "b", "negative_prompt": "c"},
        {"prompt": "d", "steps": 5},
        {"prompt": "e", "steps": 5},
    ]
    sana = StandInSana()
    assert len(drawn(sana, plan(*lines, "f"), BatchSize(4))) == 5
    assert sana.batches == [2, 2] and sana.runs == [1]


def test_the_fastest_size_is_found_out() -> None:
    size = BatchSize(None)
    # seconds of a picture
    for expected, each in ((1, 1.0), (2, 0.7), (4, 0.5), (8, 0.49)):
        assert size.size == expected
        size.learn(1 if expected > 1 else 0, 99.0)
        size.learn(expected, each * expected)
    assert size.size == 4
    size.learn(4, 99.0)
    assert size.size == 4
    growing = BatchSize(None)
    for count in (1, 2, 4, 8, 16):
        growing.learn(count, 1.0)
    assert growing.size == LARGEST
    slow = BatchSize(None)
    slow.learn(1, 1.0)
    slow.learn(2, 2.0)
    assert slow.size == 1


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_a_batch_draws_what_each_draws_alone(tiny_folder: Path, guidance: float) -> None:
    """Its sums are added up in another order, by roundings; noise is the same to the bit."""
    prompts = [("a red house", ""), ("a boat", ""), ("a red house left of a star", "")]
    options: dict[str, Any] = {"steps": 2, "guidance": guidance, "size": (96, 64), "exact_size": True}
    requests = [
        Request(prompt, negative_prompt=negative, seed=seed, **options)
        for seed, (prompt, negative) in enumerate(prompts)
    ]
    with Sana.load(str(tiny_folder), device="cpu") as sana:
        alone = [sana.generate(request.prompt, seed=request.seed, **options) for request in requests]
        together = sana.batch(requests)
        noise = [sana._runtime.noises([r.plan(128, "flow-dpm") for r in requests])() for _ in range(2)]
        one = sana._runtime.noise(requests[1].plan(128, "flow-dpm"), 0)()
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0][1:2], one)
    for first, second in zip(alone, together, strict=True):
        assert first.metadata == second.metadata
        assert np.abs(first.pixels.astype(int) - second.pixels).max() <= 1
        assert second.timings.keys() == {"text", "denoise", "decode"}


def test_batches_that_are_refused(tiny_folder: Path) -> None:
    with Sana.load(str(tiny_folder), device="cpu") as sana:
        for changed in ({"steps": 3}, {"guidance": 2}, {"images": 2}, {"size": (64, 64)}):
            with pytest.raises(InvalidInput, match="differ in prompts and seeds alone"):
                sana.batch([Request("a", steps=2), Request("b", **{"steps": 2, **changed})])
