"""Networks one after the other, within a budget: the same pictures, and one in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_edge import InvalidInput, OutOfMemory, Sana
from sana_edge.system import budget
from sana_edge.torch_runtime import memory as torch_memory
from sana_edge.torch_runtime.runtime import IN_TURN, TorchRuntime

PROMPT = "a red house"
OPTIONS: dict[str, Any] = {"steps": 2, "seed": 3, "size": (96, 64), "exact_size": True}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits beside anything else."""
    monkeypatch.setattr(torch_memory, "together", lambda stages: 1 << 60)


def runtime_of(sana: Sana) -> TorchRuntime:
    assert isinstance(sana._runtime, TorchRuntime)
    return sana._runtime


@pytest.mark.parametrize("int8", [False, True])
def test_pictures_are_those_of_all_at_once(tiny_folder: Path, int8: bool, short: None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_memory, "together", lambda stages: 0)
        with Sana.load(tiny_folder, int8=int8) as whole:
            expected = whole.generate(PROMPT, images=2, **OPTIONS)
    with Sana.load(tiny_folder, int8=int8, prompt_cache=False) as sana:
        networks = runtime_of(sana).networks
        assert networks.in_turn and networks.loaded == ("text",)
        seen = []
        for step in sana.stream(PROMPT, images=2, **OPTIONS):
            seen.append(networks.loaded)
            if step.image is not None:
                assert np.array_equal(step.image.pixels, expected.pop(0).pixels)
                assert IN_TURN in step.image.notes
        # the second picture's steps need the denoiser again
        assert seen == [("denoiser",), ("decoder",)] * 2


def test_a_picture_to_start_from(tiny_folder: Path, short: None) -> None:
    image = np.full((64, 96, 3), 90, np.uint8)
    with Sana.load(tiny_folder) as sana:
        found = sana.generate(PROMPT, image=image, **OPTIONS)
        runtime_of(sana).networks.in_turn = False
        again = sana.generate(PROMPT, image=image, **OPTIONS)
        assert np.array_equal(found.pixels, again.pixels)


def test_a_preview_between_steps(tiny_folder: Path, short: None) -> None:
    with Sana.load(tiny_folder) as sana:
        steps = sana.stream(PROMPT, **OPTIONS)
        first = next(steps)
        assert first.preview().ndim == 3 and runtime_of(sana).networks.loaded == ("decoder",)
        *_, last = steps
        assert last.image is not None
        assert np.array_equal(last.image.pixels, sana.generate(PROMPT, **OPTIONS).pixels)


@pytest.mark.parametrize("memory", [2_000_000_000, "2GB", "2000MB"])
def test_a_budget_decides(tiny_folder: Path, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # all of a tiny pipeline are some hundred kilobytes
    for used, in_turn in ((0, False), (2_000_000_000 - 12_000_000, True)):
        monkeypatch.setattr(budget, "used_memory", lambda device, used=used: used)
        if used:
            monkeypatch.setattr(torch_memory, "together", lambda stages: 12_000_001)
        with Sana.load(tiny_folder, memory=memory) as sana:
            assert runtime_of(sana).networks.in_turn == in_turn


def test_what_does_not_fit_is_refused_before_it_is_loaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutOfMemory, match=r"alone, 0\.0 MB of 9\.0 MB are left") as caught:
        Sana.load(tiny_folder, memory="9MB")
    assert "--memory 9MB` says what would fit" in caught.value.hint
    monkeypatch.setattr(budget, "used_memory", lambda device: 0)
    with Sana.load(tiny_folder, memory="20MB") as sana:
        sana.generate(PROMPT, **OPTIONS)
        with pytest.raises(OutOfMemory, match="2048x2048 needs about") as caught:
            sana.generate(PROMPT, size=(2048, 2048), exact_size=True, steps=1)
        assert "sana-edge plan" in caught.value.hint


@pytest.mark.parametrize("memory", ["0", "1.5GB", "much"])
def test_no_budget(memory: str) -> None:
    with pytest.raises(InvalidInput, match="memory is"):
        Sana.load("no-such-model", memory=memory)


def test_a_decode_within_the_budget_is_tiled(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana_edge.torch_runtime import tiling

    monkeypatch.setattr(tiling, "DEFAULT_TILE", 64)
    with Sana.load(tiny_folder, memory="4GB") as sana:
        runtime, latent = runtime_of(sana), torch.randn(1, 32, 16, 16)
        sides: list[int] = []
        whole = runtime.decode(latent, on_tiled=sides.append)
        assert not sides and whole.shape == (512, 512, 3)
        monkeypatch.setattr(torch_memory, "within", lambda *arguments: 6_000_000)
        runtime.decode(latent, on_tiled=sides.append)
        assert sides == [64]
