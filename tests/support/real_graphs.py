"""For `fake_tensorrt.py`: engines of real ONNX files, which onnxruntime computes in the stand-in's memory."""

from __future__ import annotations

import ctypes
import json
import math
from typing import Any

import numpy as np
import onnxruntime

from sana_edge.engines.ports import known_shape

_DTYPES = {"tensor(float)": (np.float32, "FLOAT"), "tensor(int64)": (np.int64, "INT64")}


def replaced(trt: Any, cuda: Any, behaviour: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What is to be other than in the stand-in, for its ``make_trt``."""

    def parse(parser: Any, path: str) -> bool:
        names = [port.name for port in onnxruntime.InferenceSession(path).get_inputs()]
        parser._network.__dict__.update(_inputs=names, _path=path)
        return True

    def build(builder: Any, network: Any, config: Any) -> Any:
        made = behaviour["Builder"]["build_serialized_network"](builder, network, config)
        return made and json.dumps({**json.loads(made), "onnx": network._path}).encode()

    def deserialize(runtime: Any, content: Any) -> Any:
        engine = behaviour["Runtime"]["deserialize_cuda_engine"](runtime, content)
        if engine is not None:
            session = onnxruntime.InferenceSession(engine._data["onnx"])
            inputs = {port.name: port for port in session.get_inputs()}
            outputs = {port.name: port for port in session.get_outputs()}
            engine.__dict__.update(_session=session, _inputs=inputs, _outputs=outputs)
            engine._names = [*inputs, *outputs]
        return engine

    def dtype(engine: Any, name: str) -> tuple[Any, str]:
        return _DTYPES[{**engine._inputs, **engine._outputs}[name].type]

    def mode(engine: Any, name: str) -> Any:
        return trt.TensorIOMode.OUTPUT if name in engine._outputs else trt.TensorIOMode.INPUT

    def create_context(engine: Any, strategy: Any) -> Any:
        context = behaviour["ICudaEngine"]["create_execution_context"](engine, strategy)
        if context is not None:
            context._engine = engine
        return context

    def shape(context: Any, name: str) -> list[int]:
        engine, given = context._engine, context._shapes
        if name in given:
            return list(given[name])
        sides: dict[str, int] = {}
        for key, port in engine._inputs.items():
            named = zip(port.shape, given[key], strict=True)
            sides |= {side: length for side, length in named if isinstance(side, str)}
        found = known_shape(tuple(engine._outputs[name].shape), sides)
        assert found is not None
        return list(found)

    def execute(context: Any, stream: int) -> bool:
        engine = context._engine
        arrays = {}
        for name in engine._names:
            sides, kind = shape(context, name), np.dtype(dtype(engine, name)[0])
            size = math.prod(sides) * kind.itemsize
            memory = (ctypes.c_char * size).from_address(context._addresses[name])
            arrays[name] = np.frombuffer(memory, kind).reshape(sides) if size else np.empty(sides, kind)

        def compute() -> None:
            trt.state.executions += 1
            feeds = {name: arrays[name] for name in engine._inputs}
            for name, found in zip(engine._outputs, engine._session.run(None, feeds), strict=True):
                arrays[name][...] = found

        cuda.state.enqueue(stream, compute)
        return True

    return {
        "OnnxParser": {"parse_from_file": parse},
        "Builder": {"build_serialized_network": build},
        "Runtime": {"deserialize_cuda_engine": deserialize},
        "ICudaEngine": {
            "get_tensor_dtype": lambda self, name: trt.DataType[dtype(self, name)[1]],
            "get_tensor_mode": mode,
            "create_execution_context": create_context,
        },
        "IExecutionContext": {"get_tensor_shape": shape, "execute_async_v3": execute},
    }
