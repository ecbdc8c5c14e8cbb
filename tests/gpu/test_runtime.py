"""The INT8 runtime on a GPU: both kernel backends, the recorded step, pictures, faults.

`make gpu-check` runs these with Triton compiling. The operations one by one are tested by the ``gpu`` form of
the fixture ``emulated``.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sana_edge import Sana
from sana_edge.config import DenoiserConfig
from sana_edge.errors import OutOfMemory
from sana_edge.fused import backends
from sana_edge.int8 import quant
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.runtime import TorchRuntime
from sana_edge.torch_runtime.steps import FusedNetwork, Predictor, Velocity

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
# as in test_fused_denoiser.py: the error of INT8 itself, sqrt(6) times for two layers of three branches
HALF_ERROR = 0.03
GUIDANCE = 4.5
# two predictions with independent errors, of which guidance takes 4.5 and -3.5
GUIDED = (GUIDANCE**2 + (GUIDANCE - 1) ** 2) ** 0.5

BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])
# (0.6B's width, one of its layers' worth of time), and small
CONFIGS = {
    "0.6b": DenoiserConfig(
        num_layers=2,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "1.5": DenoiserConfig(num_layers=2, qk_norm="rms_norm_across_heads"),
    "small": DenoiserConfig(
        num_layers=2,
        num_attention_heads=6,
        num_cross_attention_heads=3,
        cross_attention_head_dim=64,
        cross_attention_dim=192,
        caption_channels=128,
    ),
}


@pytest.fixture(autouse=True)
def _usable(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton is interpreted, not compiled: TRITON_INTERPRET is 1")
    refused = backends.refusal(name, CUDA) if name else None
    if refused is not None:
        pytest.skip(refused.message)


def int8_denoiser(config: DenoiserConfig) -> Denoiser:
    denoiser = Denoiser(config).requires_grad_(False).eval()
    for name, parameter in denoiser.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name:
            parameter.add_(1)
    quantize_denoiser(denoiser)
    return denoiser.to_compute(CUDA, torch.float16)


def reading(denoiser: Denoiser, length: int) -> TextContext:
    C = denoiser.config.caption_channels
    negative, prompt = (
        TextFeatures(torch.randn(1, n, C, device=CUDA), torch.ones(1, n, dtype=torch.bool, device=CUDA))
        for n in (1, length)
    )
    return denoiser.text_context([negative, prompt])


def unrecorded(denoiser: Denoiser, x: Tensor, step: Modulation, context: TextContext) -> Tensor:
    unguided, prompted = denoiser(torch.cat([x, x]), step, context).chunk(2)
    return unguided + GUIDANCE * (prompted - unguided)


def started(denoiser: Denoiser, backend: str, recorder: cuda_graph.Recorder, x: Tensor) -> Velocity:
    tables = denoiser.modulation(torch.tensor([900.0, 30.0], device=CUDA))
    predictor = Predictor(FusedNetwork(denoiser, backend), recorder)
    velocity, note = predictor.start(x, tables, reading(denoiser, 60), GUIDANCE)
    assert note == ""
    return velocity


@BACKENDS
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (1, 3)], ids=str)
@torch.inference_mode()
def test_a_step_equals_the_int8_layers(backend: str, config: DenoiserConfig, size: tuple[int, int]) -> None:
    denoiser = int8_denoiser(config)
    x, context = torch.randn(1, config.in_channels, *size, device=CUDA), reading(denoiser, 60)
    tables = denoiser.modulation(torch.tensor([900.0, 30.0], device=CUDA))
    velocity, note = Predictor(FusedNetwork(denoiser, backend), cuda_graph.CudaGraphs()).start(
        x, tables, context, GUIDANCE
    )
    assert note == ""
    for i in range(2):
        found, expected = velocity(x, i), unrecorded(denoiser, x, tables[i], context)
        assert quant.relative_error(found, expected) < GUIDED * HALF_ERROR


@BACKENDS
@torch.inference_mode()
def test_replay_equals_eager_and_itself(backend: str) -> None:
    denoiser, x = int8_denoiser(CONFIGS["0.6b"]), torch.randn(1, 32, 32, 32, device=CUDA)
    torch.manual_seed(1)
    eager = started(denoiser, backend, cuda_graph.eager, x)(x, 1).clone()
    torch.manual_seed(1)
    replayed = started(denoiser, backend, cuda_graph.CudaGraphs(), x)
    # the same bytes, however blocks happen to be ordered
    for _ in range(20):
        assert torch.equal(replayed(x, 1), eager)


@BACKENDS
@torch.inference_mode()
def test_two_streams_at_once(backend: str) -> None:
    denoiser = int8_denoiser(CONFIGS["small"])
    latents = torch.randn(2, 1, 32, 32, 32, device=CUDA)
    torch.manual_seed(1)
    wanted = [started(denoiser, backend, cuda_graph.eager, x)(x, 0).clone() for x in latents]
    same: list[bool] = []
    # a thread that fails must not leave the other waiting
    ready = threading.Barrier(2, timeout=120)

    def work(k: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            with lock:
                torch.manual_seed(1)
                for _ in range(k + 1):
                    velocity = started(denoiser, backend, cuda_graph.CudaGraphs(), latents[k])
            ready.wait()
            same.append(all(torch.equal(velocity(latents[k], 0), wanted[k]) for _ in range(50)))

    lock = threading.Lock()
    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True, True]


@BACKENDS
@torch.inference_mode()
def test_replays_beside_captures(backend: str) -> None:
    """Another thread's captures leave a replay alone, and it leaves them alone."""
    denoiser, x = int8_denoiser(CONFIGS["small"]), torch.randn(1, 32, 32, 32, device=CUDA)
    velocity = started(denoiser, backend, cuda_graph.CudaGraphs(), x)
    wanted, done = velocity(x, 0).clone(), threading.Event()
    found: list[object] = []

    def replay() -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                while not done.is_set():
                    # also memory that is asked for and given back meanwhile
                    found.append(torch.equal(velocity(x, 0) + 0, wanted))
        except Exception as error:
            found.append(error)

    torch.cuda.synchronize()
    thread = threading.Thread(target=replay)
    thread.start()
    try:
        for side in range(4, 24, 2):
            other = torch.randn(1, 32, side, side, device=CUDA)
            assert started(denoiser, backend, cuda_graph.CudaGraphs(), other)(other, 0).isfinite().all()
    finally:
        done.set()
        thread.join()
    assert found and all(result is True for result in found), [r for r in found if r is not True][:3]


@BACKENDS
@torch.inference_mode()
def test_a_replay_allocates_nothing(backend: str) -> None:
    x = torch.randn(1, 32, 32, 32, device=CUDA)
    velocity = started(int8_denoiser(CONFIGS["small"]), backend, cuda_graph.CudaGraphs(), x)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for i in range(2):
        velocity(x, i)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@BACKENDS
def test_a_picture(backend: str, tmp_path: Path) -> None:
    pixels = {}
    for name in ("torch", backend):
        with Sana.load("sana-tiny", device="cuda", int8=True, backend=name, dtype="fp16") as sana:
            picture = sana.generate("a red house left of a yellow star", seed=7)
            assert picture.metadata["backend"] == name
            assert not picture.notes
            pixels[name] = picture.pixels.astype(np.float64)
    # what INT8 itself costs this model is 21 dB in its worst picture; equal up to rounding is far above that
    error = np.square(pixels["torch"] - pixels[backend]).mean()
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > 25


@BACKENDS
def test_a_picture_does_not_depend_on_what_was_made_before(backend: str) -> None:
    """A graph reads the memory that it was recorded with: nothing else may have got it meanwhile."""
    with Sana.load("sana-tiny", device="cuda", int8=True, backend=backend, dtype="fp16") as sana:
        first = sana.generate("a red house", seed=7, steps=4).pixels
        filled = [torch.full((32 << 20,), 0xFF, dtype=torch.uint8, device=CUDA) for _ in range(8)]
        sana.generate("two blue fish above a green tree", seed=8, steps=2)
        assert np.array_equal(sana.generate("a red house", seed=7, steps=4).pixels, first)
        del filled


@pytest.mark.parametrize("stage", ["predict", "decode"])
def test_usable_after_running_out_of_memory(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sana.load("sana-tiny", device="cuda", int8=True) as sana:
        before = sana.generate("a red house", seed=7, steps=2).pixels
        # the estimate would refuse it before anything is computed
        monkeypatch.setattr(TorchRuntime, "check_plan", lambda *_: None)
        whole = getattr(TorchRuntime, stage)

        def cramped(self: TorchRuntime, *arguments: Any, **named: Any) -> object:
            _, total = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
            return whole(self, *arguments, **named)

        monkeypatch.setattr(TorchRuntime, stage, cramped)
        try:
            with pytest.raises(OutOfMemory):
                sana.generate("a red house", seed=7, steps=2, size=(4096, 4096))
        finally:
            # other tests run in this process
            torch.cuda.set_per_process_memory_fraction(1.0)
        monkeypatch.undo()
        assert np.array_equal(sana.generate("a red house", seed=7, steps=2).pixels, before)
