"""Stand-ins for ``tensorrt`` and ``cuda.bindings.runtime``, held to the signatures of the real ones.

A name, a parameter or an attribute that is not in the table (`tensorrt_table.py`) fails as it would in the
real module; so does an argument of another kind. Behind that onnxruntime computes the ONNX file that an
"engine" was built from, on the host, whose memory is the device's here.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import inspect
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sana_edge.engines.ports import known_shape

TABLES = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())

_WHOLE = ("int", "SupportsInt")
_DTYPES = {"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}


class _Enum(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


class _Object:
    """Of the module's own objects, only attributes of the table can be set."""

    _members: dict[str, str]

    def __setattr__(self, key: str, value: Any) -> None:
        # a Python class that is derived from one may have what it likes
        if "_members" in vars(type(self)) and not key.startswith("_") and key not in self._members:
            raise AttributeError(f"{type(self).__name__} has no {key}")
        object.__setattr__(self, key, value)


def make_trt(table: dict[str, Any], cuda: Any) -> Any:
    """A module tensorrt of the version of ``table``; ``trt.state`` has what was done and what is to fail."""
    trt = SimpleNamespace(__version__=table["version"])
    trt.state = SimpleNamespace(
        pool={}, cleared=set(), created=[], profiles=[], timings=[], fails=set(),
        steps=5, on_step=lambda step: None, built=0, executions=0,
    )  # fmt: skip
    for name, members in table["enums"].items():
        setattr(trt, name.rpartition(".")[2], _Enum(name, members))
    for made in (*_building(trt), *_running(trt, cuda)):
        _hold_to(trt, made, table["classes"][made.__name__])
        setattr(trt, made.__name__, made)
    trt.nptype = lambda kind: {"FLOAT": np.float32, "INT64": np.int64}[kind.name]
    return trt


def _session(path: str) -> Any:
    return pytest.importorskip("onnxruntime").InferenceSession(path)


def _hold_to(trt: Any, made: Any, members: dict[str, str]) -> None:
    """Check every call of a class's methods against the table."""
    for name, found in list(vars(made).items()):
        if (name == "__init__" and name in members) or not name.startswith("_"):
            signature = members.get(name, "")
            assert signature or isinstance(found, type), f"{made.__name__}.{name} is not in the table"
            if signature.startswith("("):
                setattr(made, name, _checked(trt, f"{made.__name__}.{name}", signature, found))
    made._members = members


def _checked(trt: Any, name: str, signature: str, does: Any) -> Any:
    @functools.wraps(does)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        _bind(trt, name, signature, arguments, named)
        return does(self, *arguments, **named)

    return call


def _bind(trt: Any, name: str, overloads: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """One of the signatures must take the arguments."""
    for overload in overloads.split(" | "):
        text = overload.rpartition(") -> ")[0].removeprefix("(")
        parameters = re.findall(r"(\w+)(?:: ([\w.]+))?( = (?:<[^>]*>|[^,]*))?(?:, |$)", text)[1:]
        wanted = inspect.Signature(
            [
                inspect.Parameter(
                    key,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=None if given else inspect.Parameter.empty,
                )
                for key, _, given in parameters
            ]
        )
        kinds = {key: kind for key, kind, _ in parameters}
        try:
            bound = wanted.bind(*arguments, **named)
        except TypeError:
            continue
        if all(_is(trt, value, kinds[key]) for key, value in bound.arguments.items()):
            return
    raise TypeError(f"{name}{arguments}{named or ''} does not fit {overloads} of {trt.__version__}")


def _is(trt: Any, value: Any, kind: str) -> bool:
    if kind in _WHOLE:
        return isinstance(value, int | np.integer | _Enum)
    if kind in ("str", "bool", "tuple", "list"):
        return type(value).__name__ == kind
    if kind == "Dims":
        return isinstance(value, tuple | list) and all(type(side) is int for side in value)
    if kind in ("buffer", "Buffer"):
        return bool(memoryview(value).c_contiguous)
    expected = getattr(trt, kind, None)
    return expected is not None and isinstance(value, expected)


def _building(trt: Any) -> tuple[type, ...]:
    """The classes of a build."""
    state = trt.state

    class ILogger(_Object):
        Severity = trt.Severity

    class IProgressMonitor(_Object):
        pass

    class ITensor(_Object):
        def __init__(self, name: str) -> None:
            self.name = name

    class INetworkDefinition(_Object):
        _path, _inputs = "", ()

        @property
        def num_inputs(self) -> int:
            return len(self._inputs)

        def get_input(self, index: int) -> Any:
            return ITensor(self._inputs[index])

    class ParserError(_Object):
        def desc(self) -> str:
            return "unsupported"

        def node_name(self) -> str:
            return "/blocks.0/MatMul"

    class OnnxParser(_Object):
        num_errors = 0

        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, model: str) -> bool:
            try:
                ports = _session(model).get_inputs()
            except Exception:
                self.num_errors = 1
                return False
            self._network._path, self._network._inputs = model, [port.name for port in ports]
            return True

        def get_error(self, index: int) -> Any:
            return ParserError()

    class IOptimizationProfile(_Object):
        def __init__(self) -> None:
            self._shapes: dict[str, Any] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self._shapes[input] = [min, opt, max]

    class ITimingCache(_Object):
        def __init__(self, content: bytes) -> None:
            self._content = content

        def serialize(self) -> bytes:
            return self._content + b"+"

    class IBuilderConfig(_Object):
        progress_monitor: Any = None

        def add_optimization_profile(self, profile: Any) -> int:
            state.profiles.append(profile._shapes)
            return -1 if "profile" in state.fails else len(state.profiles) - 1

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            state.pool[pool.name] = pool_size

        def clear_flag(self, flag: Any) -> None:
            state.cleared.add(flag.name)

        def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
            content = bytes(serialized_timing_cache)
            return None if content == b"damaged" else ITimingCache(content)

        def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
            self._cache = cache
            state.timings.append(cache._content)
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return self._cache

    class Builder(_Object):
        def __init__(self, logger: Any) -> None:
            self._log = logger

        def create_network(self, flags: int = 0) -> Any:
            state.created.append(flags)
            return INetworkDefinition()

        def create_builder_config(self) -> Any:
            state.profiles.clear()
            return IBuilderConfig()

        def create_optimization_profile(self) -> Any:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            monitor = config.progress_monitor
            monitor.phase_start("Building", None, state.steps)
            for step in range(state.steps):
                state.on_step(step)
                if not monitor.step_complete("Building", step):
                    monitor.phase_finish("Building")
                    return None
            monitor.phase_finish("Building")
            if "build" in state.fails:
                self._log.log(trt.Severity.ERROR, "Error Code 10: no implementation\nmore")
                return None
            state.built += 1
            return json.dumps({"onnx": network._path, "profiles": state.profiles}).encode()

    return (
        *(Builder, INetworkDefinition, ITensor, OnnxParser, ParserError, IOptimizationProfile),
        *(IBuilderConfig, ITimingCache, ILogger, IProgressMonitor),
    )


def _running(trt: Any, cuda: Any) -> tuple[type, ...]:
    """The classes of an engine that runs."""
    state = trt.state

    class Runtime(_Object):
        def __init__(self, logger: Any) -> None:
            self._log = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            try:
                return ICudaEngine(json.loads(bytes(serialized_engine)))
            except ValueError:
                self._log.log(trt.Severity.ERROR, "Serialization assertion failed")
                return None

    class ICudaEngine(_Object):
        def __init__(self, content: dict[str, Any]) -> None:
            self._profiles = content["profiles"]
            self._session = _session(content["onnx"])
            self._inputs = {port.name: port for port in self._session.get_inputs()}
            self._outputs = {port.name: port for port in self._session.get_outputs()}
            self._ports = {**self._inputs, **self._outputs}

        @property
        def num_io_tensors(self) -> int:
            return len(self._ports)

        @property
        def num_optimization_profiles(self) -> int:
            return len(self._profiles)

        def get_tensor_name(self, index: int) -> str:
            return list(self._ports)[index]

        def get_tensor_dtype(self, name: str) -> Any:
            return trt.DataType[_DTYPES[self._ports[name].type]]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.OUTPUT if name in self._outputs else trt.TensorIOMode.INPUT

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any:
            return self._profiles[profile_index][name]

        def create_execution_context(self, strategy: Any) -> Any:
            return None if "context" in state.fails else IExecutionContext(self)

    class IExecutionContext(_Object):
        def __init__(self, engine: Any) -> None:
            self._engine, self._profile = engine, 0
            self._shapes: dict[str, Any] = {}
            self._addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            self._profile = profile_index
            return True

        def set_input_shape(self, name: str, shape: Any) -> bool:
            self._shapes[name] = shape
            return True

        def infer_shapes(self) -> list[str]:
            return []

        def get_tensor_shape(self, name: str) -> list[int]:
            if name in self._shapes:
                return list(self._shapes[name])
            sides: dict[str, int] = {}
            for key, port in self._engine._inputs.items():
                named = zip(port.shape, self._shapes[key], strict=True)
                sides |= {side: length for side, length in named if isinstance(side, str)}
            found = known_shape(tuple(self._engine._outputs[name].shape), sides)
            assert found is not None
            return list(found)

        def set_tensor_address(self, name: str, memory: int) -> bool:
            self._addresses[name] = memory
            return True

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine, arrays = self._engine, {}
            for name in engine._ports:
                shape, dtype = (
                    self.get_tensor_shape(name),
                    np.dtype(trt.nptype(engine.get_tensor_dtype(name))),
                )
                size = math.prod(shape) * dtype.itemsize
                memory = (ctypes.c_char * size).from_address(self._addresses[name])
                arrays[name] = np.frombuffer(memory, dtype).reshape(shape) if size else np.empty(shape, dtype)

            def compute() -> None:
                state.executions += 1
                feeds = {name: arrays[name] for name in engine._inputs}
                for name, found in zip(engine._outputs, engine._session.run(None, feeds), strict=True):
                    arrays[name][...] = found

            cuda.state.enqueue(stream_handle, compute)
            return "execute" not in state.fails

    return Runtime, ICudaEngine, IExecutionContext


def make_cuda() -> Any:
    """A module cuda.bindings.runtime; ``cuda.state`` has what is allocated and which calls are to fail."""
    cuda = SimpleNamespace(cudaStreamNonBlocking=1)
    for name, members in TABLES["cuda"]["enums"].items():
        setattr(cuda, name, _Enum(name, members))
    errors = cuda.cudaError_t
    # of streams and graphs, none twice
    numbers = itertools.count(7)
    state = cuda.state = SimpleNamespace(
        memory={},
        streams=set(),
        graphs={},
        capturing=None,
        fails={},
        launches=0,
        copies=[],
        waits=[],
        free=1 << 40,
    )

    def enqueue(stream: int, work: Any) -> None:
        assert int(stream) in state.streams
        if state.capturing is not None:
            state.capturing.append(work)
        else:
            work()

    state.enqueue = enqueue

    def malloc(size: int) -> Any:
        if size > state.free:
            return errors.cudaErrorMemoryAllocation, None
        block = ctypes.create_string_buffer(size)
        # fresh memory holds anything
        ctypes.memset(block, 0xFF, size)
        state.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def copy(target: int, source: int, count: int, kind: Any, stream: Any) -> None:
        state.copies.append((kind.name, count))
        enqueue(stream, lambda: ctypes.memmove(target, source, count))

    def create_stream(flags: int) -> int:
        number = next(numbers)
        state.streams.add(number)
        return number

    def begin(stream: Any, mode: Any) -> None:
        state.capturing = []

    def end(stream: Any) -> int:
        number = next(numbers)
        state.graphs[number], state.capturing = state.capturing, None
        return number

    def instantiate(graph: int, flags: int) -> int:
        number = next(numbers)
        state.graphs[number] = state.graphs[graph]
        return number

    def launch(graph: int, stream: Any) -> None:
        state.launches += 1
        for work in state.graphs[graph]:
            work()

    behaviour = {
        "cudaMalloc": malloc,
        "cudaFree": lambda pointer: state.memory.pop(pointer) and None,
        "cudaMemcpyAsync": copy,
        "cudaGetDevice": lambda: 0,
        "cudaGetDeviceProperties": lambda device: SimpleNamespace(
            name=b"NVIDIA GeForce RTX 4070 Laptop GPU\0\0", major=8, minor=9
        ),
        "cudaStreamCreateWithFlags": create_stream,
        "cudaStreamDestroy": lambda stream: state.streams.remove(stream),
        "cudaStreamSynchronize": lambda stream: state.waits.append(int(stream)),
        "cudaDriverGetVersion": lambda: 12090,
        "cudaStreamBeginCapture": begin,
        "cudaStreamEndCapture": end,
        "cudaGetLastError": lambda: None,
        "cudaGetErrorString": lambda error: error.name.encode(),
        "cudaGraphInstantiate": instantiate,
        "cudaGraphLaunch": launch,
        "cudaGraphDestroy": lambda graph: state.graphs.pop(graph) and None,
        "cudaGraphExecDestroy": lambda graph: state.graphs.pop(graph) and None,
    }
    for name, signature in TABLES["cuda"]["functions"].items():
        setattr(cuda, name, _cuda_function(cuda, name, signature, behaviour[name]))
    return cuda


def _cuda_function(cuda: Any, name: str, signature: str, does: Any) -> Any:
    parameters, results = (
        part.strip("()").split(", ") if part != "()" else [] for part in signature.split(" -> ")
    )

    def call(*arguments: Any) -> tuple[Any, ...]:
        if len(arguments) != len(parameters):
            raise TypeError(f"{name}() takes {parameters}, given were {arguments}")
        error = cuda.state.fails.get(name)
        if error is not None:
            return (cuda.cudaError_t[error], *(None for _ in results))
        result = does(*arguments)
        if isinstance(result, tuple):
            return result
        return (cuda.cudaError_t.cudaSuccess, *([result] if results or result is not None else []))

    return call
