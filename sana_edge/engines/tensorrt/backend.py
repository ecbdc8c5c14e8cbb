"""The kind "tensorrt": finds and loads what `sana-edge build` made; `engine.py` runs it.

It has not run with TensorRT or on an NVIDIA GPU: tests draw pictures with stand-ins made of the names,
parameters and enumerations of the real bindings, behind which onnxruntime computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.tensorrt import cache
from sana_edge.engines.tensorrt import cuda as cuda_memory
from sana_edge.engines.tensorrt.cache import Entry, Key, Machine
from sana_edge.engines.tensorrt.engine import TensorRTEngine
from sana_edge.engines.tensorrt.trust import check_loadable
from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.store import manifest
from sana_edge.store.manifest import Manifest, Port

# The first versions whose parsers take the exported graphs: 10.0 documents opset 20, that of fp32 and fp16;
# 10.6 is built with ONNX 1.17, which brought opset 22, that of bf16. pyproject.toml asks for what takes all.
_OLDEST = {"fp32": (10, 0), "fp16": (10, 0), "bf16": (10, 6)}


@dataclass(frozen=True)
class TensorRT(EngineKind):
    """The kind "tensorrt"."""

    name = "tensorrt"
    devices = ("cuda",)

    @classmethod
    def probe(cls, device: str, settings: Settings) -> TensorRT:
        """See `sana_edge.engines.engine.EngineKind.probe`; the precision is the graphs' own.

        Reads no engine: `load` says whether one is whole.
        """
        dtype = settings.dtype or "fp32"
        trt, cuda = _bindings()
        here = cuda_memory.machine(cuda, check_version(trt, dtype))
        if settings.precision not in ("auto", dtype):
            raise InvalidInput(
                f"TensorRT's engines compute in the graphs' own {dtype}, not in {settings.precision}",
                f"choose dtype auto, or `{manifest.export_command(dtype=settings.precision)}`, then"
                " `sana-edge build DIR`",
            )
        if settings.folder is not None:
            exported = manifest.read(settings.folder)
            for graph in exported.used_graphs:
                _find(exported, graph, here, settings.folder, settings, quick=True)
        return cls(device, dtype, f"TensorRT {here.tensorrt} on {here.gpu}, {dtype}", settings)

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> TensorRTEngine:
        """Load the engine that was built for a graph of an exported folder.

        See `sana_edge.engines.engine.EngineKind.load`.

        Raises:
            SanaError: there is none for this model, GPU, TensorRT and driver; or it is damaged, or foreign.
        """
        trt, cuda = _bindings()
        exported = manifest.read(path.parent)
        name, graph = next(pair for pair in exported.graphs.items() if pair[1].file == path.name)
        here = cuda_memory.machine(cuda, check_version(trt, exported.dtype))
        entry = _find(exported, name, here, path.parent, self.settings)
        return TensorRTEngine(
            entry, trt, cuda, inputs=graph.inputs, precision=exported.dtype, cell=exported.cell
        )


def _bindings() -> tuple[Any, Any]:
    return cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")


def _find(
    exported: Manifest, graph: str, here: Machine, folder: Path, settings: Settings, *, quick: bool = False
) -> Entry:
    """The engine of a graph for this machine, which may be loaded."""
    engines = settings.engine_folder or cache.engine_folder()
    entry = cache.find(engines, key_of(exported, graph, here), folder)
    check_loadable(entry, trust=settings.trust_engine, quick=quick)
    return entry


def key_of(exported: Manifest, graph: str, here: Machine) -> Key:
    """The key that an engine of an exported graph is stored under."""
    checksum = cache.model_checksum({name: file.sha256 for name, file in exported.files.items()})
    return Key(exported.name, checksum, graph, here)


def check_version(trt: Any, dtype: str) -> str:
    """The version of the module tensorrt.

    Args:
        dtype: an exported folder's.

    Raises:
        UnsupportedDevice: it is too old for graphs in that.
    """
    version, least = str(trt.__version__), _OLDEST[dtype]
    if tuple(int(part) for part in version.split(".")[:2]) < least:
        raise UnsupportedDevice(
            f"TensorRT {version} is too old, {dtype} graphs need {'.'.join(map(str, least))}",
            f"{cuda_memory.EXTRA} --upgrade",
        )
    return version
