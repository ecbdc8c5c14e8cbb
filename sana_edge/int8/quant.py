"""The mathematics of INT8, the only place that has it: symmetric scales, rounding, smoothing, errors.

A scale is the value of one step, so that x is about q · scale with q from -127 to 127; -128 is not used,
which keeps the range symmetric and a product of two values within 127². Everything is computed in fp32.
Scheme: weights per output channel, activations per token, or per tensor with calibrated scales
(arXiv 2410.10629, section 4). Smoothing is SmoothQuant's (arXiv 2211.10438, equation 4).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

QMAX = 127

# of a weight that is quantized at a time
_PIECE_VALUES = 1 << 18

# below this a scale's reciprocal is not finite in fp32
_TINIEST = 2.0**-126


def scales(absmax: Tensor) -> Tensor:
    """absmax / 127 in fp32; 1 where absmax is 0 (or so small that its scale has no reciprocal).

    NaN and infinity stay: what is computed with such a scale shows it.
    """
    steps = absmax.float() / QMAX
    return torch.where(steps < _TINIEST, torch.ones_like(steps), steps)


def row_scales(x: Tensor) -> Tensor:
    """Dynamic scales of activations (..., C), one per token: (...,) fp32."""
    return scales(_absmax(x, x.ndim - 1))


def weight_scales(weight: Tensor) -> Tensor:
    """Scales of a weight (out, ...), one per output channel: (out,) fp32."""
    return scales(_absmax(weight.flatten(1), 1))


def tensor_scale(x: Tensor) -> Tensor:
    """One dynamic scale for all of x: () fp32."""
    return scales(_absmax(x.flatten(), 0))


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale rounded to the nearest integer, ties to even, clipped to ±127; int8.

    Args:
        x: any float dtype.
        scale: fp32, broadcasts to x. The reciprocal is taken first: x · (1 / scale), as kernels do.
    """
    return (x.float() * scale.reciprocal()).round_().clamp_(-QMAX, QMAX).to(torch.int8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (..., C) as int8 with one scale per token: values (..., C), scales (...,)."""
    rows = row_scales(x)
    return quantize(x, rows.unsqueeze(-1)), rows


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (out, ...) as int8 with one scale per output channel: values like weight, scales (out,)."""
    values = torch.empty_like(weight, dtype=torch.int8)
    columns = torch.empty(len(weight), device=weight.device)
    # in pieces whose temporaries stay in a CPU's cache
    step = max(_PIECE_VALUES * len(weight) // max(weight.numel(), 1), 1)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        columns[rows] = weight_scales(weight[rows])
        values[rows] = quantize(weight[rows], _per_channel(columns[rows], weight.ndim))
    return values, columns


def dequantize_weight(values: Tensor, columns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Undo `quantize_weight` up to rounding."""
    return (values.float() * _per_channel(columns, values.ndim)).to(dtype)


def smoothing(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Factors s (C,) that move outliers from activations to weights: x / s and W · s give the same product.

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), normalised to a geometric mean of 1 over the channels that
    are used; 1 for channels whose activations or weights are all zero.

    Args:
        inputs: (C,) absmax of each input channel.
        weights: (C,) absmax of the weight's column for each input channel.
        alpha: 0 leaves all outliers with the activations, 1 moves them all.
    """
    used = (inputs > 0) & (weights > 0) & inputs.isfinite() & weights.isfinite()
    logs = alpha * inputs.double().clamp_min(_TINIEST).log()
    logs -= (1 - alpha) * weights.double().clamp_min(_TINIEST).log()
    mean = logs[used].mean() if used.any() else logs.new_zeros(())
    return torch.where(used, (logs - mean).exp(), torch.ones_like(logs)).float()


def relative_error(output: Tensor, expected: Tensor) -> float:
    """|output - expected| / |expected| in L2; 0 if both are zero."""
    reference = float(expected.double().norm())
    difference = float((output.double() - expected.double()).norm())
    if reference == 0:
        return 0.0 if difference == 0 else math.inf
    return difference / reference


def sqnr(output: Tensor, expected: Tensor) -> float:
    """Signal to quantization noise ratio in dB: -20 log10 of `relative_error`."""
    error = relative_error(output, expected)
    return math.inf if error == 0 else -20 * math.log10(error)


def _absmax(x: Tensor, dim: int) -> Tensor:
    # two passes without a copy of x, and NaN stays NaN; aminmax along a dimension is 20 times slower
    return torch.maximum(x.amax(dim).float(), -x.amin(dim).float())


def _per_channel(columns: Tensor, ndim: int) -> Tensor:
    return columns.view(-1, *[1] * (ndim - 1))
