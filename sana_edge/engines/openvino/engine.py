"""A graph in OpenVINO: how it is compiled for each size, and run."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines import ports as engine_ports
from sana_edge.engines.engine import EngineKind
from sana_edge.engines.openvino.parts import part_wide_convolutions, parts_pay
from sana_edge.engines.ports import ANY, Arrays
from sana_edge.errors import SanaError
from sana_edge.store.cache import user_cache
from sana_edge.store.manifest import Port
from sana_edge.system.threads import cpu_threads

if TYPE_CHECKING:
    import openvino

DEVICES = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
# Sides that a size in pixels fixes. Prompts' lengths stay open: they change from picture to picture.
_FIXED = ("B", "h", "w")
# compiled graphs that are kept, one for each size; each holds the weights in its own layout
_KEPT_SIZES = 2
# keeps the products between Q/DQ in fp32, which are then exact and slower; a property without a public name
FLOAT_PRODUCTS = {"LP_TRANSFORMS_MODE": "NO"}
_SATURATES = (
    "openvino computes the INT8 products in fp32: this CPU has no VNNI, and OpenVINO's INT8 sums saturate"
    " without it; --backend onnxruntime may be faster"
)
# Compiled products of the CPU that are kept, for prompts of all lengths: 64 are more than the layers of one
# length have. OpenVINO keeps 5000 of each kind by itself. A property without a public name.
_KEPT_PRODUCTS = {"CPU_RUNTIME_CACHE_CAPACITY": 64}


class OpenVinoEngine:
    """A graph in OpenVINO, compiled for each size that comes; see `sana_edge.engines.engine.Engine`."""

    name = "openvino"

    def __init__(
        self,
        kind: EngineKind,
        path: Path,
        library: ModuleType,
        model: openvino.Model,
        inputs: Mapping[str, Port],
        outputs: Mapping[str, Port],
        int8: bool = True,
    ) -> None:
        self.graph = path.stem
        self.device = kind.device
        self.precision = kind.precision
        self._path = path
        self._library = library
        self._core: Any = library.Core()
        self._model = model
        self._inputs = inputs
        self._outputs = outputs
        self._config, self.notes = _config(kind)
        self._parts = int8 and kind.device == "cpu" and parts_pay()
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
        try:
            # a request keeps no array alive whose memory it reads
            read = {name: self._readable(name, array) for name, array in inputs.items()}
            for name, array in read.items():
                request.set_tensor(name, self._library.Tensor(array, shared_memory=True))
            own = {}
            for name, (dtype, sides) in self._outputs.items():
                shape = engine_ports.known_shape(sides, sizes)
                if shape is not None:
                    own[name] = np.empty(shape, np.dtype(dtype))
                    request.set_tensor(name, self._library.Tensor(own[name], shared_memory=True))
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
                if self._parts:
                    part_wide_convolutions(model)
            compiled = self._core.compile_model(model, DEVICES[self.device], self._config)
            self._requests[key] = compiled.create_infer_request()
        except RuntimeError as error:
            raise engine_ports.load_failure(self._path, self.name, error) from error
        return self._requests[key]


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


def _partial(shape: tuple[int | str, ...], sizes: Mapping[str, int]) -> list[int]:
    """-1 where a side stays open."""
    return [sizes.get(side, -1) if isinstance(side, str) else side for side in shape]
