"""Which backend is chosen and why, refusals by name, and faults of the library and of the GPU."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_edge import InvalidInput, OutOfMemory, Sana, SanaError, UnsupportedDevice, read_metadata
from sana_edge.cli.main import main
from sana_edge.config import DenoiserConfig
from sana_edge.fused import backends
from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.kernels.cuda.library import Library
from sana_edge.kernels.triton import support
from sana_edge.system.memory import memory_errors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMPT = "a red house left of a yellow star"
CONFIG = DenoiserConfig(num_attention_heads=36, attention_head_dim=32)
# of sana_edge_status
TOO_OLD, OLD_DRIVER, NO_MEMORY, LOST = 6, 8, 9, 10
# other tests run the kernels with threads in another order
IN_ORDER = pytest.mark.parametrize("emulated", [0], ids=["in order"], indirect=True)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A library that was not built, at the path that is returned."""
    path = tmp_path / "libsana_edge_cuda.so"
    monkeypatch.setenv(cuda_library.VARIABLE, str(path))
    cuda_library.load.cache_clear()
    yield path
    cuda_library.load.cache_clear()


@IN_ORDER
def test_on_a_cpu_auto_is_torch(emulated: Any) -> None:
    chosen = backends.choose("auto", CPU, "auto", int8=True)
    assert chosen.name == "torch" and not chosen.fused
    assert list(chosen.reasons) == ["cuda", "triton"]
    assert all("asked for by name" in reason for reason in chosen.reasons.values())


@IN_ORDER
def test_asked_for_by_name(emulated: Any, interpreted: None) -> None:
    for name in ("cuda", "triton"):
        chosen = backends.choose(name, CPU, "auto", int8=True, config=CONFIG)
        assert chosen.name == name and chosen.fused
    assert chosen.reasons == {"cuda": "triton was asked for"}
    assert backends.choose("torch", CPU, "fp32", int8=False).name == "torch"


REFUSED: dict[str, tuple[dict[str, Any], type[SanaError], str, str]] = {
    "float": ({"int8": False}, InvalidInput, "are for INT8 models", "--int8"),
    "fp32": ({"dtype": "fp32"}, InvalidInput, "16 bit, not in fp32", "bf16"),
    "heads": (
        {"config": replace(CONFIG, attention_head_dim=64)},
        InvalidInput,
        "heads of 64",
        "backend torch",
    ),
    "device": ({"device": torch.device("meta")}, UnsupportedDevice, "not on meta", "backend torch"),
}


@IN_ORDER
@pytest.mark.parametrize("name", ["cuda", "triton"])
@pytest.mark.parametrize(("options", "kind", "message", "hint"), REFUSED.values(), ids=REFUSED)
def test_refused_by_name(
    emulated: Any,
    interpreted: None,
    name: str,
    options: dict[str, Any],
    kind: type[SanaError],
    message: str,
    hint: str,
) -> None:
    asked = {"device": CPU, "dtype": "auto", "int8": True, **options}
    with pytest.raises(kind, match=f"backend {name} cannot be used: .*{message}") as caught:
        backends.choose(name, **asked)
    assert hint in caught.value.hint
    chosen = backends.choose("auto", **asked)
    assert chosen.name == "torch" and message in chosen.reasons[name]


NO_GPU: dict[str, tuple[str | None, str]] = {
    "torch without CUDA": (None, f"torch {torch.__version__} is built without CUDA"),
    "no driver": ("13.0", "Found no NVIDIA driver on your system."),
}


@pytest.mark.parametrize(("cuda", "reason"), NO_GPU.values(), ids=NO_GPU)
def test_without_a_gpu(
    cuda: str | None, reason: str, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing is said, rather than where kernels run."""

    def fails() -> int:
        raise RuntimeError(f"{reason}\nmore")

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "current_device", fails)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    # a library for GPUs, as an installation with nvcc has it
    placed = "the CUDA kernels run on cuda, not on cpu"
    monkeypatch.setattr(cuda_library, "refusal", lambda device: placed)
    for name in ("cuda", "triton"):
        with pytest.raises(UnsupportedDevice) as caught:
            backends.choose(name, CPU, "auto", int8=True)
        assert caught.value.message == f"backend {name} cannot be used: no GPU can be used: {reason}"
        assert "doctor" in caught.value.hint
    # with one, the CPU was asked for
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, title in (("cuda", "CUDA"), ("triton", "Triton")):
        with pytest.raises(UnsupportedDevice, match=f"the {title} kernels run on cuda, not on cpu"):
            backends.choose(name, CPU, "auto", int8=True)


def test_unknown_backend() -> None:
    with pytest.raises(InvalidInput, match="unknown backend 'abacus'") as caught:
        backends.choose("abacus", CPU, "auto", int8=True)
    assert "auto, torch, triton, cuda" in caught.value.hint


def test_bf16_on_turing(emulated_turing: Any) -> None:
    assert backends.half_dtype(CPU) == "fp16"
    with pytest.raises(UnsupportedDevice, match="no bf16") as caught:
        backends.choose("cuda", CPU, "bf16", int8=True)
    assert "fp16" in caught.value.hint
    assert backends.choose("cuda", CPU, "auto", int8=True).name == "cuda"


def test_triton_on_gpus(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    refused = backends.refusal("triton", CUDA)
    assert refused is not None and "needs compute capability 8.0, the device has 7.5" in refused.message
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert backends.refusal("triton", CUDA) is None and backends.half_dtype(CUDA) == "bf16"
    refused = backends.refusal("triton", torch.device("meta"))
    assert refused is not None and "run on cuda, not on meta" in refused.message


def test_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedDevice, match="triton is not installed: pip install"):
        backends.choose("triton", CPU, "auto", int8=True)


def test_a_library_that_was_not_built(no_library: Path) -> None:
    with pytest.raises(UnsupportedDevice, match="was not built"):
        backends.choose("cuda", CPU, "auto", int8=True)


def test_a_library_that_does_not_load(no_library: Path) -> None:
    no_library.write_bytes(b"no library")
    with pytest.raises(UnsupportedDevice, match="does not load"):
        backends.choose("cuda", CPU, "auto", int8=True)


@IN_ORDER
def test_a_library_of_another_version(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = cuda_library.ABI
    monkeypatch.setattr(cuda_library, "ABI", built + 1)
    cuda_library.load.cache_clear()
    with pytest.raises(UnsupportedDevice, match=f"has interface {built}, this sana-edge needs {built + 1}"):
        backends.choose("cuda", CPU, "auto", int8=True)


@IN_ORDER
@pytest.mark.parametrize(
    ("number", "message"),
    [(TOO_OLD, "older than compute capability"), (OLD_DRIVER, "the NVIDIA driver is older than")],
)
def test_what_is_too_old(emulated: Any, monkeypatch: pytest.MonkeyPatch, number: int, message: str) -> None:
    monkeypatch.setattr(Library, "device", lambda self, index: self._check(number, "sana_edge_device"))
    with pytest.raises(UnsupportedDevice, match=message):
        backends.choose("cuda", CPU, "auto", int8=True)


def fail_after(monkeypatch: pytest.MonkeyPatch, calls: int, fail: Callable[[Library], None]) -> None:
    """Let the library's calls fail from a certain one on."""
    call, done = Library.call, [0]

    def count(self: Library, operation: str, device: torch.device, **fields: Any) -> None:
        done[0] += 1
        if done[0] > calls:
            fail(self)
        call(self, operation, device, **fields)

    monkeypatch.setattr(Library, "call", count)


def status(number: int) -> Callable[[Library], None]:
    return lambda library: library._check(number, "w8a8_linear")


def out_of_memory(_: Library) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which "
        "512.00 MiB is free."
    )


def interrupt(_: Library) -> None:
    raise KeyboardInterrupt


FAULTS: dict[str, tuple[Callable[[Library], None], type[BaseException], str, str]] = {
    "lost": (status(LOST), SanaError, "w8a8_linear: ", "start the program again"),
    "memory": (status(NO_MEMORY), OutOfMemory, "w8a8_linear: ", "smaller size"),
    "torch": (
        out_of_memory,
        OutOfMemory,
        "64x64: 2.1 GB more are needed, 0.5 GB are free",
        "smaller size",
    ),
    "ctrl-c": (interrupt, KeyboardInterrupt, "", ""),
}


@IN_ORDER
@pytest.mark.parametrize(("fail", "kind", "message", "hint"), FAULTS.values(), ids=FAULTS)
def test_faults_in_the_loop(
    emulated: Any,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[Library], None],
    kind: type[BaseException],
    message: str,
    hint: str,
) -> None:
    """Each is one clear error, and the same picture can be made afterwards."""
    options: dict[str, Any] = {"seed": 3, "steps": 2, "size": (64, 64)}
    with Sana.load(str(tiny_folder), int8=True, backend="cuda") as sana:
        expected = sana.generate(PROMPT, **options).png()
        with monkeypatch.context() as patched, pytest.raises(kind, match=message) as caught:
            # in the middle of the second step
            fail_after(patched, 36, fail)
            sana.generate(PROMPT, **options)
        assert hint in getattr(caught.value, "hint", "")
        assert sana._runtime is not None
        kept = len(sana._runtime.predictor._graphs)
        assert kept == (0 if kind is OutOfMemory else 1)
        assert sana.generate(PROMPT, **options).png() == expected


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="torch before 2.8 has no such error")
def test_a_gpu_that_fails_under_torch() -> None:
    message = "the GPU failed: CUDA error: unspecified launch failure"
    with pytest.raises(SanaError, match=message) as caught, memory_errors("64x64"):
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nand more")
    assert caught.value.hint == "start the program again"


def pictures(folder: Path, backend: str, **options: Any) -> Any:
    with Sana.load(str(folder), int8=True, backend=backend, dtype="bf16") as sana:
        return sana.generate(PROMPT, seed=7, steps=2, **options)


# Both are INT8 in bf16, and round differently in their last bits: at most as far apart as INT8 is from float,
# of which a 2-step picture of random weights shows less than 2 of 255 levels.
LEVELS = 2.0


@IN_ORDER
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_pictures_on_the_cuda_library(emulated: Any, tiny_folder: Path, size: tuple[int, int]) -> None:
    made = pictures(tiny_folder, "cuda", size=size)
    expected = pictures(tiny_folder, "torch", size=size)
    assert made.metadata["backend"] == "cuda" and expected.metadata["backend"] == "torch"
    distance = np.abs(made.pixels.astype(int) - expected.pixels).mean()
    assert 0 < distance < LEVELS
    assert made.notes == expected.notes
    # whatever the order of the threads
    emulated.shuffle(5)
    assert pictures(tiny_folder, "cuda", size=size).png() == made.png()


@pytest.mark.slow
def test_pictures_on_triton(interpreted: None, tiny_folder: Path) -> None:
    made, expected = pictures(tiny_folder, "triton"), pictures(tiny_folder, "torch")
    assert made.metadata["backend"] == "triton"
    assert 0 < np.abs(made.pixels.astype(int) - expected.pixels).mean() < LEVELS


@IN_ORDER
def test_sprint_pictures(emulated: Any, tiny_sprint_folder: Path) -> None:
    made = pictures(tiny_sprint_folder, "cuda", size=(64, 96))
    expected = pictures(tiny_sprint_folder, "torch", size=(64, 96))
    assert 0 < np.abs(made.pixels.astype(int) - expected.pixels).mean() < LEVELS


@IN_ORDER
def test_auto_dtype_is_16_bit(emulated: Any, tiny_folder: Path) -> None:
    with Sana.load(str(tiny_folder), int8=True, backend="cuda") as sana:
        assert sana._runtime is not None and sana._runtime.dtype == "bf16"
    with Sana.load(str(tiny_folder), int8=True) as sana:
        assert sana._runtime is not None and sana._runtime.dtype == "fp32"


@IN_ORDER
def test_two_at_once(emulated: Any, tiny_folder: Path) -> None:
    """Two models in two threads, their steps in any order, make what each makes alone."""
    options: dict[str, Any] = {"steps": 2, "size": (64, 64)}
    with (
        Sana.load(str(tiny_folder), int8=True, backend="cuda") as one,
        Sana.load(str(tiny_folder), int8=True, backend="cuda") as two,
    ):
        expected = [one.generate(PROMPT, seed=seed, **options).png() for seed in (1, 2)]
        streams = [sana.stream(PROMPT, seed=seed, **options) for sana, seed in ((one, 1), (two, 2))]
        turns = [list(steps) for steps in zip(*streams, strict=True)]
    assert [step.image.png() for step in turns[-1] if step.image is not None] == expected


def test_the_log_says_what_is_used(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sana_edge"), Sana.load(str(tiny_folder), device="cpu"):
        assert "on cpu, backend torch" in caplog.text
        assert "backend cuda is not used: the CUDA kernels are for INT8 models" in caplog.text


@IN_ORDER
def test_command_line(
    emulated: Any, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "house.png"
    arguments = [
        "generate",
        "--prompt",
        PROMPT,
        "--steps",
        "1",
        "--size",
        "64x64",
        "--model",
        str(tiny_folder),
    ]
    assert main([*arguments, "--backend", "cuda", "--output", str(place)]) == 1
    error = capsys.readouterr().err
    assert "backend cuda cannot be used: the CUDA kernels are for INT8 models" in error and "--int8" in error
    assert not place.exists()
    assert main([*arguments, "--backend", "cuda", "--int8", "--json", "--output", str(place)]) == 0
    assert json.loads(capsys.readouterr().out)["backend"] == "cuda" == read_metadata(place)["backend"]


def test_refused_before_anything_is_loaded(
    no_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--prompt", PROMPT, "--model", "someone/no-model", "--device", "cpu"]
    assert main([*arguments, "--int8", "--backend", "cuda", "--output", str(tmp_path / "a.png")]) == 1
    assert "backend cuda cannot be used: the CUDA library was not built" in capsys.readouterr().err


@IN_ORDER
def test_cancelling_between_steps(emulated: Any, tiny_folder: Path) -> None:
    cancel = threading.Event()
    with Sana.load(str(tiny_folder), int8=True, backend="cuda") as sana:
        with pytest.raises(SanaError, match="cancelled"):
            for _ in sana.stream(PROMPT, steps=3, size=(64, 64), cancel=cancel):
                cancel.set()
        assert sana.generate(PROMPT, steps=1, size=(64, 64)).metadata["backend"] == "cuda"
