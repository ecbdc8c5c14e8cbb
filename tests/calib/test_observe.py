"""Observation of complete tiny pipelines: what it sees, that it goes on after an interruption, and errors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge import InvalidInput, Sana, SanaError
from sana_edge.calib.listener import SAMPLE_ROWS, Listener, nothing, targets
from sana_edge.calib.observe import observe
from sana_edge.calib.prompts import PromptSet
from sana_edge.calib.statistics import Statistics
from sana_edge.int8.linear import Linear
from sana_edge.progress import Progress
from sana_edge.store.hub import resolve
from sana_edge.torch_runtime.runtime import TorchRuntime

PROMPTS = ("a red house left of a yellow star", "two blue fish", "a cat on a mat")
# 2 x 3 latent cells
OPTIONS: dict[str, Any] = {"steps": 3, "size": (96, 64), "guidance": 4.5, "seed": 11}
TOKENS = 6


def loaded(folder: Path) -> TorchRuntime:
    return TorchRuntime.load(resolve(str(folder), offline=True), device=torch.device("cpu"), dtype="auto")


@pytest.fixture(scope="module")
def runtime(tiny_folder: Path) -> TorchRuntime:
    return loaded(tiny_folder)


@pytest.fixture(scope="module")
def sprint(tiny_sprint_folder: Path) -> TorchRuntime:
    return loaded(tiny_sprint_folder)


@pytest.fixture(scope="module")
def whole(runtime: TorchRuntime) -> Statistics:
    return observe(runtime, PROMPTS, **OPTIONS)


@pytest.fixture(autouse=True)
def _layers_are_left_alone(runtime: TorchRuntime, sprint: TorchRuntime) -> Iterator[None]:
    yield
    for model in (runtime, sprint):
        assert all(layer.observer is None for layer in targets(model).values())


def recorded(
    runtime: TorchRuntime, prompts: tuple[str, ...], **options: Any
) -> dict[str, list[tuple[int, Tensor]]]:
    """All inputs of all layers while pictures are made, with their steps; -1 before the first."""
    inputs: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in targets(runtime)}
    step = -1

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: inputs[name].append((step, x.detach().clone().flatten(0, -2)))

    layers = targets(runtime)
    for name, layer in layers.items():
        layer.observer = keep(name)
    seed = options.pop("seed")
    read, predict = TorchRuntime.read, TorchRuntime.predict

    class Counting(TorchRuntime):
        def read(self, *arguments: Any) -> Any:
            nonlocal step
            step = -1
            return read(self, *arguments)

        def predict(self, *arguments: Any) -> Any:
            velocity, notes = predict(self, *arguments)

            def counted(x: Tensor, i: int) -> Tensor:
                nonlocal step
                step += 1
                return velocity(x, i)

            return counted, notes

    try:
        for number, prompt in enumerate(prompts):
            Sana(Counting(**vars(runtime))).generate(prompt, seed=seed + number, **options)
    finally:
        for layer in layers.values():
            layer.observer = None
    return inputs


def test_it_sees_what_the_pipeline_sees(runtime: TorchRuntime, whole: Statistics) -> None:
    inputs = recorded(runtime, PROMPTS, **OPTIONS)
    assert list(whole.layers) == list(targets(runtime)) and len(whole.layers) >= 30
    for name, layer in whole.layers.items():
        rows = len(layer.absmax)
        assert rows == (3 if name.startswith("denoiser.") else 1), name
        for step in range(rows):
            # what runs before the first step counts as its part
            seen = [x for at, x in inputs[name] if min(max(at, 0), rows - 1) == step]
            values = torch.cat(seen)
            assert torch.equal(layer.absmax[step], values.abs().amax(0)), name
            samples = layer.samples[layer.sample_steps == step]
            # bit for bit one of the rows
            assert (samples[:, None] == values).all(-1).any(1).all(), name
            # of calls with more than 512 rows, as the decoder's wide maps have, some are skipped
            share = int(layer.histogram[step].sum()) / values.numel()
            assert share == 1 if max(map(len, seen)) <= 512 else 0.9 < share <= 1, name


def test_samples_are_spread_over_steps_and_prompts(whole: Statistics) -> None:
    # in block 0 both branches are still the same
    qkv = whole.layers["denoiser.blocks.1.qkv"]
    # 256 of 9 steps of prompts want 28 rows of each; two branches of 6 tokens have 12
    assert len(qkv.samples) == 9 * 2 * TOKENS and len(qkv.samples.unique(dim=0)) == len(qkv.samples)
    assert qkv.sample_steps.bincount().tolist() == [36, 36, 36]
    wide = whole.layers["decoder.conv_out.conv"]
    assert len(wide.samples) == SAMPLE_ROWS and wide.sample_steps.unique().tolist() == [0]


def test_the_empty_negative_branch_skips_cross_attention(whole: Statistics) -> None:
    layers, dim = whole.layers, 64
    counts = {
        name: layers[f"denoiser.blocks.1.{name}"].histogram.sum(1).tolist() for name in ("qkv", "cross_q")
    }
    assert counts == {"qkv": [3 * 2 * TOKENS * dim] * 3, "cross_q": [3 * TOKENS * dim] * 3}
    # but for its constant, one row for each prompt
    out = layers["denoiser.blocks.1.cross_out"]
    assert out.histogram.sum(1).tolist() == [3 * (TOKENS + 1) * dim, 3 * TOKENS * dim, 3 * TOKENS * dim]
    assert len(out.samples) == 9 * TOKENS


def test_layers_that_work_in_pieces() -> None:
    layers = {"decoder.conv_in": Linear(1, 1)}
    statistics = Statistics(nothing(layers, steps=5), {"seed": 0, "prompts": 1})
    listener, x = Listener(statistics), torch.arange(3000.0).view(1, 30, 100, 1)
    with listener.attached(layers), listener.step(0, 5):
        for piece in x.split([10, 10, 10], dim=1):
            layers["decoder.conv_in"](piece)
    seen = statistics.layers["decoder.conv_in"]
    assert len(seen.samples) == SAMPLE_ROWS and len(seen.samples.unique()) == SAMPLE_ROWS
    # a third of each piece: binomial with a standard deviation of 7.5
    assert all(
        abs(count - SAMPLE_ROWS / 3) < 5 * 7.5 for count in (seen.samples // 1000).int().flatten().bincount()
    )
    # of 1000 rows every second one counts, twice
    assert seen.absmax.item() == 2999 and int(seen.histogram.sum()) == 3000


def test_info_says_what_was_observed(runtime: TorchRuntime, whole: Statistics) -> None:
    info = dict(whole.info)
    assert len(info.pop("model_checksum")) == 64
    assert info.pop("prompt_checksum") == PromptSet.of(PROMPTS).checksum
    assert info == {
        "model": "tiny",
        "dtype": "fp32",
        "prompt_set": "own",
        "prompts": 3,
        "observed": 3,
        "steps": 3,
        "size": [96, 64],
        "guidance": 4.5,
        "seed": 11,
        "sampler": "flow-dpm",
        "flow_shift": 3.0,
        "sample_rows": SAMPLE_ROWS,
    }


class Interrupted(BaseException):
    """As KeyboardInterrupt, which would end pytest."""


def interrupt(prompt: int, step: int, steps: int = 3) -> Progress:
    def stop(name: str, done: int, count: int) -> None:
        if done == (prompt - 1) * steps + step:
            raise Interrupted

    return stop


@pytest.mark.parametrize(("prompt", "step"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_an_interrupted_observation_goes_on(
    runtime: TorchRuntime, whole: Statistics, tmp_path: Path, prompt: int, step: int
) -> None:
    with pytest.raises(Interrupted):
        observe(runtime, PROMPTS, folder=tmp_path, progress=interrupt(prompt, step), **OPTIONS)
    files = list(tmp_path.iterdir())
    assert len(files) == (prompt > 1)
    taken: list[tuple[str, int, int]] = []
    notes: list[str] = []
    again = observe(
        runtime,
        PROMPTS,
        folder=tmp_path,
        progress=lambda *now: taken.append(now),
        note=notes.append,
        **OPTIONS,
    )
    assert again.checksum() == whole.checksum()
    pictures = [("observe the decoder", done, 3) for done in (1, 2, 3)]
    assert taken == [*(("observe", done, 9) for done in range((prompt - 1) * 3 + 1, 10)), *pictures]
    assert [note for note in notes if f"{prompt - 1} of 3 prompts" in note] == notes
    assert len(notes) == (prompt > 1)


def test_an_interrupted_observation_of_the_decoder_goes_on(
    runtime: TorchRuntime, whole: Statistics, tmp_path: Path
) -> None:
    """What the denoiser made is not made again."""

    def stop(name: str, done: int, count: int) -> None:
        if (name, done) == ("observe the decoder", 2):
            raise Interrupted

    with pytest.raises(Interrupted):
        observe(runtime, PROMPTS, folder=tmp_path, progress=stop, **OPTIONS)
    taken: list[tuple[str, int, int]] = []
    again = observe(runtime, PROMPTS, folder=tmp_path, progress=lambda *now: taken.append(now), **OPTIONS)
    assert again.checksum() == whole.checksum() and not again.latents
    assert taken == [("observe the decoder", done, 3) for done in (2, 3)]


def test_what_is_finished_is_not_observed_again(
    runtime: TorchRuntime, whole: Statistics, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observe(runtime, PROMPTS, folder=tmp_path, **OPTIONS)
    (path,) = tmp_path.iterdir()
    with caplog.at_level(logging.WARNING, "sana_edge"):
        again = observe(runtime, PROMPTS, folder=tmp_path, progress=interrupt(1, 1), **OPTIONS)
    assert "3 of 3 prompts were observed before" in caplog.text
    assert again.checksum() == whole.checksum() == Statistics.load(path).checksum()


def test_other_options_begin_anew_and_leave_the_others(runtime: TorchRuntime, tmp_path: Path) -> None:
    few = {**OPTIONS, "steps": 1}
    observe(runtime, PROMPTS[:1], folder=tmp_path, **few)
    (first,) = tmp_path.iterdir()
    content = first.read_bytes()
    changed = copy.deepcopy(runtime)
    changed.denoiser.get_parameter("blocks.1.project.weight").data[0, 0] += 1e-3
    others: list[tuple[TorchRuntime, tuple[str, ...], dict[str, Any]]] = [
        (runtime, PROMPTS[:1], {**few, "seed": 12}),
        (runtime, PROMPTS[:1], {**few, "guidance": 4.0}),
        (runtime, PROMPTS[:1], {**few, "size": (64, 96)}),
        (runtime, PROMPTS[1:2], few),
        (changed, PROMPTS[:1], few),
    ]
    for count, (model, prompts, options) in enumerate(others, start=1):
        notes: list[str] = []
        observe(model, prompts, folder=tmp_path, note=notes.append, **options)
        assert len(notes) == 1 and f"observing anew: {count} stored statistics" in notes[0]
    assert len(list(tmp_path.iterdir())) == 6 and first.read_bytes() == content


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_stored_statistics_are_not_used(runtime: TorchRuntime, tmp_path: Path, damage: str) -> None:
    few = {**OPTIONS, "steps": 1}
    expected = observe(runtime, PROMPTS[:1], folder=tmp_path, **few).checksum()
    (path,) = tmp_path.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        stored = Statistics.load(path)
        del stored.layers["decoder.conv_out.conv"]
        stored.save(path)
    notes: list[str] = []
    assert observe(runtime, PROMPTS[:1], folder=tmp_path, note=notes.append, **few).checksum() == expected
    assert len(notes) == 1 and "observing anew" in notes[0] and path.name in notes[0]
    assert Statistics.load(path).checksum() == expected


def test_sprint_without_guidance(sprint: TorchRuntime, tmp_path: Path) -> None:
    few = PROMPTS[:2]
    options: dict[str, Any] = {"size": (64, 64), "seed": 3}
    expected = observe(sprint, few, **options)
    assert expected.info["sampler"] == "scm" and expected.info["steps"] == 2
    inputs = recorded(sprint, few, **options)
    for name, layer in expected.layers.items():
        values = torch.cat([x for _, x in inputs[name]])
        assert torch.equal(layer.absmax.amax(0), values.abs().amax(0)), name
        assert len(layer.samples) and layer.histogram.sum(1).min() > 0
    # the sampler's noise goes on with each prompt's own generator
    with pytest.raises(Interrupted):
        observe(sprint, few, folder=tmp_path, progress=interrupt(2, 1, steps=2), **options)
    assert observe(sprint, few, folder=tmp_path, **options).checksum() == expected.checksum()


def test_one_prompt_and_one_step(runtime: TorchRuntime) -> None:
    made = observe(runtime, [PROMPTS[0], f" {PROMPTS[0].upper()} "], steps=1, size=(32, 32), guidance=1.0)
    assert made.info["prompts"] == 1 and made.info["seed"] == 0
    assert all(len(layer.samples) and layer.absmax.amax() > 0 for layer in made.layers.values())
    assert made.layers["denoiser.blocks.0.cross_out"].histogram.sum() == 64


def test_dropped_prompts_are_noted(runtime: TorchRuntime) -> None:
    notes: list[str] = []
    observe(runtime, ["a cat", "A Cat"], steps=1, size=(32, 32), note=notes.append)
    assert notes == ["own: 1 repeated prompts were dropped"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_name_layer_step_and_prompt(
    tiny_folder: Path, tmp_path: Path, value: float
) -> None:
    broken = loaded(tiny_folder)

    def break_it(name: str, done: int, count: int) -> None:
        if done == 3 + 1:
            broken.denoiser.get_parameter("blocks.0.project.weight").data[5, 0] = value

    with pytest.raises(SanaError) as error:
        observe(broken, PROMPTS, folder=tmp_path, progress=break_it, **OPTIONS)
    assert "denoiser.blocks.1.qkv has values that are not finite at step 2 of 3" in error.value.message
    assert "prompt 2 of 3" in error.value.message and "bf16" in error.value.hint
    assert all(layer.observer is None for layer in targets(broken).values())
    (path,) = tmp_path.iterdir()
    assert Statistics.load(path).info["observed"] == 1


def test_observers_from_before_come_back(runtime: TorchRuntime) -> None:
    layer = runtime.denoiser.get_submodule("blocks.1.out")
    heard: list[Tensor] = []
    layer.observer = heard.append
    try:
        observe(runtime, PROMPTS[:1], **{**OPTIONS, "steps": 1})
        assert not heard and layer.observer == heard.append
    finally:
        layer.observer = None


def test_what_cannot_be_observed(runtime: TorchRuntime, tmp_path: Path) -> None:
    def refused(kind: type[SanaError], message: str, prompts: Any = PROMPTS, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            observe(runtime, prompts, progress=interrupt(1, 1), **{**OPTIONS, **options})

    refused(InvalidInput, "no prompts", [])
    refused(InvalidInput, "no prompts", ["", " \n"])
    refused(InvalidInput, "steps is 0", steps=0)
    refused(InvalidInput, "not a multiple", size=(100, 64))
    refused(InvalidInput, "guidance", guidance=-1.0)
    # the last prompt's seed would be one too many
    refused(InvalidInput, "seed", seed=2**63 - 2)
    (tmp_path / "file").write_text("x")
    refused(SanaError, "cannot make the folder", folder=tmp_path / "file")
    refused(SanaError, "cannot make the folder", folder=tmp_path / "file" / "below")


def test_a_folder_that_cannot_be_written_is_found_out_first(
    runtime: TorchRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise SanaError(f"cannot write {path}")

    monkeypatch.setattr("sana_edge.calib.statistics_store.check_writable", full)
    with pytest.raises(SanaError, match="cannot write"):
        observe(runtime, PROMPTS, folder=tmp_path / "new", progress=interrupt(1, 1), **OPTIONS)
