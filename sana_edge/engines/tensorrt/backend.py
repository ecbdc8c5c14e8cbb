"""The engine "tensorrt": finds and loads what `sana-edge build` made; runs it in `engine.py`.

Nothing here has run with TensorRT or on an NVIDIA GPU: tests draw pictures with stand-ins made of the names,
parameters and enumerations of the real bindings, behind which onnxruntime computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sana_edge.engines.tensorrt import cache
from sana_edge.engines.tensorrt import cuda as cuda_memory
from sana_edge.engines.tensorrt.cache import Key
from sana_edge.engines.tensorrt.engine import TensorRTEngine
from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.store import manifest
from sana_edge.store.manifest import Port

if TYPE_CHECKING:
    from sana_edge.engines.choose import EngineKind, Settings

# The first versions whose parsers take the exported graphs: 10.0 documents opset 20, that of fp32 and fp16;
# 10.6 is built with ONNX 1.17, which brought opset 22, that of bf16. pyproject.toml asks for what takes all.
_OLDEST = {"fp32": (10, 0), "fp16": (10, 0), "bf16": (10, 6)}


def probe(device: str, settings: Settings) -> tuple[str, str]:
    """What would run here: a title for a person, and the precision, which an engine has from its graph.

    Raises:
        MissingDependency: TensorRT or CUDA's bindings are not installed.
        UnsupportedDevice: another device, no GPU, a driver or a TensorRT that is too old.
        InvalidInput: the engines are of another precision.
    """
    if device != "cuda":
        raise UnsupportedDevice(f"TensorRT's engines do not run on {device}", "choose --device cuda")
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    dtype = settings.dtype or "fp32"
    machine = cuda_memory.machine(cuda, check_version(trt, dtype))
    if settings.precision not in ("auto", dtype):
        raise InvalidInput(
            f"TensorRT's engines compute in the graphs' own {dtype}, not in {settings.precision}",
            f"choose dtype auto, or `{manifest.export_command(dtype=settings.precision)}`, then"
            " `sana-edge build DIR`",
        )
    return f"TensorRT {machine.tensorrt} on {machine.gpu}, {dtype}", dtype


def check_built(folder: Path, settings: Settings) -> None:
    """See that every graph of an exported folder has an engine for this machine that may be loaded.

    Reads no engine; `load` says whether it is whole.

    Raises:
        SanaError: one is missing, cut off or foreign; the hint has the command that builds it.
    """
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    exported = manifest.read(folder)
    machine = cuda_memory.machine(cuda, check_version(trt, exported.dtype))
    for graph in exported.used_graphs:
        entry = cache.find(place(settings), key_of(exported, graph, machine), folder)
        cache.check_loadable(entry, trust=settings.trust_engine, quick=True)


def place(settings: Settings) -> Path:
    """The folder of engines: what was asked for, or the user's own."""
    return settings.engine_folder or cache.engine_folder()


def load(
    kind: EngineKind,
    path: Path,
    inputs: Mapping[str, Port] | None = None,
    outputs: Mapping[str, Port] | None = None,
) -> TensorRTEngine:
    """Load the engine that was built for a graph.

    Args:
        path: of the ``.onnx`` in its exported folder; the engine is looked for in ``settings.engine_folder``
            or the user's own engine folder.

    Raises:
        SanaError: there is none for this model, GPU, TensorRT and driver; or it is damaged, or foreign.
    """
    trt, cuda = cuda_memory.load("tensorrt"), cuda_memory.load("cuda.bindings.runtime")
    exported = manifest.read(path.parent)
    name = next((name for name, graph in exported.graphs.items() if graph.file == path.name), path.stem)
    key = key_of(exported, name, cuda_memory.machine(cuda, check_version(trt, exported.dtype)))
    entry = cache.find(place(kind.settings), key, path.parent)
    cache.check_loadable(entry, trust=kind.settings.trust_engine)
    ports = exported.graphs[name].inputs if name in exported.graphs else inputs
    return TensorRTEngine(entry, trt, cuda, inputs=ports, precision=exported.dtype, cell=exported.cell)


def key_of(exported: manifest.Manifest, graph: str, machine: cache.Machine) -> Key:
    """What an engine of an exported graph is stored under."""
    checksum = cache.model_checksum({name: file.sha256 for name, file in exported.files.items()})
    return Key(exported.name, checksum, graph, machine)


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
