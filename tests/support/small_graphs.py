"""Small ONNX files for the tests of engines: sound, damaged, and too large to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WIDTH = 8
_WEIGHT = np.random.default_rng(0).standard_normal((WIDTH, WIDTH)).astype(np.float32)


def expected(x: Any) -> Any:
    """What `product` computes."""
    return (x.astype(np.float64) @ _WEIGHT).astype(np.float32)


def product(
    path: Path, dtype: int = TensorProto.FLOAT, *, external: bool = False, op: str = "MatMul", opset: int = 21
) -> Path:
    """x (B, h, 8) float32 times a weight in a dtype, y (B, h, 8) float32; the weight in a file beside it."""
    weight = numpy_helper.from_array(_WEIGHT, "w")
    if dtype != TensorProto.FLOAT:
        weight = helper.make_tensor("w", dtype, _WEIGHT.shape, _WEIGHT.ravel().tolist())
    nodes = [
        helper.make_node("Cast", ["x"], ["x_cast"], to=dtype),
        helper.make_node(op, ["x_cast", "w"], ["y_cast"]),
        helper.make_node("Cast", ["y_cast"], ["y"], to=TensorProto.FLOAT),
    ]
    x, y = (helper.make_tensor_value_info(side, TensorProto.FLOAT, ["B", "h", WIDTH]) for side in "xy")
    save(path, nodes, [x], [y], [weight], external=external, opset=opset)
    return path


def largest_int8(path: Path, depth: int = 64) -> Path:
    """x (B, h, 64) float32 as INT8 times a column of 127: pairs of products are beyond 16 bits."""
    weight = numpy_helper.from_array(np.full((depth, 4), 127, np.int8), "w")
    scale, zero = (numpy_helper.from_array(np.array(n, t), k) for n, t, k in ((1, "f4", "s"), (0, "i1", "z")))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_int8"]),
        helper.make_node("DequantizeLinear", ["x_int8", "s", "z"], ["x_again"]),
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["w_again"]),
        helper.make_node("MatMul", ["x_again", "w_again"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "h", depth])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", "h", 4])
    save(path, nodes, [x], [y], [weight, scale, zero])
    return path


def huge(path: Path) -> Path:
    """The maximum of the sines of all products of column (n, 1) and row (1, n): n² numbers at once."""
    nodes = [
        helper.make_node("MatMul", ["column", "row"], ["products"]),
        helper.make_node("Sin", ["products"], ["waves"]),
        helper.make_node("ReduceMax", ["waves"], ["y"], keepdims=0),
    ]
    column = helper.make_tensor_value_info("column", TensorProto.FLOAT, ["n", 1])
    row = helper.make_tensor_value_info("row", TensorProto.FLOAT, [1, "n"])
    save(path, nodes, [column, row], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])], [])
    return path


def attention(path: Path, layers: int = 8, width: int = 64) -> Path:
    """Layers of softmax(q xᵀ) q with q = x w, of x (1, L, width) of any length L."""
    draw, nodes, weights, x = np.random.default_rng(0), [], [], "x"
    for i in range(layers):
        y = "y" if i == layers - 1 else f"x{i}"
        weights.append(
            numpy_helper.from_array(draw.standard_normal((width, width)).astype(np.float32) / 8, f"w{i}")
        )
        nodes += [
            helper.make_node("MatMul", [x, f"w{i}"], [f"q{i}"]),
            helper.make_node("Transpose", [x], [f"t{i}"], perm=[0, 2, 1]),
            helper.make_node("MatMul", [f"q{i}", f"t{i}"], [f"s{i}"]),
            helper.make_node("Softmax", [f"s{i}"], [f"p{i}"], axis=2),
            helper.make_node("MatMul", [f"p{i}", f"q{i}"], [y]),
        ]
        x = y
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "L", width]) for name in ("x", "y")]
    save(path, nodes, ports[:1], ports[1:], weights)
    return path


def phases(path: Path) -> Path:
    """sin(1.003 t) (1, 8) times a weight, for t (1,): what bf16 must not round before the sine."""
    steps = numpy_helper.from_array(np.linspace(0.5, 1.003, WIDTH, dtype=np.float32)[None], "steps")
    nodes = [
        helper.make_node("Mul", ["t", "steps"], ["angle"]),
        helper.make_node("Sin", ["angle"], ["wave"]),
        helper.make_node("MatMul", ["wave", "w"], ["y"]),
    ]
    t = helper.make_tensor_value_info("t", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, WIDTH])
    save(path, nodes, [t], [y], [steps, numpy_helper.from_array(_WEIGHT, "w")])
    return path


def expected_phases(t: float) -> Any:
    """What `phases` computes."""
    steps = np.linspace(0.5, 1.003, WIDTH, dtype=np.float32)[None]
    return np.sin(np.float32(t) * steps) @ _WEIGHT


def save(
    path: Path,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    weights: list[Any],
    *,
    external: bool = False,
    opset: int = 21,
) -> None:
    """Write a model."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    location = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=external, location=location, size_threshold=0)


def _cut(path: Path) -> Path:
    content = product(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def _overwritten(path: Path) -> Path:
    content = product(path).read_bytes()
    path.write_bytes(bytes(255 - byte for byte in content[:40]) + content[40:])
    return path


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _without_data(path: Path) -> Path:
    product(path, external=True).with_name(f"{path.name}.data").unlink()
    return path


def _short_data(path: Path) -> Path:
    data = product(path, external=True).with_name(f"{path.name}.data")
    data.write_bytes(data.read_bytes()[:10])
    return path


DAMAGED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda path: path, "cannot read"),
    "empty": (lambda path: _written(path, b""), "is empty"),
    "text": (lambda path: _written(path, b"not a graph\n" * 9), "cannot load"),
    "cut": (_cut, "cannot load"),
    "overwritten": (_overwritten, "cannot load"),
    "no data": (_without_data, "cannot load the weights"),
    "short data": (_short_data, "cannot load the weights"),
    "unknown operation": (lambda path: product(path, op="Frobnicate"), "does not know an operation"),
}
"""What cannot be loaded: how to make it at a path, and words of the error."""
