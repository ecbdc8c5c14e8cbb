"""onnxruntime: on every CPU, and on NVIDIA GPUs through its CUDA and TensorRT execution providers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines import ports
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.ports import ANY, Arrays
from sana_edge.errors import InvalidInput, MissingDependency, SanaError, UnsupportedDevice
from sana_edge.store.manifest import Port, export_command
from sana_edge.system.threads import cpu_threads, shown_threads

if TYPE_CHECKING:
    import onnxruntime

# As in pyproject.toml. Exported graphs have opset 20, which 1.17 knows; those in bf16, which it has products
# for on GPUs only, have 22, which came with 1.21: an older one says so when it loads them.
_OLDEST = (1, 20)
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
# errors only: its warnings name nodes and its own source
_LOG_ERRORS = 3
_LOG_FATAL = 4
# A session's option. CPUs without VNNI add pairs of INT8 products in 16 bits, where large ones saturate; with
# it such CPUs take slower products that are exact, and nothing changes on others.
EXACT_SUMS = ("session.x64quantprecision", "1")
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
# an ONNX model of one Identity, float (1,), to try a provider with; IR 8, opset 13
_TRIAL = bytes.fromhex(
    "0808" "3a33" "0a10" "0a0178" "120179" "2208" "4964656e74697479" "120174"
    "5a0d" "0a0178" "1208" "0a06" "0801" "1202" "0a00"
    "620d" "0a0179" "1208" "0a06" "0801" "1202" "0a00"
    "4204" "0a00" "100d"
)  # fmt: skip


@dataclass(frozen=True)
class OnnxRuntime(EngineKind):
    """The kind "onnxruntime"."""

    name = "onnxruntime"
    devices = tuple(_PROVIDERS)

    @classmethod
    def probe(cls, device: str, settings: Settings) -> OnnxRuntime:
        """See `sana_edge.engines.engine.EngineKind.probe`."""
        runtime = _runtime()
        dtype = settings.dtype or "fp32"
        if settings.precision not in ("auto", dtype):
            hint = f"choose dtype auto, or `{export_command(dtype=settings.precision)}`"
            if (device, settings.precision) == ("cpu", "bf16"):
                hint = "choose dtype auto, or install openvino"
            raise InvalidInput(
                f"onnxruntime computes in the graphs' own {dtype}, not in {settings.precision}", hint
            )
        title = f"onnxruntime {runtime.__version__} on {device}"
        if device != "cpu":
            _try_provider(runtime, device)
            return cls(device, dtype, title, settings)
        if dtype == "bf16":
            raise InvalidInput(
                "onnxruntime has no bf16 products on a CPU",
                f"`{export_command(dtype='fp32')}`, or install openvino",
            )
        return cls(device, dtype, f"{title}, {shown_threads(cpu_threads(settings.threads))}", settings)

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> OnnxRuntimeEngine:
        """See `sana_edge.engines.engine.EngineKind.load`."""
        ports.check_file(path)
        runtime = _runtime()
        options = _session_options(runtime, self.settings)
        try:
            session = _session(runtime, str(path), options, _providers(self))
        # its exceptions have no base class but Exception
        except Exception as error:
            raise ports.load_failure(path, "onnxruntime", error) from error
        if session.get_providers()[0] != _PROVIDERS[self.device]:
            raise UnsupportedDevice(
                f"onnxruntime does not run {path.name} on {self.device}", "choose --device cpu"
            )
        ports.check_graph(path, inputs, _ports(session.get_inputs()))
        ports.check_graph(path, outputs, _ports(session.get_outputs()))
        return OnnxRuntimeEngine(self, path.stem, session, inputs, outputs)


class OnnxRuntimeEngine:
    """A graph in onnxruntime; see `sana_edge.engines.engine.Engine`."""

    name = "onnxruntime"
    notes: tuple[str, ...] = ()

    def __init__(
        self,
        kind: EngineKind,
        graph: str,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, Port] | None,
        outputs: Mapping[str, Port] | None,
    ) -> None:
        self.graph = graph
        self.device = kind.device
        self.precision = kind.precision
        self._session: onnxruntime.InferenceSession | None = session
        self._inputs = inputs or _ports(session.get_inputs())
        self._outputs = outputs or _ports(session.get_outputs())
        self._binding = session.io_binding()
        # what is bound; the binding itself does not keep arrays alive
        self._bound: dict[str, NDArray[Any]] = {}

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `sana_edge.engines.engine.Engine.run`."""
        if self._session is None:
            raise SanaError(f"the engine of {self.graph} is closed", "load it again")
        sizes = ports.check_inputs(self.graph, inputs, self._inputs)
        try:
            for name, array in inputs.items():
                self._bind_input(name, array)
            own = self._bind_outputs(sizes)
            self._session.run_with_iobinding(self._binding)
            values = dict(zip(own, self._binding.get_outputs(), strict=True))
            return {name: values[name].numpy() if array is None else array for name, array in own.items()}
        except Exception as error:
            raise ports.run_failure(self.graph, self.name, sizes, error) from error

    def close(self) -> None:
        """See `sana_edge.engines.engine.Engine.close`."""
        self._session = None
        self._binding = None
        self._bound = {}

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        array = np.ascontiguousarray(array)
        bound = self._bound.get(name)
        if self.device == "cpu":
            if array is not bound:
                self._binding.bind_cpu_input(name, array)
        elif array is not bound or array.flags.writeable:
            value = _runtime().OrtValue.ortvalue_from_numpy(array, "cuda", 0)
            self._binding.bind_ortvalue_input(name, value)
        self._bound[name] = array

    def _bind_outputs(self, sizes: Mapping[str, int]) -> dict[str, NDArray[Any] | None]:
        """New arrays that are written to, None where onnxruntime finds the shape itself."""
        own: dict[str, NDArray[Any] | None] = {}
        for name, (dtype, sides) in self._outputs.items():
            shape = ports.known_shape(sides, sizes)
            if shape is None or self.device != "cpu":
                own[name] = None
                self._binding.bind_output(name, "cpu")
                continue
            array = np.empty(shape, np.dtype(dtype))
            own[name] = array
            self._binding.bind_output(name, "cpu", 0, array.dtype, shape, array.ctypes.data)
        return own


def without_telemetry() -> None:
    """Call before its first import; from 1.29 on it otherwise uploads events and stores a device ID."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def _runtime() -> ModuleType:
    without_telemetry()
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        hint = "pip install 'sana-edge[onnx]'"
        raise MissingDependency("onnxruntime is not installed", hint) from error
    except (ImportError, OSError) as error:
        hint = "install it again: pip install --force-reinstall onnxruntime"
        raise MissingDependency(f"onnxruntime does not load: {ports.said(error)}", hint) from error
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version < _OLDEST:
        least = ".".join(map(str, _OLDEST))
        raise MissingDependency(
            f"onnxruntime {onnxruntime.__version__} is too old, {least} is needed",
            "pip install --upgrade onnxruntime",
        )
    module: ModuleType = onnxruntime
    return module


def _session_options(runtime: ModuleType, settings: Settings) -> onnxruntime.SessionOptions:
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = cpu_threads(settings.threads) or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_FATAL
    # Two layers at 1024 px: 0.93 GB at most with the arena and 0.59 GB without, in the same time; the arena
    # keeps all that it ever had. The plan of one block for a known shape stays.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry(*EXACT_SUMS)
    return options


def _providers(kind: EngineKind) -> list[Any]:
    """With their options; what a GPU's provider cannot compute runs on the CPU."""
    cpu = _PROVIDERS["cpu"]
    cuda = (
        _PROVIDERS["cuda"],
        {
            # memory as needed instead of powers of two
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": "HEURISTIC",
            "cudnn_conv_use_max_workspace": "0",
            "use_tf32": "0",
        },
    )
    if kind.device == "cpu":
        return [cpu]
    if kind.device == "cuda":
        return [cuda, cpu]
    options = {
        "trt_fp16_enable": str(kind.precision == "fp16"),
        "trt_bf16_enable": str(kind.precision == "bf16"),
    }
    if kind.settings.cache is not None:
        cache = str(kind.settings.cache)
        options |= {"trt_engine_cache_enable": "True", "trt_engine_cache_path": cache}
        options |= {"trt_timing_cache_enable": "True", "trt_timing_cache_path": cache}
    return [(_PROVIDERS["tensorrt"], options), cuda, cpu]


def _try_provider(runtime: ModuleType, device: str) -> None:
    """A provider may be there without the libraries it needs; that shows only in a session."""
    provider = _PROVIDERS[device]
    if provider not in runtime.get_available_providers():
        hint = "pip uninstall onnxruntime, then pip install onnxruntime-gpu; or choose --device cpu"
        raise UnsupportedDevice(f"this onnxruntime is built without {device}", hint)
    options = runtime.SessionOptions()
    options.log_severity_level = _LOG_FATAL
    reason = "its libraries do not load"
    try:
        session = _session(runtime, _TRIAL, options, [provider, _PROVIDERS["cpu"]])
        if session.get_providers()[0] == provider:
            return
    except Exception as error:
        reason = ports.said(error)
    hint = "install the NVIDIA driver, CUDA and cuDNN that onnxruntime-gpu names; or choose --device cpu"
    raise UnsupportedDevice(f"onnxruntime cannot use {device}: {reason}", hint)


def _session(
    runtime: ModuleType, model: str | bytes, options: onnxruntime.SessionOptions, providers: list[Any]
) -> onnxruntime.InferenceSession:
    # onnxruntime warns of a provider that is not there, which callers see for themselves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return runtime.InferenceSession(model, options, providers=providers)


def _ports(arguments: list[onnxruntime.NodeArg]) -> dict[str, Port]:
    return {
        port.name: (
            _DTYPES.get(port.type, port.type),
            tuple(ANY if side is None else side for side in port.shape),
        )
        for port in arguments
    }
