"""ONNX graphs built node by node, with readable names and typed values; nothing is traced.

A graph computes in fp32, fp16 or bf16; its inputs and outputs are float32 and int64 whatever it is. Weights
go to a file of external data, which graphs may share, one at a time: a model is never in memory twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from sana_edge import __version__
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.system import atomic

# opset, and version of the format. Opset 20 has Gelu, Q/DQ of 16 bit and all else that is used, and is the
# last that TensorRT 10.0 documents; convolutions of bf16 came with 22, in the ONNX that 10.6 is built with
_VERSIONS = {"fp32": (20, 9), "fp16": (20, 9), "bf16": (22, 10)}

FLOAT, FLOAT16, BFLOAT16 = int(TensorProto.FLOAT), int(TensorProto.FLOAT16), int(TensorProto.BFLOAT16)
INT8, INT64, BOOL = int(TensorProto.INT8), int(TensorProto.INT64), int(TensorProto.BOOL)
DTYPES = {"fp32": FLOAT, "fp16": FLOAT16, "bf16": BFLOAT16}

_TORCH = {
    FLOAT: torch.float32,
    FLOAT16: torch.float16,
    BFLOAT16: torch.bfloat16,
    INT8: torch.int8,
    INT64: torch.int64,
    BOOL: torch.bool,
}
_ONNX = {dtype: element for element, dtype in _TORCH.items()}
# tensors of fewer bytes stay in the graph, where shape inference reads them
_INLINE_BYTES = 1024
# scales are positive: of activations what has all of its digits, of weights what is not 0
SMALLEST = {FLOAT: 2.0**-126, FLOAT16: 2.0**-14, BFLOAT16: 2.0**-126}
_SMALLEST_OF_WEIGHTS = {FLOAT: 2.0**-126, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-126}

# a side's length, or the name of one that the caller chooses
Shape = Sequence[int | str]


@dataclass(frozen=True)
class Value:
    """What flows along an edge: its name and TensorProto data type."""

    name: str
    dtype: int


# a float is a constant of the first value's dtype, None an input that is left out
Operand = Value | float | None


class GraphBuilder:
    """Collects nodes, initializers, inputs and outputs of one graph.

    Args:
        name: of the graph.
        data: where large tensors go; open until the last graph that uses it is saved.
        dtype: what it computes in, "fp32", "fp16" or "bf16".
        int8_activations: whether INT8 layers read INT8; only their weights are otherwise.

    Attributes:
        dtype: the same as a TensorProto data type.
    """

    def __init__(
        self, name: str, data: ExternalData, dtype: str = "fp32", *, int8_activations: bool = True
    ) -> None:
        self.name = name
        self.int8_activations = int8_activations
        self.dtype = DTYPES[dtype]
        self._opset, self._ir_version = _VERSIONS[dtype]
        self._data = data
        self._path: list[str] = []
        self._names: dict[str, int] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[tuple[int, tuple[int, ...], bytes], Value] = {}

    @property
    def path(self) -> str:
        """The scopes that names are given in, ``blocks.0/qkv``."""
        return "/".join(self._path)

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names given inside begin with ``name/``; as in ``blocks.0/qkv/MatMul``."""
        self._path.append(name)
        yield
        self._path.pop()

    def input(self, name: str, shape: Shape, dtype: int = FLOAT) -> Value:
        """An input of the graph, float32 or int64; `cast` it before computing in another dtype."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        self._names[name] = 1
        return Value(name, dtype)

    def output(self, name: str, x: Value, shape: Shape) -> None:
        """An output of the graph; floats are cast to float32."""
        last = self.cast(x, FLOAT) if x.dtype in DTYPES.values() else x
        self._nodes.append(helper.make_node("Identity", [last.name], [name], name=f"{name}/Identity"))
        self._outputs.append(helper.make_tensor_value_info(name, last.dtype, list(shape)))

    def op(
        self,
        kind: str,
        *inputs: Operand,
        name: str | None = None,
        dtype: int | None = None,
        **attributes: Any,
    ) -> Value:
        """A node with one output.

        Args:
            name: of the node inside its scope, its kind if None; made unique.
            dtype: of the output, that of the first input if None.
        """
        return self.ops(kind, *inputs, outputs=1, name=name, dtype=dtype, **attributes)[0]

    def ops(
        self,
        kind: str,
        *inputs: Operand,
        outputs: int,
        name: str | None = None,
        dtype: int | None = None,
        **attributes: Any,
    ) -> tuple[Value, ...]:
        """`op` with any number of outputs."""
        first = next(x for x in inputs if isinstance(x, Value))
        operands = [self.constant(x, first.dtype) if isinstance(x, float | int) else x for x in inputs]
        node = self._unique(name or kind)
        names = [node] if outputs == 1 else [f"{node}:{index}" for index in range(outputs)]
        read = ["" if x is None else x.name for x in operands]
        self._nodes.append(helper.make_node(kind, read, names, name=node, **attributes))
        return tuple(Value(found, first.dtype if dtype is None else dtype) for found in names)

    def weight(self, name: str, tensor: Tensor, dtype: int | None = None) -> Value:
        """An initializer; floats are converted to ``dtype``, the graph's if None, others stay as they are."""
        element = self.dtype if dtype is None else dtype
        with torch.no_grad():
            tensor = tensor.detach().to("cpu", _TORCH[element] if tensor.is_floating_point() else None)
            tensor = tensor.contiguous()
        proto = TensorProto(name=self._unique(name), data_type=_ONNX[tensor.dtype], dims=tensor.shape)
        if tensor.nbytes < _INLINE_BYTES:
            proto.raw_data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        else:
            self._data.store(proto, tensor)
        self._initializers[proto.name] = proto
        return Value(proto.name, proto.data_type)

    def constant(self, values: float | Sequence[float], dtype: int | None = None) -> Value:
        """A small constant, () or (n,), of the graph's dtype if None; equal ones are one initializer."""
        tensor = torch.tensor(values, dtype=_TORCH[self.dtype if dtype is None else dtype])
        content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (_ONNX[tensor.dtype], tuple(tensor.shape), content)
        if key not in self._constants:
            path, self._path = self._path, []
            self._constants[key] = self.weight("constants/value", tensor, key[0])
            self._path = path
        return self._constants[key]

    def ints(self, *values: int) -> Value:
        """Axes, shapes and the like: (n,) int64."""
        return self.constant(values, INT64)

    def cast(self, x: Value, dtype: int | None = None) -> Value:
        """x in ``dtype``, the graph's if None; x itself where it is that already."""
        target = self.dtype if dtype is None else dtype
        return x if x.dtype == target else self.op("Cast", x, dtype=target, to=target)

    def model(self) -> onnx.ModelProto:
        """The model as it is now; large tensors are in the data file."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self._opset)],
            ir_version=self._ir_version,
            producer_name="sana-edge",
            producer_version=__version__,
        )

    def save(self, path: Path) -> None:
        """Write the model next to its data file.

        Raises:
            SanaError: the file cannot be written.
        """
        atomic.write_bytes(path, self.model().SerializeToString(deterministic=True))

    # shapes

    def reshape(self, x: Value, *shape: int | Value, name: str | None = None) -> Value:
        """Sides are numbers (0 keeps x's, -1 is what remains) or int64 values (1,), as `side` gives them."""
        return self.op("Reshape", x, self.join(*shape), name=name)

    def join(self, *shape: int | Value) -> Value:
        """A shape (n,) int64, of numbers and int64 values (1,); several nodes can share it."""
        if not any(isinstance(side, Value) for side in shape):
            return self.ints(*(side for side in shape if isinstance(side, int)))
        sides = [self.ints(side) if isinstance(side, int) else side for side in shape]
        return self.op("Concat", *sides, axis=0)

    def side(self, x: Value, axis: int) -> Value:
        """The length of x along an axis, int64 (1,)."""
        return self.op("Shape", x, dtype=INT64, start=axis, end=axis + 1)

    def transpose(self, x: Value, *order: int) -> Value:
        """x with its axes in another order."""
        return self.op("Transpose", x, perm=list(order))

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        """x from start to stop along an axis."""
        return self.op("Slice", x, self.ints(start), self.ints(stop), self.ints(axis))

    # products

    def linear(self, x: Value, weight: Value, bias: Tensor | None = None) -> Value:
        """x (..., in) times a `weight` (in, out) plus bias (out,), as MatMul and Add."""
        product = self.op("MatMul", x, weight)
        return product if bias is None else self.op("Add", product, self.weight("bias", bias))

    # INT8

    def quantized(self, x: Value, scale: float) -> Value:
        """x through QuantizeLinear and DequantizeLinear with one static scale: x again, in steps.

        All INT8 products of x read what this returns: call it once for x. Values beyond are -128 and 127.
        A 16-bit graph has the scale in 16 bit, on both sides.
        """
        step = self.constant(max(scale, SMALLEST[x.dtype]), x.dtype)
        zero = self.constant(0, INT8)
        values = self.op("QuantizeLinear", x, step, zero, dtype=INT8)
        return self.op("DequantizeLinear", values, step, zero, dtype=x.dtype)

    def int8_weight(self, values: Tensor, scales: Tensor, axis: int) -> Value:
        """An int8 initializer ``weight`` through DequantizeLinear, in the graph's dtype.

        Args:
            values: int8, laid out as the product reads it: (in, out) for MatMul, (out, in, kh, kw) for Conv.
            scales: (out,) fp32.
            axis: of ``values``, the output channels: 1 for MatMul, 0 for Conv.
        """
        weight = self.weight("weight", values)
        steps = self.weight("weight_scale", scales.clamp_min(_SMALLEST_OF_WEIGHTS[self.dtype]))
        zeros = self.weight("weight_zero", torch.zeros_like(scales, dtype=torch.int8))
        return self.op("DequantizeLinear", weight, steps, zeros, dtype=self.dtype, axis=axis)

    def _unique(self, name: str) -> str:
        full = "/".join([*self._path, name])
        count = self._names.get(full, 0)
        self._names[full] = count + 1
        return f"{full}_{count}" if count else full
