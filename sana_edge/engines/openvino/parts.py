"""Wide INT8 convolutions in parts, since OpenVINO's kernels are slower with more channels than a part has.

With AVX512-VNNI they multiply rows of up to 128 pixels, or up to 320 output channels of rows of any length,
near the CPU's peak, but more of both at little above half of it (OpenVINO 2026.4;
`benchmarks/bench_products.py`). Each output channel has its own weights, so that parts compute the same sums.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_edge.system.instructions import instructions

if TYPE_CHECKING:
    import openvino

WIDE, CHANNELS, PART = 128, 320, 256
"""A convolution over more pixels a row to more channels is computed in parts of at most so many."""
# what may lie between a weight and its constants
_DEQUANTIZATION = ("Constant", "Convert", "Multiply", "Reshape", "Subtract")
_ATTRIBUTES = ("strides", "pads_begin", "pads_end", "dilations", "auto_pad")


def parts_pay() -> bool:
    """Whether this CPU is of the kind that parts were measured on. AMX has kernels of its own."""
    known = instructions() or set()
    return "avx512_vnni" in known and "amx_int8" not in known


def part_wide_convolutions(model: openvino.Model) -> int:
    """Split those of a model whose shapes are known, in place. Returns how many were."""
    found = [node for node in model.get_ordered_ops() if _is_wide(node) and _is_int8(node.input_value(1))]
    for node in found:
        _split(node)
    return len(found)


def _is_wide(node: Any) -> bool:
    if node.get_type_name() != "Convolution":
        return False
    weights, shape = node.input(1).get_partial_shape(), node.output(0).get_partial_shape()
    if weights.is_dynamic or shape.is_dynamic:
        return False
    channels, _, *kernel = weights.to_shape()
    wide: bool = channels > CHANNELS and max(kernel) > 1 and shape.to_shape()[-1] > WIDE
    return wide


def _is_int8(weights: Any) -> bool:
    """Whether weights are INT8 constants; in float nothing was measured."""
    node = weights.get_node()
    while node.get_type_name() in _DEQUANTIZATION and node.get_input_size():
        node = node.input_value(0).get_node()
    return _is_constant(weights) and node.get_element_type().to_string() == "i8"


def _is_constant(value: Any) -> bool:
    """Whether a value is made of constants in the ways that `_rows` knows."""
    node = value.get_node()
    if node.get_type_name() not in _DEQUANTIZATION:
        return False
    return all(_is_constant(source) for source in node.input_values())


def _split(convolution: Any) -> None:
    """Put parts and their concatenation in the place of a convolution and the bias that is added to it."""
    from openvino import opset13 as ops

    data, weights = convolution.input_values()
    given = convolution.get_attributes()
    channels = weights.get_partial_shape().to_shape()[0]
    bias = _bias(convolution, channels)
    count = -(-channels // PART)
    ends = [channels * i // count for i in range(count + 1)]
    parts = []
    for first, last in itertools.pairwise(ends):
        own = _rows(weights, 0, first, last, channels)
        part = ops.convolution(data, own, *(given[name] for name in _ATTRIBUTES))
        part.set_friendly_name(f"{convolution.get_friendly_name()}/{first}")
        if bias is not None:
            part = ops.add(part, _rows(bias[1], 1, first, last, channels))
            part.set_friendly_name(f"{bias[0].get_friendly_name()}/{first}")
        parts.append(part)
    whole = ops.concat(parts, 1)
    replaced = convolution if bias is None else bias[0]
    whole.set_friendly_name(replaced.get_friendly_name())
    replaced.output(0).replace(whole.output(0))


def _bias(convolution: Any, channels: int) -> tuple[Any, Any] | None:
    """What adds a constant of each channel to a convolution, and the constant."""
    for target in convolution.output(0).get_target_inputs():
        node = target.get_node()
        if node.get_type_name() != "Add":
            continue
        for value in node.input_values():
            shape = value.get_partial_shape()
            if _is_constant(value) and shape.is_static and list(shape.to_shape()) == [1, channels, 1, 1]:
                return node, value
    return None


def _rows(value: Any, axis: int, first: int, last: int, channels: int) -> Any:
    """A value with the channels ``first`` to ``last`` of its constants; ``axis`` is where they lie in it."""
    from openvino import opset13 as ops

    node = value.get_node()
    sides = list(value.get_partial_shape().to_shape())
    if node.get_type_name() == "Constant":
        if len(sides) <= axis or sides[axis] != channels:
            return value
        chosen = [slice(None)] * axis + [slice(first, last)]
        return ops.constant(np.ascontiguousarray(node.data[tuple(chosen)])).output(0)
    inputs = node.input_values()
    if node.get_type_name() == "Reshape":
        # of a vector of the channels
        inner = _rows(inputs[0], 0, first, last, channels)
        sides[axis] = last - first
        return ops.reshape(inner, np.array(sides, np.int64), False).output(0)
    made = [_rows(each, axis, first, last, channels) for each in inputs]
    if node.get_type_name() == "Convert":
        return ops.convert(made[0], node.get_element_type()).output(0)
    return (ops.multiply if node.get_type_name() == "Multiply" else ops.subtract)(*made).output(0)
