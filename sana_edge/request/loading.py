"""How a model is loaded: its options, and what they may name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# what can be asked for, of models (`sana_edge.fused.backends`) and of exported folders (`sana_edge.engines`)
TORCH_BACKENDS = ("auto", "torch", "triton", "cuda")
BACKENDS = (*TORCH_BACKENDS, "tensorrt", "onnxruntime", "openvino")
TORCH_DEVICES = ("auto", "cpu", "cuda")
DEVICES = (*TORCH_DEVICES, "gpu", "npu", "tensorrt")


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; `sana_edge.Sana.load` explains each."""

    device: str = "auto"
    dtype: str = "auto"
    int8: bool = False
    backend: str = "auto"
    engines: Path | None = None
    trust_engine: bool = False
    offline: bool = False
    progress: bool = False
    revision: str | None = None
    decoder: str | None = None
    threads: int | None = None
    memory: int | str | None = None
    prompt_cache: bool = True
