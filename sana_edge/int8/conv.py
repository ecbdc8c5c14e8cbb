"""Convolutions of the DC-AE's decoder, float and INT8.

As in `layers`, an input is prepared, which an INT8 layer quantizes, and convolved; an ``observer`` is called
with every input as (..., channels). Maps are (B, C, H, W) in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.errors import CheckpointError
from sana_edge.int8 import ops, quant
from sana_edge.int8.feature_maps import nchw, nhwc
from sana_edge.int8.linear import Move, Observer, Quantized, keeping_dtype


class Conv2d(nn.Conv2d):
    """nn.Conv2d that calibration can listen to."""

    observer: Observer | None = None

    def prepare(self, x: Tensor) -> Tensor:
        """What `convolve` takes: x itself."""
        if self.observer is not None:
            self.observer(nhwc(x))
        return x

    def convolve(self, prepared: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out, H, W)."""
        if self.kernel_size == (1, 1) and not prepared.is_contiguous(memory_format=torch.channels_last):
            # half of the channels of a map, which a convolution would copy
            return nchw(F.linear(nhwc(prepared), self.weight.flatten(1), self.bias))
        return super().forward(prepared)

    def forward(self, x: Tensor) -> Tensor:
        """`convolve` of the prepared x."""
        return self.convolve(self.prepare(x))


class PhaseConv2d(Conv2d):
    """A 3x3 convolution of a map doubled by nearest-neighbour, computed from the map itself.

    Pairs of taps fall on the same sample, so each of the four output phases (even or odd row, even or odd
    column) is a 2x2 convolution of the small map: 16/36 of the products, and the doubled map is never made.
    """

    def kernels(self) -> list[Tensor]:
        """What `phases` multiplies with, to be made once for all strips of a map."""
        return phase_kernels(self.weight)

    def phases(self, x: Tensor, kernels: list[Tensor]) -> Iterator[Tensor]:
        """Yield the outputs at (even, even), (even, odd), (odd, even), (odd, odd) rows and columns."""
        prepared = self.prepare(x)
        for n, kernel in enumerate(kernels):
            yield _crop_phase(F.conv2d(prepared, kernel, self.bias, padding=1), n)


def phase_kernels(weight: Tensor) -> list[Tensor]:
    """The four kernels (out, in, 2, 2) of `PhaseConv2d`, of a weight (out, in, 3, 3)."""
    return [kernel for rows in _folded(weight, 2) for kernel in _folded(rows, 3)]


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """3 taps on doubled samples as 2 taps on the samples themselves: for even and for odd outputs."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


def _crop_phase(out: Tensor, n: int) -> Tensor:
    # output t of a padded 2x2 convolution covers samples t - 1 and t; odd phases want t and t + 1
    i, j = n // 2, n % 2
    return out[:, :, i : i + out.shape[2] - 1, j : j + out.shape[3] - 1]


class _Quantized(nn.Module):
    """The state of INT8 convolutions of stride 1, which keeps its dtypes in `Module.to`.

    In the state dict: ``weight`` int8 (out, in, k, k), ``weight_scale`` fp32 (out,), ``bias`` (out,) float if
    there is one, ``input_scale`` fp32 () if there is one; of phases, the first two begin with (4, out). In
    memory a weight is packed from its first use on, until the state dict is asked for.
    """

    observer: Observer | None = None
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], *, out_channels: int, bias: bool = True, input_scale: bool = False
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = shape[-3], out_channels
        self.register_buffer("weight", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(shape[:-3]))
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)
        self.register_buffer("input_scale", torch.ones(()) if input_scale else None)

    def unpack(self) -> None:
        """Bring the weight into its shape, and a memory order that everything can read."""
        weight = ops.unpack_conv2d(self.weight)
        self.weight = weight.view(*self.weight_scale.shape, *weight.shape[-3:])

    def _pack(self, padding: int) -> Tensor:
        # one assignment, so that threads may do it at the same time: (all channels, in, k, k)
        weight = self.weight
        self.weight = weight = ops.pack_conv2d(weight if weight.ndim == 4 else weight.flatten(0, 1), padding)
        return weight

    def _take(self, conv: nn.Conv2d, input_scale: Tensor | None) -> None:
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.input_scale = (
            None if input_scale is None else input_scale.detach().float().to(self.weight.device)
        )
        if not self.weight_scale.isfinite().all():
            raise CheckpointError("a weight to be quantized has NaN or infinite values")

    def _observe(self, x: Tensor) -> None:
        if self.observer is not None:
            self.observer(nhwc(x))

    def extra_repr(self) -> str:
        """For print(model)."""
        mode = "dynamic" if self.input_scale is None else "tensor"
        return f"{self.in_channels}, {self.out_channels}, activations={mode}"

    def _apply(self, fn: Move, recurse: bool = True) -> _Quantized:
        self.unpack()
        # torch knows channels-last memory of four dimensions only
        self.weight = self.weight.flatten(0, -4)
        super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        self.unpack()
        return self

    def _save_to_state_dict(self, *args: object) -> None:
        self.unpack()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: object) -> None:
        self.unpack()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, object]:
        # copies are made of this, and cannot be made of a packed weight
        self.unpack()
        return self.__dict__.copy()


class W8A8Conv2d(_Quantized):
    """`Conv2d` of odd kernels and their padding in INT8: one scale per output channel, one for the input.

    A 1x1 kernel is a linear layer: without a calibrated scale there is one per pixel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, size: int, *, bias: bool = True, input_scale: bool = False
    ) -> None:
        shape = (out_channels, in_channels, size, size)
        super().__init__(shape, out_channels=out_channels, bias=bias, input_scale=input_scale)
        self.padding = size // 2

    @classmethod
    def from_float(cls, conv: nn.Conv2d, *, input_scale: Tensor | None = None) -> W8A8Conv2d:
        """Quantize a layer's weight.

        Raises:
            CheckpointError: the weight has NaN or infinite values; the caller names the layer.
        """
        layer = cls(conv.in_channels, conv.out_channels, conv.kernel_size[0], bias=False)
        layer.weight, layer.weight_scale = quant.quantize_weight(conv.weight.detach())
        layer._take(conv, input_scale)
        return layer

    def prepare(self, x: Tensor) -> Quantized:
        """Quantize x; ``values`` are (B, in, H, W), ``scales`` (), or (B, H, W) for 1x1 kernels."""
        self._observe(x)
        if self.padding:
            return Quantized(*ops.quantize_map(x, self.input_scale), x.dtype)
        pixels, scale = nhwc(x), self.input_scale
        values, scales = ops.quantize_rows(pixels) if scale is None else ops.quantize_tensor(pixels, scale)
        return Quantized(nchw(values), scales, x.dtype)

    def convolve(self, prepared: Quantized) -> Tensor:
        """To (B, out, H, W) in the dtype of what was prepared."""
        values, scales, dtype = prepared.values, prepared.scales, prepared.dtype
        if self.padding:
            weight = self._pack(self.padding)
            return ops.w8a8_conv2d(values, scales, weight, self.weight_scale, self.bias, self.padding, dtype)
        weight = ops.hold_weight(self.weight.flatten(1))
        self.weight = weight[..., None, None]
        return nchw(ops.w8a8_linear(nhwc(values), scales, weight, self.weight_scale, self.bias, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """`convolve` of the prepared x."""
        return self.convolve(self.prepare(x))


class W8A8PhaseConv2d(_Quantized):
    """`PhaseConv2d` in INT8: the 2x2 kernels are quantized, a sum of INT8 taps would not fit INT8."""

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, input_scale: bool = False
    ) -> None:
        shape = (4, out_channels, in_channels, 2, 2)
        super().__init__(shape, out_channels=out_channels, bias=bias, input_scale=input_scale)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, *, input_scale: Tensor | None = None) -> W8A8PhaseConv2d:
        """`W8A8Conv2d.from_float` for the weight (out, in, 3, 3) of a `PhaseConv2d`."""
        layer = cls(conv.in_channels, conv.out_channels, bias=False)
        phases = [quant.quantize_weight(kernel) for kernel in phase_kernels(conv.weight.detach())]
        weights, scales = zip(*phases, strict=True)
        layer.weight, layer.weight_scale = torch.stack(weights), torch.stack(scales)
        layer._take(conv, input_scale)
        return layer

    def kernels(self) -> list[Tensor]:
        """What `phases` multiplies with: (4 out, in, 2, 2)."""
        return [self._pack(padding=1)]

    def phases(self, x: Tensor, kernels: list[Tensor]) -> Iterator[Tensor]:
        """Yield what `PhaseConv2d.phases` does."""
        self._observe(x)
        values, scale = ops.quantize_map(x, self.input_scale)
        bias = None if self.bias is None else self.bias.repeat(4)
        out = ops.w8a8_conv2d(values, scale, kernels[0], self.weight_scale.flatten(), bias, 1, x.dtype)
        for n, phase in enumerate(out.chunk(4, dim=1)):
            yield _crop_phase(phase, n)


def is_int8(network: nn.Module) -> bool:
    """Whether any of its convolutions is."""
    return any(isinstance(layer, _Quantized) for layer in network.modules())
