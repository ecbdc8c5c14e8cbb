"""Static activation scales: where to cut off the tail of what calibration saw of a layer's input."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sana_edge.calib.statistics import LayerStatistics
from sana_edge.errors import InvalidInput
from sana_edge.int8 import quant

Method = Literal["mse", "percentile", "absmax"]

# scales tried, in octaves below absmax / 127: down to 2^-10, then around the best of these
_COARSE = [-step / 2 for step in range(21)]
_FINE = [step / 10 for step in range(-4, 5)]

# quarter octaves of sizes
_LEVELS = 48


def clip(
    statistics: LayerStatistics,
    *,
    weight: Tensor | None = None,
    method: Method = "mse",
    percentile: float = 99.99,
) -> float:
    """The scale of one step for a layer's whole input, over all denoising steps.

    "absmax" clips nothing. "percentile" clips at most 100 - ``percentile`` percent of the values of any
    step: it takes the largest of the steps' percentiles.

    "mse" minimises J(Δ) = Σ_t E_t(Δ) / P_t over the scales Δ, with E_t the squared error of step t's values
    and P_t their squares' sum, each channel's share multiplied by |W_j|², what the layer makes of it. The
    rounding errors e of a row are as good as independent, so that |W e|² / |W x|² is about E_t / P_t: the
    layer's relative error at step t. The sampler adds up what the denoiser says at each step, so an error of
    1 % costs as much early as late, whatever the size of the values there. A plain Σ_t E_t would be ruled by
    the steps with outliers, and leave the others few levels. Without |W_j|² it would cut channels off that
    are few and large and matter most, as after smoothing, or spare some that no output hears.

    A histogram says nothing of where values lie within a bin [a, b]: taken as uniform there, their error is
    (F(b) - F(a)) / (b - a), where F(x) = ∫ (x - q Δ)² dx = Δ³ (q / 12 + (x / Δ - q)³ / 3) from 0 to x, with
    q = min(round(x / Δ), 127): exact for bins narrower and wider than Δ, and beyond the clipping point.
    Nor does it know channels: the mean |W_j|² of values of a size comes from the samples.

    Args:
        weight: (out, in, ...) of the layer, for "mse"; None takes all |W_j|² as equal.

    Returns:
        A finite number above 0; 1 for a layer that only ever saw zeros.

    Raises:
        InvalidInput: unknown method, percentile not in (0, 100], or statistics that are not finite.
    """
    if method not in ("mse", "percentile", "absmax"):
        raise InvalidInput(f"unknown clipping method {method!r}", "choose mse, percentile or absmax")
    if not 0 < percentile <= 100:
        raise InvalidInput(f"percentile is {percentile}", "choose a number above 0, at most 100")
    absmax = statistics.absmax.max()
    if not math.isfinite(absmax) or not bool(statistics.limit.isfinite().all()):
        raise InvalidInput("calibration saw values that are not finite", "calibrate again in fp32")
    if method == "percentile":
        absmax = torch.minimum(absmax, _percentile(statistics, percentile / 100))
    largest = float(quant.scales(absmax))
    if method != "mse" or absmax == 0:
        return largest
    bins = _Bins(statistics, weight)
    octave = min(_COARSE, key=lambda octave: bins.error(largest * 2**octave))
    around = [octave + finer for finer in _FINE if octave + finer <= 0]
    scale = largest * 2 ** min(around, key=lambda octave: bins.error(largest * 2**octave))
    return float(quant.scales(torch.tensor(scale * quant.QMAX)))


def _percentile(statistics: LayerStatistics, share: float) -> Tensor:
    """The largest, over the steps, upper end of the bin that completes a step's ``share``: () fp32."""
    cumulated = statistics.histogram.double().cumsum(1)
    # (S,) first bin where it is reached
    reached = (cumulated >= share * cumulated[:, -1:]).int().argmax(1)
    upper = (reached + 1) * statistics.limit / cumulated.shape[1]
    return torch.where(cumulated[:, -1] > 0, upper, 0).max().float()


class _Bins:
    """The bins of all steps that hold something."""

    def __init__(self, statistics: LayerStatistics, weight: Tensor | None) -> None:
        counts = statistics.histogram.double()
        if weight is not None:
            counts = counts * _importance(statistics, weight)
        steps, bins = counts.nonzero(as_tuple=True)
        width = (statistics.limit.double() / counts.shape[1])[steps]
        self.low, self.high = bins * width, (bins + 1) * width
        energies = counts[steps, bins] * (self.low**2 + self.low * self.high + self.high**2) / 3
        of_step = energies.new_zeros(len(counts)).index_add_(0, steps, energies)[steps]
        # 1 / P_t, over the width; a step of zeros, whose limit may be 0, has no error either
        self.weight = torch.where(of_step > 0, counts[steps, bins] / (of_step * width), 0)

    def error(self, scale: float) -> float:
        """J of `clip`."""
        parts = _integral(self.high, scale).sub_(_integral(self.low, scale))
        return float(parts @ self.weight)


def _integral(x: Tensor, scale: float) -> Tensor:
    """F of `clip`."""
    steps = x / scale
    q = steps.round().clamp_max_(quant.QMAX)
    return steps.sub_(q).pow_(3).div_(3).add_(q, alpha=1 / 12).mul_(scale**3)


def _importance(statistics: LayerStatistics, weight: Tensor) -> Tensor:
    """Mean |W_j|² over the channels j that the values of a bin are in: (BINS,) fp64.

    Taken over quarter octaves below the limit, of all steps: single bins hold too few samples.
    """
    steps, bins = statistics.histogram.shape
    others = [dim for dim in range(weight.ndim) if dim != 1]
    energies = weight.detach().float().square().sum(others).double().cpu()
    # what a sample row stands for, and each channel's largest value once
    share = statistics.histogram.sum().double() / max(statistics.samples.numel(), 1)
    rows = torch.cat([statistics.samples.abs(), statistics.absmax])
    limits = torch.cat([statistics.limit[statistics.sample_steps], statistics.limit])
    counts = torch.cat([share.expand(len(statistics.samples)), share.new_ones(steps)])[:, None]
    levels = _level(rows / limits[:, None]).flatten()
    totals = torch.bincount(levels, counts.expand_as(rows).flatten(), _LEVELS)
    sums = torch.bincount(levels, (counts * energies).flatten(), _LEVELS)
    means = torch.where(totals > 0, sums / totals, energies.mean())
    return means[_level((torch.arange(bins) + 0.5) / bins)]


def _level(share: Tensor) -> Tensor:
    """Quarter octaves of values below their limit."""
    return (-4 * share.log2()).nan_to_num(_LEVELS).long().clamp_(0, _LEVELS - 1)
