"""Prompt to picture: equal to diffusers, the same twice, and well behaved when stopped, misused or shared."""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintPipeline
from numpy.typing import NDArray

from sana_edge import Cancelled, Image, InvalidInput, OutOfMemory, Sana, SanaError, Step, UnsupportedDevice
from sana_edge.request.request import Request
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.known_models import BUNDLED, KNOWN
from sana_edge.system.memory import memory_errors
from sana_edge.torch_runtime import memory
from sana_edge.torch_runtime.runtime import TorchRuntime

PROMPT = "a red house left of a yellow star"


@pytest.fixture(scope="module")
def sana(tiny_folder: Path) -> Iterator[Sana]:
    with Sana.load(str(tiny_folder)) as sana:
        yield sana


@pytest.fixture(scope="module")
def sprint(tiny_sprint_folder: Path) -> Iterator[Sana]:
    with Sana.load(str(tiny_sprint_folder)) as sana:
        yield sana


def theirs(pipeline: Any, prompt: str, seeds: list[int], **options: Any) -> list[NDArray[np.uint8]]:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    result = pipeline(
        prompt,
        generator=generators,
        num_images_per_prompt=len(seeds),
        use_resolution_binning=False,
        **options,
    )
    return [np.asarray(image) for image in result.images]


def assert_same_picture(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> None:
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    # a blank picture would match any other blank one
    assert theirs.std() > 10
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


CASES: dict[str, dict[str, Any]] = {
    "guided": {},
    "negative-prompt": {"negative_prompt": "a blurred green fish"},
    "no-guidance": {"guidance": 1.0, "negative_prompt": "ignored"},
    "guidance-below-one": {"guidance": 0.5},
    "strong-guidance": {"guidance": 9.0},
    "one-step": {"steps": 1},
    "wide": {"size": (160, 96)},
    "tall": {"size": (32, 128)},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_diffusers(sana: Sana, tiny_folder: Path, options: dict[str, Any]) -> None:
    options = {"steps": 4, "size": (128, 128), "guidance": 4.5, "negative_prompt": "", **options}
    width, height = options["size"]
    (expected,) = theirs(
        SanaPipeline.from_pretrained(tiny_folder),
        PROMPT,
        [7],
        negative_prompt=options["negative_prompt"],
        num_inference_steps=options["steps"],
        guidance_scale=options["guidance"],
        width=width,
        height=height,
    )
    assert_same_picture(sana.generate(PROMPT, seed=7, **options).pixels, expected)


def test_defaults_equal_diffusers(sana: Sana, tiny_folder: Path) -> None:
    (expected,) = theirs(SanaPipeline.from_pretrained(tiny_folder), PROMPT, [7], width=128, height=128)
    assert_same_picture(sana.generate(PROMPT, seed=7).pixels, expected)


def test_several_images_equal_diffusers_and_each_alone(sana: Sana, tiny_folder: Path) -> None:
    expected = theirs(
        SanaPipeline.from_pretrained(tiny_folder),
        PROMPT,
        [7, 8, 9],
        num_inference_steps=3,
        width=128,
        height=128,
    )
    images = sana.generate(PROMPT, seed=7, steps=3, images=3)
    for seed, image, other in zip((7, 8, 9), images, expected, strict=True):
        assert image.seed == image.metadata["seed"] == seed
        assert_same_picture(image.pixels, other)
        assert image.png() == sana.generate(PROMPT, seed=seed, steps=3).png()


def test_the_bundled_model_equals_diffusers() -> None:
    with Sana.load(device="cpu") as tiny:
        width, height = tiny.native_size
        image = tiny.generate(PROMPT, seed=7)
    pipeline = SanaPipeline.from_pretrained(BUNDLED / "sana-tiny").to(torch.float32)
    (expected,) = theirs(pipeline, PROMPT, [7], width=width, height=height)
    assert_same_picture(image.pixels, expected)


def test_flow_euler_equals_diffusers(sana: Sana, tiny_folder: Path) -> None:
    pipeline = SanaPipeline.from_pretrained(tiny_folder)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    (expected,) = theirs(pipeline, PROMPT, [7], num_inference_steps=4, width=128, height=128)
    assert_same_picture(sana.generate(PROMPT, seed=7, steps=4, sampler="flow-euler").pixels, expected)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sprint_equals_diffusers(sprint: Sana, tiny_sprint_folder: Path, steps: int) -> None:
    intermediate = {} if steps == 2 else {"intermediate_timesteps": None}
    expected = theirs(
        SanaSprintPipeline.from_pretrained(tiny_sprint_folder),
        PROMPT,
        [7, 8],
        num_inference_steps=steps,
        guidance_scale=3.0,
        width=96,
        height=128,
        **intermediate,
    )
    images = sprint.generate(PROMPT, seed=7, steps=steps, guidance=3.0, size=(96, 128), images=2)
    for image, other in zip(images, expected, strict=True):
        assert_same_picture(image.pixels, other)


def test_sprint_defaults(sprint: Sana) -> None:
    image = sprint.generate(PROMPT, seed=1, negative_prompt="a fish")
    assert (image.metadata["steps"], image.metadata["guidance"], image.metadata["sampler"]) == (2, 4.5, "scm")
    assert any("negative prompt is not used" in note for note in image.notes)


def test_same_seed_same_bytes_whatever_happened_before(sana: Sana, tiny_folder: Path) -> None:
    first = sana.generate(PROMPT, seed=3, steps=3)
    torch.manual_seed(123)
    sana.generate("another prompt", seed=4, steps=2, size=(64, 64))
    assert sana.generate(PROMPT, seed=3, steps=3).png() == first.png()
    with Sana.load(str(tiny_folder)) as other:
        assert other.generate(PROMPT, seed=3, steps=3).png() == first.png()


def test_metadata_is_enough_to_make_it_again(sana: Sana) -> None:
    first = sana.generate(PROMPT, negative_prompt="a fish", steps=2, guidance=3, size=(64, 96))
    again = dict(json.loads(json.dumps(first.metadata)))
    assert (again.pop("model"), again.pop("dtype"), again.pop("backend")) == ("tiny", "fp32", "torch")
    assert again.pop("version")
    assert np.array_equal(sana.generate(again.pop("prompt"), **again).pixels, first.pixels)
    assert set(first.timings) == {"text", "denoise", "decode"}
    assert all(seconds > 0 for seconds in first.timings.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dtypes(tiny_folder: Path, dtype: str, sana: Sana) -> None:
    with Sana.load(str(tiny_folder), device="cpu", dtype=dtype) as other:
        image = other.generate(PROMPT, seed=7, steps=2)
    exact = sana.generate(PROMPT, seed=7, steps=2).pixels.astype(int)
    assert image.metadata["dtype"] == dtype
    # bf16 keeps 8 bits, so the picture moves, but not far
    assert np.abs(image.pixels - exact).mean() < (1e-9 if dtype == "fp32" else 12)


def test_fp16_checkpoint_runs_in_fp32_on_the_cpu(tiny_folder: Path, tmp_path: Path) -> None:
    SanaPipeline.from_pretrained(tiny_folder).to(torch.float16).save_pretrained(tmp_path / "half")
    with Sana.load(str(tmp_path / "half"), device="cpu") as half:
        image = half.generate(PROMPT, seed=7, steps=2)
    assert image.metadata["dtype"] == "fp32"
    pipeline = SanaPipeline.from_pretrained(tmp_path / "half").to(torch.float32)
    (expected,) = theirs(pipeline, PROMPT, [7], num_inference_steps=2, width=128, height=128)
    assert_same_picture(image.pixels, expected)


@pytest.mark.parametrize(
    ("dtype", "clamp"), [(torch.float32, True), (torch.float16, True), (torch.bfloat16, False)], ids=str
)
def test_what_was_trained_in_fp16_is_clamped(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, clamp: bool
) -> None:
    SanaPipeline.from_pretrained(tiny_folder).to(dtype).save_pretrained(tmp_path / "model")
    with Sana.load(str(tmp_path / "model"), device="cpu") as loaded:
        assert loaded._runtime is not None and loaded._runtime.denoiser.clamp == clamp
    # the table knows better than the files
    for name, known in (("sana-1.6b-1024", True), ("sana-1.6b-1024-bf16", False)):
        model = ResolvedModel(tmp_path / "model", name, KNOWN[name])
        told = TorchRuntime.load(model, device=torch.device("cpu"), dtype="fp32")
        assert told.denoiser.clamp == known


def test_sprint_is_not_clamped(sprint: Sana) -> None:
    assert sprint._runtime is not None and not sprint._runtime.denoiser.clamp


@pytest.mark.parametrize(("part", "name"), [("denoiser", "latent"), ("autoencoder", "decoded picture")])
def test_values_that_are_not_finite_are_no_picture(tiny_folder: Path, part: str, name: str) -> None:
    with Sana.load(str(tiny_folder)) as broken:
        next(getattr(broken._runtime, part).parameters()).fill_(torch.inf)
        with pytest.raises(SanaError, match=f"the {name} has values that are not finite") as caught:
            broken.generate(PROMPT, steps=1)
    assert "lower guidance" in caught.value.hint


def test_stream_gives_steps_previews_and_one_image(sana: Sana) -> None:
    seen = []
    for step in sana.stream(PROMPT, seed=7, steps=3, images=2):
        assert step.total == 6
        preview = step.preview()
        assert preview.dtype == np.uint8 and preview.shape == (128, 128, 3)
        seen.append((step.index, step.image is not None))
    assert seen == [(0, False), (1, False), (2, True), (3, False), (4, False), (5, True)]
    # at the native size the last preview is the picture
    assert step.image is not None and np.array_equal(preview, step.image.pixels)


def test_preview_is_small_and_changes_nothing(sana: Sana) -> None:
    plain = sana.generate(PROMPT, seed=7, steps=2, size=(544, 288))
    for step in sana.stream(PROMPT, seed=7, steps=2, size=(544, 288)):
        assert max(step.preview().shape) <= 256
    assert step.image is not None and step.image.png() == plain.png()


def test_the_callers_grad_mode_is_left_alone(sana: Sana) -> None:
    for step in sana.stream(PROMPT, seed=7, steps=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        step.preview()
        assert not torch.is_inference_mode_enabled()


def forbid_decoding(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded after a cancellation")

    runtime = sana._runtime
    assert runtime is not None
    monkeypatch.setattr(runtime.autoencoder, "decode", decode)


def test_leaving_the_loop_cancels(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        forbid_decoding(sana, patched)
        for step in sana.stream(PROMPT, seed=7, steps=3):
            if step.index == 1:
                break
    assert sana.generate(PROMPT, seed=7, steps=1).pixels.std() > 0


@pytest.mark.parametrize("after", [0, 1, 2])
def test_cancel_event(sana: Sana, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    cancel, steps = threading.Event(), []

    def on_step(step: Step) -> None:
        steps.append(step.index)
        if step.index == after - 1:
            cancel.set()

    if after == 0:
        cancel.set()
    with monkeypatch.context() as patched, pytest.raises(Cancelled):
        forbid_decoding(sana, patched)
        sana.generate(PROMPT, seed=7, steps=3, on_step=on_step, cancel=cancel)
    assert steps == list(range(after))
    assert sana.generate(PROMPT, seed=7, steps=1).pixels.std() > 0


def test_cancel_during_the_last_step_prevents_decoding(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel = threading.Event()
    runtime = sana._runtime
    assert runtime is not None
    hook = runtime.denoiser.register_forward_hook(lambda *_: cancel.set())
    try:
        with monkeypatch.context() as patched, pytest.raises(Cancelled):
            forbid_decoding(sana, patched)
            sana.generate(PROMPT, seed=7, steps=1, cancel=cancel)
    finally:
        hook.remove()


def test_an_exception_in_on_step_propagates_and_does_not_poison(sana: Sana) -> None:
    def on_step(step: Step) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        sana.generate(PROMPT, steps=2, on_step=on_step)
    # caught still holds the traceback, and so the frames that held the stream
    assert sana.generate(PROMPT, seed=7, steps=1).pixels.std() > 0
    assert caught.value.args == ("mine",)


def test_one_generation_at_a_time(sana: Sana) -> None:
    expected = sana.generate(PROMPT, seed=1, steps=2).png()
    results: list[Image] = []

    def work() -> None:
        results.append(sana.generate(PROMPT, seed=1, steps=2))

    with closing(sana.stream(PROMPT, seed=2, steps=3)) as steps:
        next(steps)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.5)
        assert thread.is_alive() and not results
        next(steps)
    thread.join(30)
    assert [image.png() for image in results] == [expected]


def test_cancelling_while_waiting(sana: Sana) -> None:
    cancel, errors = threading.Event(), []

    def work() -> None:
        try:
            sana.generate(PROMPT, steps=1, cancel=cancel)
        except Cancelled as error:
            errors.append(error)

    with closing(sana.stream(PROMPT, steps=3)) as steps:
        next(steps)
        thread = threading.Thread(target=work)
        thread.start()
        cancel.set()
        thread.join(10)
        assert len(errors) == 1


def test_an_open_stream_in_the_same_thread_is_an_error_not_a_deadlock(sana: Sana) -> None:
    with closing(sana.stream(PROMPT, steps=3)) as steps:
        next(steps)
        with pytest.raises(SanaError, match="still open in this thread"):
            sana.generate(PROMPT, steps=1)
        assert next(steps).index == 1
    assert sana.generate(PROMPT, steps=1)


def test_a_stream_whose_steps_are_taken_by_different_threads(sana: Sana) -> None:
    """As `asyncio.to_thread` takes them: the thread of the last step must not wait for itself."""
    cancel = threading.Event()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:
        steps = sana.stream(PROMPT, seed=7, steps=3)
        one.submit(next, steps).result(30)
        two.submit(next, steps).result(30)
        with pytest.raises(SanaError, match="still open in this thread"):
            nested = two.submit(sana.generate, PROMPT, steps=1, cancel=cancel)
            try:
                nested.result(10)
            finally:
                cancel.set()
        waiting = one.submit(sana.generate, PROMPT, seed=7, steps=3)
        last = two.submit(next, steps).result(30)
        two.submit(steps.close).result(30)
        assert last.image is not None and waiting.result(30).png() == last.image.png()


def test_a_stream_that_was_never_started_holds_nothing(sana: Sana) -> None:
    steps = sana.stream(PROMPT, steps=3)
    assert sana.generate(PROMPT, steps=1)
    steps.close()


def test_closing(tiny_folder: Path) -> None:
    sana = Sana.load(str(tiny_folder))
    runtime: Any = sana._runtime
    with closing(sana.stream(PROMPT, steps=2)) as steps:
        next(steps)
        sana.close()
        assert next(steps).image is not None
        assert len(runtime.predictor._graphs) == 1
    # what was recorded
    assert len(runtime.predictor._graphs) == 0
    with pytest.raises(SanaError, match="closed"):
        sana.generate(PROMPT)


@pytest.mark.parametrize("during", [False, True], ids=["after", "during a stream"])
def test_closing_frees_the_networks(tiny_folder: Path, during: bool) -> None:
    """At once, not when a garbage collection comes."""
    sana = Sana.load(str(tiny_folder), device="cpu")
    names = ("denoiser", "autoencoder", "text_encoder")
    alive = [weakref.ref(getattr(sana._runtime, name)) for name in names]
    gc.disable()
    try:
        with closing(sana.stream(PROMPT, seed=7, steps=2)) as steps:
            next(steps)
            if during:
                sana.close()
            assert next(steps).image is not None
            assert all(network() is not None for network in alive)
        sana.close()
        del steps
        assert [network() for network in alive] == [None] * 3
    finally:
        gc.enable()


def test_long_and_odd_prompts_work_and_truncation_is_said(
    sana: Sana, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "sana_edge"):
        long = sana.generate("house " * 1667, seed=1, steps=1)
    (note,) = long.notes
    assert "the prompt is too long: its last" in note and note in caplog.text
    for prompt in ("日本の家 🏠", "e\u0301\u202e\u200d", "nul \0", "lone \udcff surrogate", "\ufeff?"):
        assert sana.generate(prompt, seed=1, steps=1).notes == ()


def test_odd_instructions(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sana.generate("a house", seed=1, steps=1, instruction="lone \udcff surrogate").notes == ()
    assert isinstance(sana._runtime, TorchRuntime)
    # refused before it is read
    monkeypatch.setattr(sana._runtime.networks.text.network, "instruct", None)
    with pytest.raises(InvalidInput, match=r"the instruction has \d+ tokens") as caught:
        sana.generate("a house", steps=1, instruction="日本" * 1000)
    assert caught.value.hint == "give at most 2048"


def test_nothing_is_printed(sana: Sana, capfd: pytest.CaptureFixture[str]) -> None:
    sana.generate("house " * 1667, seed=1, steps=2)
    assert capfd.readouterr() == ("", "")


def test_peak_memory_and_native_size(sana: Sana) -> None:
    assert sana.native_size == (128, 128)
    assert sana.peak_memory is None or sana.peak_memory > 1_000_000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_running_out_of_memory(sana: Sana, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    runtime = sana._runtime
    assert runtime is not None
    with monkeypatch.context() as patched, pytest.raises(OutOfMemory, match="128x128"):
        patched.setattr(runtime.autoencoder, "decode", fail)
        sana.generate(PROMPT, steps=1)
    assert sana.generate(PROMPT, steps=1)


def test_a_size_that_cannot_fit_is_refused_before_any_work(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: 100_000_000)
    with pytest.raises(OutOfMemory, match=r"8192x8192 needs about .* GB, 0.1 GB are free"):
        sana.stream(PROMPT, size=(8192, 8192))
    assert sana.generate(PROMPT, steps=1)
    monkeypatch.setattr(memory, "available_memory", lambda _: None)
    sana.stream(PROMPT, size=(8192, 8192)).close()


def test_a_batch_that_cannot_fit_is_refused(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(PROMPT, size=(128, 128), steps=1, seed=seed) for seed in range(64)]
    # room for two of them
    monkeypatch.setattr(memory, "available_memory", lambda _: 20_000_000)
    assert len(sana.batch(requests[:2])) == 2
    with pytest.raises(OutOfMemory, match=r"64 pictures of 128x128 at once need about 0\.\d GB"):
        sana.batch(requests)


def test_other_runtime_errors_stay_what_they_are() -> None:
    for error in (RuntimeError("shapes"), NotImplementedError("later"), RecursionError("deep")):
        with pytest.raises(type(error), match=str(error)), memory_errors("x"):
            raise error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_missing(tiny_folder: Path) -> None:
    with pytest.raises(UnsupportedDevice, match="cuda cannot be used"):
        Sana.load(str(tiny_folder), device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_cuda_draws_the_same_noise(sana: Sana, tiny_folder: Path, dtype: str) -> None:
    exact = sana.generate(PROMPT, seed=7, steps=4).pixels.astype(int)
    with Sana.load(str(tiny_folder), device="cuda", dtype=dtype) as other:
        image = other.generate(PROMPT, seed=7, steps=4)
        again = other.generate(PROMPT, seed=7, steps=4)
    assert image.png() == again.png()
    assert np.abs(image.pixels - exact).mean() < (0.1 if dtype == "fp32" else 12)


@pytest.mark.skipif(sys.platform == "win32", reason="mapped files cannot be replaced")
def test_files_may_be_replaced_under_a_loaded_model(tiny_folder: Path, tmp_path: Path) -> None:
    """By renaming: what is mapped is the file that was there."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    options: dict[str, Any] = {"steps": 1, "seed": 3, "size": (64, 64), "exact_size": True}
    with Sana.load(str(folder), prompt_cache=False) as sana:
        for file in folder.rglob("*.safetensors"):
            (tmp_path / "other").write_bytes(b"something else")
            os.replace(tmp_path / "other", file)
        drawn = sana.generate(PROMPT, **options).pixels
    with Sana.load(str(tiny_folder)) as sana:
        assert (drawn == sana.generate(PROMPT, **options).pixels).all()
