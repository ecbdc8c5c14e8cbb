"""Runs the graphs of an exported folder in onnxruntime on the CPU, one in memory at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from sana_edge.engines.onnxruntime import EXACT_SUMS
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.export.verify.float_activations import remove_rounding
from sana_edge.store.manifest import DAMAGED, Graph

Array = NDArray[Any]

# only fatal ones: what is worth knowing of an optimizer is known
_LOG_LEVEL = 4


class GraphRunner:
    """The graphs by name; the last one that ran stays open until another one runs.

    onnxruntime's CPU kernels know no bf16: a graph that computes in it runs in fp32, with the weights as they
    are stored.

    Args:
        graphs: those of the manifest.
        threads: of onnxruntime; 0 lets it choose.

    Attributes:
        rounded: False runs INT8 graphs without the rounding of activations, see `float_activations`.
    """

    def __init__(self, folder: Path, graphs: Mapping[str, Graph], threads: int = 0) -> None:
        self.rounded = True
        self._folder, self._graphs, self._threads = folder, graphs, threads
        self._name: tuple[str, bool] | None = None
        self._session: Any = None

    def __enter__(self) -> GraphRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def __contains__(self, name: str) -> bool:
        return name in self._graphs

    def sides(self, name: str, port: str) -> tuple[int | str, ...]:
        """The shape of an input as the graph has it, with names where any length will do."""
        found = {given.name: tuple(given.shape) for given in self._open(name).get_inputs()}
        if port not in found:
            raise self._broken(name, f"it has no input {port!r}")
        return found[port]

    def run(self, name: str, **inputs: Array) -> dict[str, Array]:
        """The outputs of a graph by name.

        Raises:
            CheckpointError: the file is missing or damaged, or does not take these inputs; names it.
        """
        session = self._open(name)
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(None, inputs), strict=True))
        # its errors have no base of their own; ValueError is for inputs that the graph does not have
        except Exception as error:
            raise self._broken(name, _one_line(error)) from error

    def _open(self, name: str) -> Any:
        if (name, self.rounded) == self._name and self._session is not None:
            return self._session
        if name not in self._graphs:
            raise InvalidInput(f"there is no graph {name!r}", f"there are {', '.join(self._graphs)}")
        # the other graph's weights leave the memory first
        self._session, self._name = None, (name, self.rounded)
        path = self._folder / self._graphs[name].file
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*EXACT_SUMS)
        options.log_severity_level = _LOG_LEVEL
        options.intra_op_num_threads = self._threads
        # without it the inputs of layers whose weights alone are INT8 become INT8 as well, in blocks
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            with _runnable(path, self.rounded) as runnable:
                self._session = onnxruntime.InferenceSession(
                    str(runnable), options, providers=["CPUExecutionProvider"]
                )
        except Exception as error:  # protobuf's, onnx's and onnxruntime's own, whatever the damage
            raise self._broken(name, _one_line(error)) from error
        return self._session

    def _broken(self, name: str, reason: str) -> CheckpointError:
        path = self._folder / self._graphs[name].file
        return CheckpointError(f"{path} cannot be run in onnxruntime: {reason}", DAMAGED)


@contextmanager
def _runnable(path: Path, rounded: bool) -> Iterator[Path]:
    """The graph itself, or what has to run in its place, in a folder that lasts as long as the block."""
    model = onnx.load(path, load_external_data=False)
    changed = not rounded and any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    widened = _has_bf16(model.graph)
    if not (changed or widened):
        yield path
        return
    onnx.load_external_data_for_model(model, str(path.parent))
    if changed:
        remove_rounding(model.graph)
    if widened:
        _widen(model.graph)
    with tempfile.TemporaryDirectory(prefix="sana-edge-") as folder:
        written = Path(folder) / path.name
        onnx.save(model, written, save_as_external_data=True, location="weights.data")
        del model
        yield written


def _widen(graph: onnx.GraphProto) -> None:
    """Let fp32 take the place of bf16."""
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT


def _has_bf16(graph: onnx.GraphProto) -> bool:
    stored = any(tensor.data_type == TensorProto.BFLOAT16 for tensor in graph.initializer)
    return stored or any(
        attribute.name == "to" and attribute.i == TensorProto.BFLOAT16
        for node in graph.node
        for attribute in node.attribute
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
