"""The INT8 products of a graph in OpenVINO, timed one by one where they run, and the peak beside them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sana_edge.engines.engine import Engine
from sana_edge.engines.openvino.engine import OpenVinoEngine
from sana_edge.errors import SanaError

PRODUCTS = ("FullyConnected", "Convolution")
INT8 = ("i8", "u8")


@dataclass(frozen=True)
class Product:
    """One product: name, kind and precision as OpenVINO has them, shape of its output, multiply-adds."""

    name: str
    kind: str
    precision: str
    shape: tuple[int, ...]
    multiply_adds: int

    @property
    def operations(self) -> int:
        """A multiplication and an addition each."""
        return 2 * self.multiply_adds


def profiled(engine: Engine) -> OpenVinoEngine:
    """The engine, before its first run, told to time each of its operations."""
    assert isinstance(engine, OpenVinoEngine)
    engine._config["PERF_COUNT"] = True
    return engine


def products(engine: OpenVinoEngine) -> list[Product]:
    """Those of the graph as it was compiled for the last run.

    Raises:
        SanaError: the graph has none in INT8.
    """
    nodes = request_of(engine).get_compiled_model().get_runtime_model().get_ordered_ops()
    found = [_product(node) for node in nodes if _told(node, "layerType").startswith(PRODUCTS)]
    if not any(product.precision in INT8 for product in found):
        raise SanaError("no product of this graph runs in INT8 here", "`sana-edge doctor` says why")
    return found


class Timer:
    """Seconds of each operation in one run after the other; OpenVINO tells the mean of all runs so far."""

    def __init__(self) -> None:
        self._runs = 0
        self._before: dict[str, float] = {}

    def last(self, request: Any) -> dict[str, float]:
        """Of the run of a request that has just ended, by an operation's name; to be asked after each."""
        self._runs += 1
        means = {info.node_name: info.real_time.total_seconds() for info in request.profiling_info}
        totals = {name: mean * self._runs for name, mean in means.items()}
        found = {name: max(total - self._before.get(name, 0.0), 0.0) for name, total in totals.items()}
        self._before = totals
        return found


def request_of(engine: OpenVinoEngine) -> Any:
    """The request of the engine's last run."""
    return next(reversed(engine._requests.values()))


def _told(node: Any, name: str) -> str:
    return str(node.get_rt_info()[name].astype(str))


def _product(node: Any) -> Product:
    """Weights are (out, in...), or (groups, out, in...) where a convolution has groups."""
    kind = _told(node, "layerType")
    second = tuple(node.input(1).get_partial_shape().to_shape())
    shape = tuple(node.output(0).get_partial_shape().to_shape())
    depth = math.prod(second[-(len(shape) - 1) :]) if kind == "Convolution" else second[-1]
    name, precision = node.get_friendly_name(), _told(node, "runtimePrecision")
    return Product(name, kind, precision, shape, math.prod(shape) * depth)


def torch_peak(side: int) -> Callable[[], float]:
    """A product of two square INT8 matrices by torch: returns its seconds."""
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
    other = b.t()

    def call() -> float:
        start = time.perf_counter()
        torch._int_mm(a, other)
        return time.perf_counter() - start

    return call


def openvino_peak(side: int, threads: int) -> Callable[[], float]:
    """The same by OpenVINO: returns the seconds of the product alone, without rounding its input."""
    import openvino
    from openvino import opset13 as ops

    x = ops.parameter([side, side], np.float32)
    ends = [np.float32(end) for end in (-128, 127, -128, 127)]
    rng = np.random.default_rng(0)
    levels = rng.integers(-127, 128, (side, side), dtype=np.int8)
    weight = ops.multiply(ops.convert(ops.constant(levels), "f32"), np.float32(1))
    product = ops.matmul(ops.fake_quantize(x, *ends, 256), weight, False, True)
    config = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "ENABLE_CPU_PINNING": False}
    config |= {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True}
    model = openvino.Model([product], [x])
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    given = rng.integers(-127, 128, (side, side)).astype(np.float32)
    request.infer([given])
    timer = Timer()
    timer.last(request)
    told = (i for i in request.profiling_info if i.node_type.startswith(PRODUCTS) and "i8" in i.exec_type)
    name = next(told).node_name

    def call() -> float:
        request.infer([given])
        return timer.last(request)[name]

    return call
