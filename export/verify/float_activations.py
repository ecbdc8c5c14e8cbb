"""INT8 networks without the rounding of activations: what is left has to agree as float networks do.

Where activations are rounded, the least difference grows to steps of INT8, in which a wrong weight hides.
With the weights as they are and activations as they come, a graph and its torch module differ by float
roundings.
"""

from __future__ import annotations

import onnx
from torch import Tensor, nn

from sana_edge.int8 import quant
from sana_edge.int8.conv import Conv2d, PhaseConv2d, W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.int8.linear import Linear, W8A8Linear


class _Phases(PhaseConv2d):
    """A `PhaseConv2d` of kernels (4, out, in, 2, 2) that are no sums of one weight's taps."""

    def __init__(self, kernels: Tensor, bias: Tensor | None) -> None:
        _, out, into, _, _ = kernels.shape
        super().__init__(into, out, 3, padding=1, bias=False, device="meta")
        self._kernels = list(kernels)
        _filled(self, self.weight, bias)

    def kernels(self) -> list[Tensor]:
        """What `phases` multiplies with."""
        return self._kernels


def let_activations_be(network: nn.Module) -> None:
    """Replace INT8 layers, in place, by float ones that have the values of their weights, in fp32."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, W8A8Linear):
            values = quant.dequantize_weight(layer.weight, layer.weight_scale)
            linear = Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            network.set_submodule(name, _filled(linear, values, layer.bias))
        elif isinstance(layer, W8A8Conv2d):
            layer.unpack()
            values = quant.dequantize_weight(layer.weight, layer.weight_scale)
            out, into, size, _ = values.shape
            conv = Conv2d(into, out, size, padding=layer.padding, bias=False, device="meta")
            network.set_submodule(name, _filled(conv, values, layer.bias))
        elif isinstance(layer, W8A8PhaseConv2d):
            layer.unpack()
            values = quant.dequantize_weight(layer.weight.flatten(0, 1), layer.weight_scale.flatten())
            network.set_submodule(name, _Phases(values.view(layer.weight.shape), layer.bias))


def remove_rounding(graph: onnx.GraphProto) -> None:
    """Take every QuantizeLinear and the DequantizeLinear behind it out of a graph; weights keep theirs."""
    quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    before = {
        node.output[0]: quantized[node.input[0]]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in quantized
    }
    kept = [node for node in graph.node if node.output[0] not in before and node.output[0] not in quantized]
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = before.get(name, name)
    del graph.node[:]
    graph.node.extend(kept)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    if bias is not None:
        layer.register_parameter("bias", nn.Parameter(bias.float(), requires_grad=False))
    return layer
