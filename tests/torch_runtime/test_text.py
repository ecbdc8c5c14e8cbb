"""Text on the CUDA kernels: padded to a few lengths, each recorded once, and what is said where it is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge import Sana
from sana_edge.int8.quant import relative_error
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.prompt import CHI
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.text import LENGTHS, RecordedGemma, load_text_encoder

pytestmark = [
    pytest.mark.usefixtures("emulated"),
    pytest.mark.parametrize("emulated", [0], ids=["in order"], indirect=True),
]
PROMPTS = ("a cat", "", "two blue fish above a green tree and a cat on a mat. " * 3)


def load(folder: Path, dtype: torch.dtype = torch.float32, backend: str = "cuda") -> TextEncoder:
    return load_text_encoder(folder, dtype=dtype, device=torch.device("cpu"), backend=backend, int8=True)


def quick(folder: Path) -> TextEncoder:
    """On the definitions of the operations, where it is not about them."""
    encoder = load(folder)
    assert isinstance(encoder.network, RecordedGemma)
    encoder.network._network._backend = "torch"
    return encoder


class Recorder:
    """What graphs do, on a CPU: a function runs with the graph's own tensors, and gives one of them."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        result = run()
        return lambda: result.copy_(run())


def recorder(encoder: TextEncoder) -> Recorder:
    """Puts one in the place of the encoder's own."""
    network = encoder.network
    assert isinstance(network, RecordedGemma)
    network._recorder = Recorder()
    return network._recorder


def test_features_are_those_of_torch(tiny_folder: Path) -> None:
    """Both multiply two digits by the same INT8 weights: 8 inputs of up to 64, as in fused/test_gemma."""
    ours, theirs = load(tiny_folder), load(tiny_folder, backend="torch")
    assert isinstance(ours.network, RecordedGemma) and not isinstance(theirs.network, RecordedGemma)
    for prompts, instruction in (
        (PROMPTS[:1], CHI),
        (PROMPTS[1:2], None),
        (PROMPTS[:2], ("draw what is said:",)),
    ):
        found, expected = (e.encode(prompts, instruction=instruction) for e in (ours, theirs))
        assert torch.equal(found.mask, expected.mask)
        assert relative_error(found.embeddings, expected.embeddings) < 4 * 8**0.5 * 7e-5


def test_a_length_is_recorded_once_behind_each_instruction(tiny_folder: Path) -> None:
    encoder = quick(tiny_folder)
    recording = recorder(encoder)
    one = encoder.encode(["a cat"]).embeddings
    assert recording.recorded == 1
    other = encoder.encode(["a red house"]).embeddings
    assert recording.recorded == 1
    # neither is overwritten by the other, nor by a replay
    assert torch.equal(one, encoder.encode(["a cat"]).embeddings) and not torch.equal(one, other)
    encoder.encode([""], instruction=None)
    assert recording.recorded == 2
    longer = encoder.encode([PROMPTS[2]]).embeddings
    assert recording.recorded == 3 and longer.shape[1] > LENGTHS[0]
    encoder.encode(["a cat"], instruction=("another one:",))
    assert recording.recorded == 4
    encoder.release()
    assert torch.equal(one, encoder.encode(["a cat"]).embeddings) and recording.recorded == 5


def test_the_longest_prompt_has_a_length(tiny_folder: Path) -> None:
    encoder = quick(tiny_folder)
    recording = recorder(encoder)
    assert int(encoder.encode(["a cat on a mat. " * 200], instruction=None).mask.sum()) == LENGTHS[-1] == 300
    assert recording.recorded == 1


def test_what_cannot_be_recorded_runs_and_is_said(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = quick(tiny_folder)
    expected = encoder.encode(["a cat"]).embeddings
    encoder.release()

    def refuse(run: cuda_graph.Run) -> cuda_graph.Run:
        raise RuntimeError("operation not permitted")

    assert isinstance(encoder.network, RecordedGemma)
    encoder.network._recorder = refuse
    assert torch.equal(encoder.encode(["a cat"]).embeddings, expected)
    assert "text is encoded without a CUDA graph: operation not permitted" in caplog.text


def test_a_model_that_the_kernels_cannot_run_says_why(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("gelu_pytorch_tanh", "gelu"))
    encoder = load(folder)
    assert encoder.note == ("text is encoded by torch, not by the CUDA kernels: hidden_activation is gelu")
    with Sana.load(folder, int8=True, backend="cuda") as sana:
        notes = sana.generate("a cat", steps=1, size=(64, 64)).notes
    assert encoder.note in notes


def test_the_features_keep_their_dtype(tiny_folder: Path) -> None:
    encoder = load(tiny_folder, torch.bfloat16)
    exact = quick(tiny_folder).encode(["a cat"]).embeddings
    found: Any = encoder.encode(["a cat"]).embeddings
    assert found.dtype == torch.bfloat16
    # the embedding, kept keys and values, and the result are rounded
    assert relative_error(found.float(), exact) < 4 * 2.0**-8
