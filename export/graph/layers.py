"""The denoiser's layers as nodes of a graph, on token-major values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sana_edge.errors import CheckpointError
from sana_edge.export.graph.builder import FLOAT, FLOAT16, SMALLEST, GraphBuilder, Value
from sana_edge.int8.linear import W8A8Linear
from sana_edge.nets.block import FP16_MAX

Layer = nn.Module

# of a token's values, for Clip wants a limit
_LARGEST = 3e38


def linear(g: GraphBuilder, name: str, layer: Layer, x: Value, factor: float = 1.0) -> Value:
    """A float or INT8 linear layer times a factor, x (B, N, in) to (B, N, out).

    Raises:
        CheckpointError: a static INT8 layer has no ``input_scale``.
    """
    if isinstance(layer, W8A8Linear) and not layer.static:
        return _linear_per_token(g, name, layer, x, factor)
    return columns(g, name, layer, prepare(g, name, layer, x), slice(None), factor)


def prepare(g: GraphBuilder, name: str, layer: Layer, x: Value) -> Value:
    """What `columns` multiplies: of an INT8 layer x through Q/DQ of its static scale, else x itself."""
    if not isinstance(layer, W8A8Linear):
        return x
    with g.scope(name):
        if layer.input_scale is None:
            raise CheckpointError(
                f"{g.path} has no input_scale, which a graph needs", "calibrate with sana-edge quantize"
            )
        return g.quantized(x, float(layer.input_scale))


def columns(
    g: GraphBuilder, name: str, layer: Layer, prepared: Value, part: slice, factor: float = 1.0
) -> Value:
    """Some output channels of a layer, times a factor: a product of the prepared input.

    An INT8 weight has DQ per output channel, which with Q/DQ of the input makes the product one of INT8. The
    factor goes into weight scales or weights.
    """
    with g.scope(name):
        bias = None if layer.bias is None else _tensor(layer.bias)[part].float() * factor
        return g.linear(prepared, _weight(g, layer, part, factor), bias)


def _linear_per_token(g: GraphBuilder, name: str, layer: W8A8Linear, x: Value, factor: float) -> Value:
    """An INT8 layer with one scale for each token, as a product of static ones: (x / t) weight · t + bias.

    t (B, N, 1) is a token's largest value · 128 / 127. x / t goes through Q/DQ of 1 / 128, which 16 bits hold
    exactly, and so its largest value is 127.
    """
    with g.scope(name):
        largest = g.op("ReduceMax", g.op("Abs", x), g.ints(-1), keepdims=1)
        # not 0, and of fp16 not infinite
        most = FP16_MAX if g.dtype == FLOAT16 else _LARGEST
        t = g.op("Clip", g.op("Mul", largest, 128 / 127), SMALLEST[g.dtype], most)
        normed = g.quantized(g.op("Div", x, t), 1 / 128)
        product = g.op("Mul", g.linear(normed, _weight(g, layer, slice(None), factor)), t)
        if layer.bias is None:
            return product
        return g.op("Add", product, g.weight("bias", _tensor(layer.bias).float() * factor))


def _weight(g: GraphBuilder, layer: Layer, part: slice, factor: float) -> Value:
    """(in, out) of some output channels, times a factor; an INT8 one through DQ."""
    kernel = _tensor(layer.weight)[part].t()
    if isinstance(layer, W8A8Linear):
        return g.int8_weight(kernel, layer.weight_scale[part] * factor, axis=1)
    return g.weight("weight", kernel if factor == 1 else kernel.float() * factor)


def silu(g: GraphBuilder, x: Value) -> Value:
    """x · sigmoid(x): the form that OpenVINO, TensorRT and onnxruntime know as one operation."""
    return g.op("Mul", x, g.op("Sigmoid", x), name="SiLU")


def norm_modulate(g: GraphBuilder, x: Value, scale: Value, shift: Value, eps: float) -> Value:
    """LayerNorm of x (B, N, C) · scale + shift, both (C,): LayerNormalization, fp32 inside."""
    return g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=eps, stash_type=1)


def rms_norm(g: GraphBuilder, name: str, x: Value, weight: Tensor, eps: float, factor: float = 1.0) -> Value:
    """x / sqrt(mean(x²) + eps) · weight · factor over the last dimension, fp32 inside; x's dtype out."""
    with g.scope(name):
        wide = g.cast(x, FLOAT)
        mean = g.op("ReduceMean", g.op("Pow", wide, 2.0), g.ints(-1), keepdims=1)
        normed = g.op("Div", wide, g.op("Sqrt", g.op("Add", mean, eps)))
        scaled = g.op("Mul", normed, g.weight("weight", weight.detach().float() * factor, FLOAT))
        return g.cast(scaled, x.dtype)


def heads(g: GraphBuilder, x: Value, count: int, width: int) -> Value:
    """(B, N, heads · d) to (B, heads, N, d)."""
    return g.transpose(g.reshape(x, 0, -1, count, width), 0, 2, 1, 3)


def merged(g: GraphBuilder, x: Value, width: int) -> Value:
    """(B, heads, N, d) to (B, N, heads · d)."""
    return g.reshape(g.transpose(x, 0, 2, 1, 3), 0, -1, width)


def relu_linear_attention(
    g: GraphBuilder, q: Value, k: Value, v: Value, count: int, width: int, eps: float = 1e-15
) -> Value:
    """ReLU linear attention of (B, N, C) values, fp32 inside: C = count heads · width; (B, N, C).

    The divisor has a product of its own: a column of ones in v costs engines a copy of v.
    """
    q, k, v = (heads(g, g.cast(x, FLOAT), count, width) for x in (g.op("Relu", q), g.op("Relu", k), v))
    # (B, heads, d, d) and (B, heads, d, 1)
    state = g.op("MatMul", g.transpose(k, 0, 1, 3, 2), v, name="state")
    total = g.transpose(g.op("ReduceSum", k, g.ints(2), keepdims=1), 0, 1, 3, 2)
    divisor = g.op("Add", g.op("MatMul", q, total, name="divisor"), eps)
    return merged(g, g.op("Div", g.op("MatMul", q, state, name="read"), divisor), count * width)


def cross_attention(g: GraphBuilder, q: Value, keys: Value, values: Value, mask: Value | None) -> Value:
    """Softmax attention of scaled q (B, heads, N, d) on keys (B, heads, d, L), values (B, heads, L, d)."""
    scores = g.op("MatMul", q, keys, name="scores")
    if mask is not None:
        scores = g.op("Add", scores, mask)
    return g.op("MatMul", g.op("Softmax", scores, axis=-1), values, name="read")


def silu_depthwise(g: GraphBuilder, x: Value, layer: nn.Conv2d, part: slice, grid: Value) -> Value:
    """SiLU and 3×3 depthwise convolution of tokens x (B, N, c), channels ``part`` of a layer; (B, c, H, W).

    Args:
        grid: int64 (4,), the shape (0, H, W, c) of x as a map; 0 keeps B.
    """
    # activated as tokens: engines append it to the product before
    activated = g.op("Reshape", silu(g, x), grid)
    with g.scope("depthwise"):
        kernel = _tensor(layer.weight)[part]
        weight, bias = g.weight("weight", kernel), g.weight("bias", _tensor(layer.bias)[part])
        image = g.transpose(activated, 0, 3, 1, 2)
        sides = [1, 1, 1, 1]
        return g.op("Conv", image, weight, bias, group=len(kernel), kernel_shape=[3, 3], pads=sides)


def _tensor(tensor: Tensor | nn.Module | None) -> Tensor:
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()
