"""One network in memory at a time: the same numbers as all at once, whatever stays of the text encoder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sana_edge.calib import networks as room
from sana_edge.calib import quantize as quantizing
from sana_edge.calib.calibrate import _chosen
from sana_edge.calib.estimate import estimated_seconds, shown_time
from sana_edge.calib.networks import Networks
from sana_edge.calib.observe import weights_checksum
from sana_edge.calib.prompts import PromptSet
from sana_edge.calib.sensitivity import Sensitivity
from sana_edge.calib.settings import Settings
from sana_edge.calib.trajectory import decoded, denoised, follow
from sana_edge.errors import InvalidInput
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.progress import unseen
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub
from sana_edge.torch_runtime.runtime import TorchRuntime

CPU = torch.device("cpu")
PROMPTS = ("a red house", "two blue fish")


@pytest.fixture(scope="module")
def networks(tiny_folder: Path) -> Networks:
    return Networks(hub.resolve(str(tiny_folder)), CPU)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path) -> TorchRuntime:
    return TorchRuntime.load(hub.resolve(str(tiny_folder)), device=CPU, dtype="fp32")


def planned(prompt: str = PROMPTS[0]) -> Plan:
    return Request(prompt, steps=2, size=(64, 96), exact_size=True, seed=3).plan(128, "flow-dpm")


@pytest.mark.parametrize("resident", [0, 1 << 17, 1 << 40], ids=["none", "some", "all"])
def test_pictures_are_those_of_all_at_once(
    networks: Networks, whole: TorchRuntime, monkeypatch: pytest.MonkeyPatch, resident: int
) -> None:
    """Also with layers that are read again for every prompt: the same products, so equal bits."""
    monkeypatch.setattr(room, "RESIDENT", resident)
    texts = networks.texts([planned(prompt) for prompt in PROMPTS], unseen)
    for prompt in PROMPTS:
        plan = planned(prompt)
        found = decoded(networks.decoding(), denoised(networks.denoising(texts), plan))
        expected = follow(whole, plan)
        assert torch.equal(found.latents, expected.latents)
        assert found.pixels is not None and (found.pixels == expected.pixels).all()


def test_layers_that_are_read_again_hold_nothing(tiny_folder: Path) -> None:
    encoder = TextEncoder.load(tiny_folder, dtype=torch.float32, device=CPU, resident=0)
    layers: Iterator[Any] = encoder._model.layers
    encoder.encode(["a cat"])
    assert all(weight.is_meta for layer in layers for weight in layer.parameters())
    assert not encoder._model.norm.weight.is_meta


def test_only_one_network_has_weights(networks: Networks, whole: TorchRuntime) -> None:
    texts = networks.texts([], unseen)
    made = (networks.empty(), networks.denoising(texts), networks.decoding())
    for runtime, *here in zip(made, (False, True, False), (False, False, True), strict=True):
        assert here == [not next(net.parameters()).is_meta for net in (runtime.denoiser, runtime.autoencoder)]
    assert networks.checksum() == weights_checksum(whole.denoiser, whole.autoencoder)


def test_presets() -> None:
    quick = Settings(preset="quick").resolved(1024, "flow-dpm")
    assert (quick.steps, quick.size, quick.pictures) == (6, (256, 256), 2)
    assert (quick.probes, quick.cells) == (1, 4)
    assert Settings(preset="quick").resolved(128, "scm").steps is None
    given = Settings(preset="quick", steps=3, size=(64, 96), pictures=0).resolved(1024, "flow-dpm")
    assert (given.steps, given.size, given.pictures) == (3, (64, 96), 0)
    full = Settings().resolved(1024, "flow-dpm")
    assert (full.steps, full.size, full.pictures, full.probes) == (None, None, 6, 4)
    prompts = PromptSet.of([f"prompt {i}" for i in range(20)], "own")
    assert full.selected(prompts) is prompts
    few = quick.selected(dataclasses.replace(prompts, notes=("dropped",)))
    assert few.prompts == tuple(f"prompt {i * 20 // 8}" for i in range(8))
    assert few.name == "own" and few.notes == ("dropped",) and few.checksum != prompts.checksum
    with pytest.raises(InvalidInput, match="preset is 'fast'"):
        Settings(preset="fast")  # type: ignore[arg-type]


def test_the_estimate_grows_with_the_work(networks: Networks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_edge.calib.estimate._products_a_second", lambda: 1e9)
    runtime, plan = networks.empty(), planned()

    def seconds(settings: Settings | None = None, **changed: Any) -> float:
        options = {"text_weights": 1000, "compared": 2, "plan": plan, "prompts": 4, **changed}
        return estimated_seconds(runtime, settings=settings or Settings(), **options)

    least = seconds()
    longer, wider = (dataclasses.replace(plan, **change) for change in ({"steps": 3}, {"width": 128}))
    more: list[dict[str, Any]] = [{"text_weights": 2000}, {"compared": 3}, {"prompts": 5}]
    more += [{"settings": Settings(probes=5)}, {"plan": longer}, {"plan": wider}]
    assert 0 < least < min(seconds(**changed) for changed in more)
    assert [shown_time(t) for t in (3, 50, 720, 9000)] == ["half a minute", "1 min", "12 min", "2.5 hours"]


@pytest.mark.parametrize(
    ("error", "keep", "missed"), [(0.1, "auto", True), (1e-4, "auto", False), (0.1, 2, False)]
)
def test_a_goal_that_is_missed_is_noted(error: float, keep: Any, missed: bool) -> None:
    notes: list[str] = []
    found = [Sensitivity(f"blocks.{i}.qkv", error) for i in range(20)]
    kept = _chosen(found, Settings(keep=keep), "denoiser's velocity", notes.append)
    # errors add up in squares: 0.1 sqrt(18) = 0.424
    assert len(kept) == (0 if error < 1e-3 else 2)
    assert len(notes) == missed
    assert all(re.search(r"goal, an error of 1 %.* 42\.4 % with 2 of 20 layers", note) for note in notes)


def test_the_time_is_said_before_anything_is_computed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def stop(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Networks, "checksum", stop)
    with pytest.raises(ZeroDivisionError):
        quantizing.quantize(str(tiny_folder), tmp_path / "p", Settings(preset="quick"), say=said.append)
    (line,) = said
    assert re.fullmatch(
        r"calibrating with 8 prompts, 6 steps, 128x128, and comparing 2 pictures: about .* here", line
    )


def test_nothing_is_tried_where_nothing_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    """Which layers suffer most is only asked to keep them."""
    parts: set[str] = set()
    settings = Settings(preset="quick", keep="none", alpha=0, steps=1, size=(64, 64), pictures=0)
    report = quantizing.quantize(
        str(tiny_folder), tmp_path / "p", settings, progress=lambda name, *_: parts.add(name)
    )
    assert "observe" in parts and not any("try layers" in name for name in parts)
    assert not any(layer.kept for layer in report.layers)
