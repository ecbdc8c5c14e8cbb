"""The dtype that is chosen for a device; the process's TF32 flag, off while anyone is inside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_edge import Sana
from sana_edge.plan.memory import fitting_dtypes
from sana_edge.plan.model import facts_of
from sana_edge.torch_runtime import device, precision
from sana_edge.torch_runtime.device import computes_bf16, full_precision
from sana_edge.torch_runtime.load import load_dtype
from sana_edge.torch_runtime.runtime import TorchRuntime


def has(monkeypatch: pytest.MonkeyPatch, *instructions: str) -> None:
    """A CPU with these."""
    monkeypatch.setattr(device, "instructions", lambda: set(instructions))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


@pytest.mark.parametrize(
    ("stored", "instruction", "place", "chosen"),
    [
        ("bf16", "avx2", "cpu", "fp32"),
        ("bf16", "avx512_bf16", "cpu", "bf16"),
        ("bf16", "avx2", "cuda", "bf16"),
        ("fp16", "avx512_bf16", "cpu", "fp32"),
        ("fp16", "avx2", "cuda", "fp16"),
        ("fp32", "avx512_bf16", "cpu", "fp32"),
    ],
)
def test_auto_is_what_a_device_computes_in(
    stored: str, instruction: str, place: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, instruction)
    assert load_dtype(stored, torch.device(place)) == chosen


def test_a_torch_that_does_not_use_them_or_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "bf16")
    assert computes_bf16()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not computes_bf16()
    has(monkeypatch, "bf16")
    monkeypatch.setattr(device, "instructions", lambda: None)
    assert not computes_bf16()


def test_bf16_where_fp32_has_no_room() -> None:
    facts = facts_of("sana-1.6b-1024-bf16")
    # loading its text encoder takes 12 GB in fp32, 4 GB in bf16, its denoiser 9 GB in fp32
    for gib, *chosen in (
        (16, "fp32", "fp32"),
        (10, "fp32", "bf16"),
        (6, "bf16", "bf16"),
        (1, "fp32", "fp32"),
    ):
        assert fitting_dtypes(facts, "fp32", int8=False, free=gib << 30) == tuple(chosen)
    assert fitting_dtypes(facts, "fp32", int8=False, free=None) == ("fp32", "fp32")
    assert fitting_dtypes(facts_of("sana-1.6b-1024"), "fp32", int8=False, free=8 << 30) == ("fp32", "fp32")


def test_a_picture_of_bf16_weights(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(tiny_folder, tmp_path / "half")
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    has(monkeypatch, "avx2")
    with Sana.load(str(source), device="cpu") as sana:
        made = sana.generate("a red house", steps=1)
    assert made.metadata["dtype"] == "fp32" and not made.notes
    for dtype, part in (("fp32", "the text encoder"), ("bf16", "all")):
        monkeypatch.setattr(precision, "fitting_dtypes", lambda *_, dtype=dtype, **__: (dtype, "bf16"))
        with Sana.load(str(source), device="cpu") as sana:
            made = sana.generate("a red house", steps=1)
            assert isinstance(sana._runtime, TorchRuntime)
            assert sana._runtime.text_encoder.model.dtype == torch.bfloat16
        assert made.metadata["dtype"] == dtype
        assert f"memory is short: {part} is in bf16" in " ".join(made.notes)


@pytest.mark.parametrize("allowed", [True, False])
def test_off_inside_and_restored(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    first, second = full_precision(), full_precision()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    # the other is still inside
    assert not torch.backends.cudnn.allow_tf32
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32 is allowed
