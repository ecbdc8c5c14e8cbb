"""What the torch runtime does besides what pictures show: a decode that runs out of a GPU's memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sana_edge import OutOfMemory, Sana
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.runtime import TorchRuntime


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), OutOfMemory("full", "")])
def test_a_gpu_without_memory_decodes_again_when_graphs_have_gone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    with Sana.load(tiny_folder, device="cpu") as sana, torch.inference_mode():
        runtime: Any = sana._runtime
        assert isinstance(runtime, TorchRuntime)
        latent = torch.randn(1, 32, 3, 2)
        expected = runtime.decode(latent)
        on_gpu = dataclasses.replace(runtime, device=torch.device("cuda"))
        events: list[str] = []
        decode = tiling.decode

        def fails_once(*given: Any, **named: Any) -> torch.Tensor:
            events.append("decode")
            if events == ["decode"]:
                raise error
            return decode(*given, **named)

        monkeypatch.setattr(tiling, "decode", fails_once)
        monkeypatch.setattr(type(runtime.predictor), "release", lambda self: events.append("release"))
        assert np.array_equal(on_gpu.decode(latent), expected)
        assert events == ["decode", "release", "decode"]
        # elsewhere it is an error at once
        events.clear()
        with pytest.raises(type(error)):
            runtime.decode(latent)
        assert events == ["decode"]
        monkeypatch.undo()
