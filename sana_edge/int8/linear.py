"""Linear layers, float and INT8, with one interface: an input is prepared once and multiplied in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sana_edge.errors import DamagedWeights, InvalidInput
from sana_edge.int8 import ops, quant

Observer = Callable[[Tensor], None]
Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Quantized:
    """Activations (..., C) as int8 ``values`` with fp32 ``scales`` (...,), and the dtype they had."""

    values: Tensor
    scales: Tensor
    dtype: torch.dtype


class Linear(nn.Linear):
    """nn.Linear; a weight of another dtype than the input's is cast when it is used.

    ``observer`` is called with every input (..., in).
    """

    observer: Observer | None = None

    def prepare(self, x: Tensor) -> Tensor:
        """What `rows` multiplies: x itself."""
        if self.observer is not None:
            self.observer(x)
        return x

    def rows(self, prepared: Tensor, start: int, stop: int) -> Tensor:
        """Output channels start to stop, those of the weight's rows: (..., stop - start)."""
        weight, bias = (_rows(tensor, start, stop) for tensor in (self.weight, self.bias))
        assert weight is not None
        dtype = prepared.dtype
        return ops.linear(prepared, weight.to(dtype), None if bias is None else bias.to(dtype))

    def columns(self, x: Tensor) -> ops.Columns:
        """`rows` of the prepared x."""
        return partial(self.rows, self.prepare(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.rows(self.prepare(x), 0, self.out_features)


class W8A8Linear(nn.Module):
    """INT8 weight and activations, sums in INT32, bias after the scales; the interface of `Linear`.

    In the state dict: ``weight`` int8 (out, in), ``weight_scale`` fp32 (out,), ``bias`` (out,) float if there
    is one, ``input_scale`` fp32 () if there is one. All keep their dtypes in `Module.to`.

    ``static``: activations have the one scale ``input_scale``, not one per token.
    """

    observer: Observer | None = None
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, input_scale: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.static = False
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("input_scale", torch.ones(()) if input_scale else None)

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, input_scale: Tensor | None = None, static: bool = False
    ) -> W8A8Linear:
        """Quantize a layer's weight.

        Raises:
            CheckpointError: the weight has NaN or infinite values; the caller names the layer.
            InvalidInput: static without an input scale.
        """
        layer = cls(linear.in_features, linear.out_features, bias=False)
        values, layer.weight_scale = quant.quantize_weight(linear.weight.detach())
        if not layer.weight_scale.isfinite().all():
            raise DamagedWeights("a weight to be quantized has NaN or infinite values")
        layer.weight = ops.hold_weight(values)
        layer.bias = None if linear.bias is None else linear.bias.detach()
        layer.input_scale = None if input_scale is None else input_scale.detach().float().to(values.device)
        layer.set_static(static)
        return layer

    def set_static(self, static: bool) -> None:
        """Choose between the calibrated scale and one per token.

        Raises:
            InvalidInput: there is no input scale.
        """
        if static and self.input_scale is None:
            raise InvalidInput("a static layer needs an input scale", "calibrate, or use scales per token")
        self.static = static

    def prepare(self, x: Tensor) -> Quantized:
        """Quantize x (..., in), once for all of the outputs."""
        if self.observer is not None:
            self.observer(x)
        if self.static and self.input_scale is not None:
            return Quantized(*ops.quantize_tensor(x, self.input_scale), x.dtype)
        return Quantized(*ops.quantize_rows(x), x.dtype)

    def rows(self, prepared: Quantized, start: int, stop: int) -> Tensor:
        """Output channels start to stop: (..., stop - start) in the dtype of what was prepared."""
        return ops.w8a8_linear(
            prepared.values,
            prepared.scales,
            self.weight[start:stop],
            self.weight_scale[start:stop],
            _rows(self.bias, start, stop),
            prepared.dtype,
        )

    def columns(self, x: Tensor) -> ops.Columns:
        """`rows` of the prepared x."""
        return partial(self.rows, self.prepare(x))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        return self.rows(self.prepare(x), 0, self.out_features)

    def extra_repr(self) -> str:
        """For print(model)."""
        mode = "tensor" if self.static else "token"
        return f"in_features={self.in_features}, out_features={self.out_features}, activations={mode}"

    def _apply(self, fn: Move, recurse: bool = True) -> W8A8Linear:
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        self.weight = ops.hold_weight(self.weight)
        return self

    def _load_from_state_dict(self, *args: object) -> None:
        super()._load_from_state_dict(*args)
        self.weight = ops.hold_weight(self.weight)


def keeping_dtype(fn: Move) -> Move:
    """What `Module._apply` does to a tensor, but for a change of its dtype."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def _rows(tensor: Tensor | None, start: int, stop: int) -> Tensor | None:
    # a slice of everything would cost the backward pass a copy
    return tensor if tensor is None or stop - start == len(tensor) else tensor[start:stop]
