"""Stand-ins for ``tensorrt`` and ``cuda.bindings.runtime``, made of the tables of what the real ones have.

A name, a parameter or an attribute that is not in the table fails as it would in the real module; so does an
argument of another kind. Behind that is one network: "latent" (B, C, h, w) and "scale" (1,) go in,
"velocity" = latent * scale comes out, computed on the host, whose memory is the device's here. An "ONNX file"
is the JSON list of its inputs, an "engine" JSON as well. `real_graphs.py` puts real graphs in its place.
"""

from __future__ import annotations

import ctypes
import enum
import inspect
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

TABLES = json.loads(Path(__file__).with_name("tensorrt_api.json").read_text())
CUDA_TABLE = json.loads(Path(__file__).with_name("cuda_api.json").read_text())

_WHOLE = ("int", "SupportsInt")


class _Enum(enum.Enum):
    def __int__(self) -> int:
        return int(self.value)


def make_trt(table: dict[str, Any], cuda: Any, replaced: Any = lambda trt, cuda, behaviour: {}) -> Any:
    """A module tensorrt of the version of ``table``; ``trt.state`` says what was done and what is to fail.

    ``replaced(trt, cuda, behaviour)`` gives what other methods are to do, by class and name.
    """
    trt = SimpleNamespace(__version__=table["version"])
    trt.state = SimpleNamespace(
        shapes=[], pool={}, flags=set(), cleared=set(), created=[], steps=5, built=0, executions=0,
        timings=[], fails=set(), on_step=lambda step: None, allowed_host_code=False, profiles=[],
    )  # fmt: skip
    for name, members in table["enums"].items():
        if "." not in name:
            setattr(trt, name, _Enum(name, members))
    behaviour = _behaviour(trt, cuda)
    changed = replaced(trt, cuda, behaviour)
    for name, members in table["classes"].items():
        does = {**behaviour.get(name, {}), **changed.get(name, {})}
        setattr(trt, name, _strict(trt, name, members, does))
    trt.ILogger.Severity = _Enum("Severity", table["enums"]["ILogger.Severity"])
    trt.nptype = lambda kind: {"FLOAT": np.float32, "INT64": np.int64}[kind.name]
    return trt


def _strict(trt: Any, name: str, members: dict[str, str], behaviour: dict[str, Any]) -> type:
    def method(member: str, overloads: str) -> Any:
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            _bind(trt, f"{name}.{member}", overloads, arguments, named)
            if member != "__init__" and member not in behaviour:
                raise NotImplementedError(f"{name}.{member} has no stand-in")
            return behaviour.get(member, lambda self, *given: None)(self, *arguments, **named)

        return call

    def attribute(member: str, access: str) -> property:
        def read(self: Any) -> Any:
            found = behaviour.get(member)
            return found(self) if found else self.__dict__[f"_{member}"]

        def write(self: Any, value: Any) -> None:
            self.__dict__[f"_{member}"] = value

        return property(read, write if "write" in access else None)

    def set_attribute(self: Any, key: str, value: Any) -> None:
        # a Python class that is derived from one may have what it likes
        if type(self) is made and not key.startswith("_") and key not in members:
            raise AttributeError(f"{name} has no {key}")
        object.__setattr__(self, key, value)

    namespace: dict[str, Any] = {"__setattr__": set_attribute}
    for member, value in members.items():
        is_method = value.startswith("(")
        namespace[member] = method(member, value) if is_method else attribute(member, value)
    for member in behaviour:
        assert member in members, f"{name}.{member} is not in the table of {trt.__version__}"
    made = type(name, (), namespace)
    return made


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


def _behaviour(trt: Any, cuda: Any) -> dict[str, dict[str, Any]]:
    """What methods do, by class and name; properties get the object."""
    state = trt.state

    def make(name: str, **facts: Any) -> Any:
        made = object.__new__(getattr(trt, name))
        made.__dict__.update(facts)
        return made

    def fail(what: str, log: Any, message: str) -> bool:
        if what in state.fails:
            log.log(trt.ILogger.Severity.ERROR, message + "\nmore")
        return what in state.fails

    def parse(parser: Any, path: str) -> bool:
        try:
            parser._network._inputs = json.loads(Path(path).read_text())
            return True
        except ValueError:
            parser._errors = [make("ParserError")]
            return False

    def add_profile(config: Any, profile: Any) -> int:
        if "profile" in state.fails:
            return -1
        state.profiles.append(profile._shapes)
        return len(state.profiles) - 1

    def set_shape(profile: Any, *given: Any) -> None:
        name, *shapes = given
        profile.__dict__.setdefault("_shapes", {})[name] = shapes

    def build(builder: Any, network: Any, config: Any) -> Any:
        monitor = config.__dict__["_progress_monitor"]
        monitor.phase_start("Building", None, state.steps)
        for step in range(state.steps):
            state.on_step(step)
            if not monitor.step_complete("Building", step):
                monitor.phase_finish("Building")
                return None
        monitor.phase_finish("Building")
        if fail("build", builder._log, "Error Code 10: no implementation"):
            return None
        state.built += 1
        return json.dumps({"inputs": network._inputs, "profiles": state.profiles}).encode()

    def deserialize(runtime: Any, content: Any) -> Any:
        try:
            data = json.loads(bytes(content))
        except ValueError:
            runtime._log.log(trt.ILogger.Severity.ERROR, "Serialization assertion failed")
            return None
        return make("ICudaEngine", _data=data, _names=[*data["inputs"], "velocity"])

    def execute(context: Any, stream: int) -> bool:
        addresses, latent = context._addresses, context._shapes["latent"]
        if context.__dict__.get("_fails"):
            return False

        def compute() -> None:
            state.executions += 1
            count = int(np.prod(latent))
            x, scale, y = (
                np.frombuffer((ctypes.c_float * size).from_address(addresses[name]), np.float32)
                for name, size in (("latent", count), ("scale", 1), ("velocity", count))
            )
            y[:] = x * scale

        cuda.state.enqueue(stream, compute)
        return True

    def note(context: Any, where: str, key: str, value: Any) -> bool:
        context.__dict__.setdefault(where, {})[key] = value
        return True

    def timing(config: Any, content: Any) -> Any:
        return None if bytes(content) == b"damaged" else make("ITimingCache", _content=bytes(content))

    def set_timing(config: Any, cache: Any, ignore: bool) -> bool:
        config._cache = cache
        state.timings.append(cache._content)
        return not ignore

    def is_output(engine: Any, name: str) -> Any:
        return trt.TensorIOMode.OUTPUT if name == "velocity" else trt.TensorIOMode.INPUT

    def keep_log(self: Any, *given: Any) -> None:
        self._log = given[-1]

    return {
        "Builder": {
            "__init__": keep_log,
            "create_network": lambda self, flags=0: state.created.append(flags) or make("INetworkDefinition"),
            "create_builder_config": lambda self: state.profiles.clear() or make("IBuilderConfig"),
            "create_optimization_profile": lambda self: make("IOptimizationProfile"),
            "build_serialized_network": build,
        },
        "INetworkDefinition": {
            "num_inputs": lambda self: len(self._inputs),
            "get_input": lambda self, index: make("ITensor", _name=self._inputs[index]),
        },
        "OnnxParser": {
            "__init__": lambda self, network, log: self.__dict__.update(
                _network=network, _log=log, _errors=[]
            ),
            "parse_from_file": parse,
            "num_errors": lambda self: len(self._errors),
            "get_error": lambda self, index: self._errors[index],
        },
        "ParserError": {"desc": lambda self: "unsupported", "node_name": lambda self: "/blocks.0/MatMul"},
        "IOptimizationProfile": {"set_shape": set_shape},
        "IBuilderConfig": {
            "add_optimization_profile": add_profile,
            "set_memory_pool_limit": lambda self, pool, size: state.pool.update({pool.name: size}),
            "set_flag": lambda self, flag: state.flags.add(flag.name),
            "clear_flag": lambda self, flag: state.cleared.add(flag.name),
            "create_timing_cache": timing,
            "set_timing_cache": set_timing,
            "get_timing_cache": lambda self: self._cache,
        },
        "ITimingCache": {"serialize": lambda self: self._content + b"+"},
        "Runtime": {"__init__": keep_log, "deserialize_cuda_engine": deserialize},
        "ICudaEngine": {
            "num_io_tensors": lambda self: len(self._names),
            "get_tensor_name": lambda self, index: self._names[index],
            "get_tensor_dtype": lambda self, name: trt.DataType.FLOAT,
            "get_tensor_mode": is_output,
            "num_optimization_profiles": lambda self: len(self._data["profiles"]),
            "get_tensor_profile_shape": lambda self, name, index: self._data["profiles"][index][name],
            "create_execution_context": lambda self, strategy: (
                None if "context" in state.fails else make("IExecutionContext", _strategy=strategy)
            ),
        },
        "IExecutionContext": {
            "set_optimization_profile_async": lambda self, index, stream: note(
                self, "_set", "profile", index
            ),
            "set_input_shape": lambda self, name, shape: note(self, "_shapes", name, shape),
            "infer_shapes": lambda self: ["scale"] if "infer" in state.fails else [],
            "get_tensor_shape": lambda self, name: list(self._shapes["latent"]),
            "set_tensor_address": lambda self, name, address: note(self, "_addresses", name, address),
            "execute_async_v3": execute,
        },
        "ILogger": {},
        "IProgressMonitor": {},
        "ITensor": {},
        "IHostMemory": {},
    }


def make_cuda() -> Any:
    """A module cuda.bindings.runtime; ``cuda.state`` has what is allocated and which calls are to fail."""
    cuda = SimpleNamespace(cudaStreamNonBlocking=1)
    for name, members in CUDA_TABLE["enums"].items():
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
    for name, facts in CUDA_TABLE["functions"].items():
        setattr(cuda, name, _cuda_function(cuda, name, facts, behaviour[name]))
    return cuda


def _cuda_function(cuda: Any, name: str, facts: dict[str, Any], does: Any) -> Any:
    def call(*arguments: Any) -> tuple[Any, ...]:
        if len(arguments) != len(facts["parameters"]):
            raise TypeError(f"{name}() takes {facts['parameters']}, given were {arguments}")
        error = cuda.state.fails.get(name)
        if error is not None:
            return (cuda.cudaError_t[error], *(None for _ in facts["results"]))
        result = does(*arguments)
        if isinstance(result, tuple):
            return result
        return (cuda.cudaError_t.cudaSuccess, *([result] if facts["results"] or result is not None else []))

    return call
