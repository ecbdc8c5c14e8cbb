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


@pytest.fixture(params=fake_tensorrt.TABLES["tensorrt"], ids=lambda table: table["version"])
def trt(request: pytest.FixtureRequest, cuda: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in for ``tensorrt``; both are what is imported."""
    trt = fake_tensorrt.make_trt(request.param, cuda)
    modules = {"tensorrt": trt, "cuda.bindings.runtime": cuda}
    monkeypatch.setattr(cuda_memory, "load", modules.__getitem__)
    monkeypatch.setattr(cuda_memory, "_DRIVER", tmp_path / "no driver")
    return trt
