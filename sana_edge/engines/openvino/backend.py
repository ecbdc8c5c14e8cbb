"""OpenVINO: on every CPU, and on Intel's GPUs and NPUs."""

from __future__ import annotations

import functools
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines import ports as engine_ports
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.ports import ANY, Arrays
from sana_edge.engines.telemetry import silent_openvino
from sana_edge.errors import InvalidInput, MissingDependency, SanaError, UnsupportedDevice
from sana_edge.store.cache import user_cache
from sana_edge.store.manifest import Port
from sana_edge.system.memory import available_memory, is_memory, out_of_memory
from sana_edge.system.threads import cpu_threads, shown_threads

if TYPE_CHECKING:
    import openvino

_OLDEST = (2025, 0)
_DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Sides that a size in pixels fixes. Prompts' lengths stay open: they change from picture to picture.
_FIXED = ("B", "h", "w")
# compiled graphs that are kept, one for each size; each holds the weights in its own layout
_KEPT_SIZES = 2
_DRIVERS = {"gpu": "install the Intel graphics driver", "npu": "install the Intel NPU driver"}
# keeps the products between Q/DQ in fp32, which are then exact and slower; a property without a public name
FLOAT_PRODUCTS = {"LP_TRANSFORMS_MODE": "NO"}
_SATURATES = (
    "openvino computes the INT8 products in fp32: this CPU has no VNNI, and OpenVINO's INT8 sums saturate"
    " without it; --backend onnxruntime may be faster"
)
# Compiled products of the CPU that are kept, for prompts of all lengths: 64 are more than the layers of one
# length have. OpenVINO keeps 5000 of each kind by itself. A property without a public name.
_KEPT_PRODUCTS = {"CPU_RUNTIME_CACHE_CAPACITY": 64}
# about what a plugin's library takes; where it cannot be loaded for want of memory, not all errors say so
_PLUGIN_BYTES = 128 << 20
# what Linux says where a plugin of OpenVINO needs a library
_MISSING_LIBRARY = re.compile(r"(\S+): cannot open shared object file")


@dataclass(frozen=True)
class OpenVino(EngineKind):
    """The kind "openvino"."""

    name = "openvino"
    devices = tuple(_DEVICES)

    @classmethod
    def probe(cls, device: str, settings: Settings) -> OpenVino:
        """See `sana_edge.engines.engine.EngineKind.probe`."""
        runtime = _runtime()
        core, place = runtime.Core(), _DEVICES[device]
        hint = f"{_DRIVERS.get(device, 'install openvino again')}, or choose --device cpu"
        # of a GPU that is the only one, "GPU" and "GPU.0" are the same
        there = device == "cpu" or any(found.split(".")[0] == place for found in core.available_devices)
        try:
            processor = str(core.get_property(place, "FULL_DEVICE_NAME")).strip()
        except RuntimeError as error:
            free = available_memory()
            if is_memory(error) or (there and free is not None and free < _PLUGIN_BYTES):
                raise out_of_memory(f"openvino on {device}", error, needed=_PLUGIN_BYTES) from error
            raise UnsupportedDevice(_refusal(device, there, error), hint) from error
        if not there:
            raise UnsupportedDevice(f"openvino finds no {device}", hint)
        precision = _precision(core, device, settings)
        version = runtime.__version__.partition("-")[0]
        title = f"openvino {version} on {device} ({processor}), {precision}"
        if device == "cpu":
            title += f", {shown_threads(cpu_threads(settings.threads))}"
        return cls(device, precision, title, settings)

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> OpenVinoEngine:
        """See `sana_edge.engines.engine.EngineKind.load`."""
        engine_ports.check_file(path)
        runtime = _runtime()
        try:
            # not Core.read_model: that offers a damaged file to the readers of all other formats
            reader = runtime.frontend.FrontEndManager().load_by_framework("onnx")
            model = reader.convert(reader.load(str(path)))
        except Exception as error:
            raise engine_ports.load_failure(path, "openvino", error) from error
        ports = inputs or _ports(model.inputs), outputs or _ports(model.outputs)
        if self.precision != "fp32":
            _keep_phases(model)
        exact = self.device != "cpu" or not _is_int8(model) or sums_are_exact()
        engine = OpenVinoEngine(self, path, runtime.Core(), model, *ports, int8=exact)
        engine.compile()
        return engine


def _refusal(device: str, there: bool, error: Exception) -> str:
    """Why a device cannot be used, from what OpenVINO says when it is asked for the device's name."""
    library = _MISSING_LIBRARY.search(str(error))
    if library and device in _DRIVERS and "openvino" not in library[1]:
        return f"no Intel {device.upper()} driver ({library[1]} is missing)"
    if there:
        return f"openvino cannot use {device}: {engine_ports.said(error)}"
    # of what is not there it only says that it has no such property
    return f"openvino finds no {device}"


class OpenVinoEngine:
    """A graph in OpenVINO, compiled for each size that comes; see `sana_edge.engines.engine.Engine`."""

    name = "openvino"

    def __init__(
        self,
        kind: EngineKind,
        path: Path,
        core: openvino.Core,
        model: openvino.Model,
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        int8: bool = True,
    ) -> None:
        self.graph = path.stem
        self.device = kind.device
        self.precision = kind.precision
        self._path = path
        self._core: Any = core
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._config, self.notes = _config(kind)
        if not int8:
            self._config |= FLOAT_PRODUCTS
            self.notes = (*self.notes, _SATURATES)
        # of arrays that are not writeable, with what they are copies of
        self._copies: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        # by the lengths of the fixed sides
        self._requests: OrderedDict[tuple[tuple[str, int], ...], openvino.InferRequest] = OrderedDict()

    def compile(self) -> None:
        """Compile now what depends on no size, so that faults show while loading."""
        if not self._fixed():
            self._request({})

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """See `sana_edge.engines.engine.Engine.run`."""
        if self._core is None:
            raise SanaError(f"the engine of {self.graph} is closed", "load it again")
        sizes = engine_ports.check_inputs(self.graph, inputs, self._inputs)
        request = self._request(sizes)
        runtime = _runtime()
        try:
            # a request keeps no array alive whose memory it reads
            read = {name: self._readable(name, array) for name, array in inputs.items()}
            for name, array in read.items():
                request.set_tensor(name, runtime.Tensor(array, shared_memory=True))
            own = {}
            for name, (dtype, sides) in self._outputs.items():
                shape = engine_ports.known_shape(sides, sizes)
                if shape is not None:
                    own[name] = np.empty(shape, np.dtype(dtype))
                    request.set_tensor(name, runtime.Tensor(own[name], shared_memory=True))
            # not infer(): with one thread that returns without an error when memory does not suffice
            request.start_async()
            request.wait()
            rest = (name for name in self._outputs if name not in own)
            return own | {name: np.array(request.get_tensor(name).data) for name in rest}
        except Exception as error:
            raise engine_ports.run_failure(self.graph, self.name, sizes, error) from error

    def close(self) -> None:
        """See `sana_edge.engines.engine.Engine.close`."""
        self._core = None
        self._model = None
        self._requests.clear()
        self._copies.clear()

    def _readable(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """An array as OpenVINO takes it: contiguous and writeable, though it does not write."""
        if array.flags.writeable:
            return np.ascontiguousarray(array)
        given, copy = self._copies.get(name, (None, array))
        if given is not array:
            copy = np.array(array, order="C")
            self._copies[name] = array, copy
        return copy

    def _fixed(self) -> set[str]:
        """The names of the sides that are fixed before compiling; an NPU wants all of them."""
        names = {side for _, shape in self._inputs.values() for side in shape if isinstance(side, str)}
        return names - {ANY} if self.device == "npu" else names & set(_FIXED)

    def _request(self, sizes: Mapping[str, int]) -> openvino.InferRequest:
        """What runs the graph at a size; the one that was used longest ago gives way."""
        fixed = {name: sizes[name] for name in sorted(self._fixed())}
        key = tuple(fixed.items())
        if key in self._requests:
            self._requests.move_to_end(key)
            return self._requests[key]
        while len(self._requests) >= _KEPT_SIZES:
            self._requests.popitem(last=False)
        try:
            model = self._model
            if fixed:
                # compiling does not change a model, fixing its shapes does
                model = model.clone()
                model.reshape({name: _partial(shape, fixed) for name, (_, shape) in self._inputs.items()})
            compiled = self._core.compile_model(model, _DEVICES[self.device], self._config)
            self._requests[key] = compiled.create_infer_request()
        except RuntimeError as error:
            raise engine_ports.load_failure(self._path, self.name, error) from error
        return self._requests[key]


def _runtime() -> ModuleType:
    try:
        with silent_openvino():
            import openvino
            import openvino.frontend
    except ModuleNotFoundError as error:
        raise MissingDependency("openvino is not installed", "pip install 'sana-edge[openvino]'") from error
    except (ImportError, OSError) as error:
        hint = "install it again: pip install --force-reinstall openvino"
        raise MissingDependency(f"openvino does not load: {engine_ports.said(error)}", hint) from error
    version = tuple(int(part) for part in openvino.__version__.split("-")[0].split(".")[:2])
    if version < _OLDEST:
        least = ".".join(map(str, _OLDEST))
        raise MissingDependency(
            f"openvino {openvino.__version__} is too old, {least} is needed", "pip install --upgrade openvino"
        )
    module: ModuleType = openvino
    return module


def _precision(core: openvino.Core, device: str, settings: Settings) -> str:
    """What the device computes floats in.

    On a CPU bf16 where its hardware multiplies that, else fp32: fp16, OpenVINO's own choice on ARM, does not
    hold the sums of linear attention. GPUs get fp16 only of graphs exported for it; NPUs have nothing else.
    """
    capabilities = core.get_property(_DEVICES[device], "OPTIMIZATION_CAPABILITIES")
    if settings.precision == "auto":
        if device == "npu":
            return "fp16"
        if device == "gpu":
            return "fp16" if settings.dtype == "fp16" else "fp32"
        return "bf16" if "BF16" in capabilities else "fp32"
    known = {"fp32": "FP32", "bf16": "BF16", "fp16": "FP16"}
    if known[settings.precision] not in capabilities:
        able = [precision for precision, name in known.items() if name in capabilities]
        hint = f"choose dtype auto, {', '.join(able)}"
        raise InvalidInput(f"openvino cannot compute in {settings.precision} on this {device}", hint)
    return settings.precision


def _is_int8(model: openvino.Model) -> bool:
    return any(node.get_type_name() == "FakeQuantize" for node in model.get_ops())


@functools.cache
def sums_are_exact() -> bool:
    """Whether INT8 products keep their sums: a row of the largest values times itself.

    CPUs without VNNI add pairs of products of 8 bits in 16, where they saturate.
    """
    runtime, depth = _runtime(), 64
    core, ops = runtime.Core(), runtime.opset13
    x = ops.parameter([1, depth], np.float32)
    ends = [np.float32(end) for end in (-128, 127, -128, 127)]
    weight = ops.convert(ops.constant(np.full((depth, 1), 127, np.int8)), "f32")
    product = ops.matmul(ops.fake_quantize(x, *ends, 256), ops.multiply(weight, np.float32(1)), False, False)
    model = runtime.Model([product], [x])
    request = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    found = float(next(iter(request.infer([np.full((1, depth), 127, np.float32)]).values()))[0, 0])
    # all of it is an integer below 2^24
    return found == depth * 127 * 127


def _config(kind: EngineKind) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a graph is compiled with, and notes about what could not be had."""
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": _PRECISIONS[kind.precision],
    }
    cache = kind.settings.cache
    if kind.device == "cpu":
        config["NUM_STREAMS"] = "1"
        # else processes with fewer threads than cores are pinned to the same cores
        config["ENABLE_CPU_PINNING"] = False
        config |= _KEPT_PRODUCTS
        threads = cpu_threads(kind.settings.threads)
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
    elif cache is None:
        # compiling for a GPU or an NPU takes minutes; for a CPU 0.15 s a layer, of which a cache of the size
        # of the weights saves a third
        home = user_cache()
        cache = home / "openvino" if home else None
    if cache is None:
        return config, ()
    refused = _unwritable(cache)
    if refused:
        return config, (f"compiled graphs are not kept, {cache} cannot be written: {refused}",)
    return {**config, "CACHE_DIR": str(cache)}, ()


def _unwritable(folder: Path) -> str:
    """Why nothing can be written to a folder, made where it is missing; empty where something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def _keep_phases(model: openvino.Model) -> None:
    """Keep the timestep's phases in fp32.

    OpenVINO rounds all that leads to a product to the precision, the angle of sine and cosine too: up to 1000
    radians, to steps of 4 in bf16. What an output needs without a product in between it leaves alone, and so
    sines and cosines become outputs, which nobody reads.
    """
    waves = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    if waves:
        model.add_outputs([node.output(0) for node in waves])


def _ports(nodes: list[Any]) -> dict[str, Port]:
    """OpenVINO does not keep the names of sides."""
    return {
        node.get_any_name(): (
            np.dtype(node.get_element_type().to_dtype()).name,
            tuple(ANY if side.is_dynamic else side.get_length() for side in node.get_partial_shape()),
        )
        for node in nodes
    }


def _partial(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> list[int]:
    """-1 where a side stays open."""
    return [sizes.get(side, -1) if isinstance(side, str) else side for side in shape]
