"""The engine "tensorrt": finds and loads what `sana-edge build` made; runs it in `tensorrt_engine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_edge import cuda_memory, engine_cache, manifest
from sana_edge.engine_cache import Key
from sana_edge.errors import UnsupportedDevice
from sana_edge.manifest import Port
from sana_edge.tensorrt_engine import TensorRTEngine

if TYPE_CHECKING:
    from sana_edge.engines import EngineKind, Settings

# the first version whose parser knows ONNX 1.17, and with it the opset of the exported graphs
OLDEST = (10, 6)


def probe(device: str, settings: Settings) -> tuple[str, str]:
    """What would run here: a title for a person, and the precision, which an engine has from its graph.

    Raises:
        MissingDependency: TensorRT or CUDA's bindings are not installed.
        UnsupportedDevice: another device, no GPU, a driver or a TensorRT that is too old.
    """
    if device not in ("cuda", "tensorrt"):
        raise UnsupportedDevice(f"TensorRT does not run on {device}", "choose device cuda")
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    machine = cuda_memory.machine(cuda, check_version(trt))
    return f"TensorRT {machine.tensorrt} on {machine.gpu}", settings.dtype or "fp32"


def load(
    kind: EngineKind,
    path: Path,
    inputs: Mapping[str, Port] | None = None,
    outputs: Mapping[str, Port] | None = None,
) -> TensorRTEngine:
    """Load the engine that was built for a graph.

    Args:
        path: of the ``.onnx`` in its exported folder; the engine is looked for in ``settings.cache`` or the
            user's own engine folder.

    Raises:
        SanaError: there is none for this model, GPU, TensorRT and driver; or it is damaged, or foreign.
    """
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    exported = manifest.read(path.parent)
    name = next((name for name, graph in exported.graphs.items() if graph.file == path.name), path.stem)
    key = key_of(exported, name, cuda_memory.machine(cuda, check_version(trt)))
    folder = kind.settings.cache or engine_cache.engine_folder()
    entry = engine_cache.find(folder, key, path.parent)
    engine_cache.check_loadable(entry, trust=bool(getattr(kind.settings, "trust_engine", False)))
    ports = exported.graphs[name].inputs if name in exported.graphs else inputs
    return TensorRTEngine(entry, trt, cuda, inputs=ports, precision=exported.dtype, cell=exported.cell)


def key_of(exported: manifest.Manifest, graph: str, machine: engine_cache.Machine) -> Key:
    """What an engine of an exported graph is stored under."""
    checksum = engine_cache.model_checksum({name: file.sha256 for name, file in exported.files.items()})
    return Key(exported.name, checksum, graph, machine)


def check_version(trt: Any) -> str:
    """The version of the module tensorrt.

    Raises:
        UnsupportedDevice: it is too old.
    """
    version = str(trt.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise UnsupportedDevice(f"TensorRT {version} is too old", f"{cuda_memory.EXTRA} --upgrade")
    return version
