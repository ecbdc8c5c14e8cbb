"""What goes in and out of a graph, read from its file."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, ValueInfoProto

from sana_edge.store.manifest import Graph, Port

_NAMES = {int(TensorProto.FLOAT): "float32", int(TensorProto.INT64): "int64"}


def ports(path: Path) -> Graph:
    """The manifest's entry for a graph file; no weights are read."""
    graph = onnx.load(path, load_external_data=False).graph
    return Graph(
        file=path.name,
        inputs={value.name: _port(value) for value in graph.input},
        outputs={value.name: _port(value) for value in graph.output},
    )


def _port(value: ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    sides = [side.dim_param or side.dim_value for side in tensor.shape.dim]
    return _NAMES[tensor.elem_type], tuple(sides)
