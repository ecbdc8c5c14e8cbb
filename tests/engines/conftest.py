"""A machine with TensorRT and a GPU, as far as anyone can see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_tensorrt
import pytest

from sana_edge.engines.tensorrt import cuda as cuda_memory


@pytest.fixture
def cuda() -> Any:
    """The stand-in for ``cuda.bindings.runtime``."""
    return fake_tensorrt.make_cuda()


@pytest.fixture
def table() -> Any:
    """What the bindings have, here those of the newest version; a module may replace this fixture."""
    return fake_tensorrt.TABLES["tensorrt"][-1]


@pytest.fixture
def trt(table: Any, cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for ``tensorrt``; both are what is imported."""
    trt = fake_tensorrt.make_trt(table, cuda)
    modules = {"tensorrt": trt, "cuda.bindings.runtime": cuda}
    monkeypatch.setattr(cuda_memory, "load", modules.__getitem__)
    monkeypatch.setattr(cuda_memory, "_DRIVER", tmp_path / "no driver")
    return trt
