"""Static scales from histograms, against the same choice made on the values themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sana_edge.calib.clip import clip
from sana_edge.calib.statistics import BINS, LayerStatistics
from sana_edge.errors import InvalidInput
from sana_edge.int8 import quant


def seen(*steps: Tensor) -> LayerStatistics:
    """Statistics of steps' inputs (N, C)."""
    statistics = LayerStatistics.empty(len(steps), steps[0].shape[1])
    for step, x in enumerate(steps):
        statistics.update(step, x)
    return statistics


def relative_errors(steps: tuple[Tensor, ...], scale: float) -> list[float]:
    """E_t / P_t of each step, from the values."""
    scales = torch.tensor(scale)
    return [quant.relative_error(quant.quantize(x, scales) * scales, x) ** 2 for x in steps]


def best_error(steps: tuple[Tensor, ...]) -> float:
    """The smallest sum of relative errors, searched on the values in steps of 2 %."""
    largest = max(float(x.abs().max()) for x in steps) / quant.QMAX
    return min(sum(relative_errors(steps, largest * 0.98**n)) for n in range(250))


@pytest.mark.parametrize("shape", ["uniform", "normal", "heavy", "rare outlier", "other sizes"])
def test_mse_is_as_good_as_a_search_on_the_values(shape: str) -> None:
    """Bins are up to a quarter of the best scale wide here, and octaves are searched to a tenth.

    Near its minimum, J / J_min is about 1 + (Δ / Δ_best - 1)² times a curvature of at most 4, for 2^0.05 - 1
    = 3.5 % that is 0.5 %; the uniform density within bins costs as little: 2 % in all.
    """
    x = torch.randn(2, 4000, 8)
    steps: dict[str, tuple[Tensor, ...]] = {
        "uniform": tuple(torch.rand(2, 4000, 8)),
        "normal": tuple(x),
        "heavy": tuple(x**3),
        "rare outlier": (x[0], torch.cat([x[1], torch.full((1, 8), 100.0)])),
        "other sizes": (x[0] * 30, x[1]),
    }
    values = steps[shape]
    error = sum(relative_errors(values, clip(seen(*values))))
    assert error <= 1.02 * best_error(values)


def test_the_integral_of_a_bin_is_the_mean_of_its_values() -> None:
    """Bins 100 times wider than the scale, and beyond where it clips; 10^5 values know J to 1 %."""
    x = torch.rand(100_000, 1)
    statistics = LayerStatistics(
        absmax=torch.ones(1, 1),
        histogram=torch.zeros(1, BINS, dtype=torch.int64),
        limit=torch.tensor([float(BINS)]),
        samples=x,
        sample_steps=torch.zeros(len(x), dtype=torch.int64),
    )
    # uniform between 0 and 1, all in the first bin
    statistics.histogram[0, 0] = len(x)
    error = sum(relative_errors((x,), clip(statistics)))
    assert error == pytest.approx(best_error((x,)), rel=0.02)


def test_steps_with_small_values_are_not_drowned() -> None:
    """Late steps are 1 % of the first one's size: a scale for the sum of errors leaves them 2 levels."""
    large, small = torch.randn(2000, 8), 0.01 * torch.randn(2000, 8)
    steps = (large, *[small] * 5)
    aware = relative_errors(steps, clip(seen(*steps)))
    # what the values of all steps in one heap ask for
    heap = relative_errors(steps, clip(seen(torch.cat(steps))))
    assert sum(aware) < 0.8 * sum(heap)
    assert aware[1] < heap[1]


def test_outliers_of_one_step_are_cut_where_that_pays() -> None:
    """One value of 50 among 80000 of variance 1, in one of four steps.

    J = 4 Δ² / 12 + (50 - 127 Δ)² / (80000 + 2500), whose minimum is at Δ = 0.146.
    """
    x = torch.randn(4, 20000, 4)
    x[2, 0, 1] = 50
    assert clip(seen(*x)) == pytest.approx(0.146, rel=0.05)


def output_error(x: Tensor, weight: Tensor, scale: float) -> float:
    step = torch.tensor(scale)
    return quant.relative_error((quant.quantize(x, step) * step) @ weight.T, x @ weight.T)


@pytest.mark.parametrize("deaf", [True, False])
def test_channels_count_as_the_weight_hears_them(deaf: bool) -> None:
    """Two channels of 64 are 30 times as large: to weights deaf for them they may be cut off, else not.

    Within 10 % of the best scale for the layer's output: the formula takes channels as independent.
    """
    x, weight = torch.randn(1000, 64), torch.randn(96, 64)
    x[:, :2] *= 30
    weight[:, :2] *= 0.01 if deaf else 10
    statistics = seen(x)
    statistics.add_samples(0, list(x[::5]))
    largest = clip(statistics, method="absmax")
    best = min(output_error(x, weight, largest * 0.95**n) for n in range(150))
    assert output_error(x, weight, clip(statistics, weight=weight)) <= 1.1 * best
    assert output_error(x, weight, clip(statistics)) > 1.3 * best


def test_absmax_clips_nothing() -> None:
    x = torch.randn(3, 50, 4)
    assert clip(seen(*x), method="absmax") == float(x.abs().max() / 127)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.99])
def test_percentile_clips_no_more_of_any_step(percentile: float) -> None:
    steps = tuple(size * torch.randn(5000, 4) for size in (1.0, 0.1, 3.0))
    limit = 127 * clip(seen(*steps), method="percentile", percentile=percentile)
    shares = [float((x.abs() > limit * 1.00001).double().mean()) * 100 for x in steps]
    assert max(shares) <= 100 - percentile
    # a bin is 1 / 1024 of at most twice the largest value: nearly as many are clipped as may be
    width = 2 * 16 / BINS
    assert float((steps[2].abs() > limit - width).double().mean()) * 100 >= 100 - percentile


def test_percentile_100_is_absmax() -> None:
    x = torch.randn(2, 50, 4)
    assert clip(seen(*x), method="percentile", percentile=100) == clip(seen(*x), method="absmax")


@pytest.mark.parametrize("method", ["mse", "percentile", "absmax"])
@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-37, 1e-30, 1e30])
def test_a_scale_is_never_zero_nor_infinite(method: str, size: float) -> None:
    x = torch.full((2, 6, 3), size)
    scale = clip(seen(*x), method=method)  # type: ignore[arg-type]
    assert 0 < scale < math.inf and math.isfinite(1 / torch.tensor(scale))
    assert quant.quantize(x, torch.tensor(scale)).abs().max() <= 127
    if size == 0:
        assert scale == 1


def test_a_step_of_zeros_changes_nothing() -> None:
    x = torch.randn(2, 100, 4)
    assert clip(seen(*x, torch.zeros(100, 4))) == clip(seen(*x))
    untouched = LayerStatistics.empty(3, 4)
    assert clip(untouched) == clip(untouched, method="percentile") == 1


def test_bad_input() -> None:
    statistics = seen(torch.randn(10, 4))
    with pytest.raises(InvalidInput, match="unknown clipping method 'best'"):
        clip(statistics, method="best")  # type: ignore[arg-type]
    for percentile in (0.0, 100.1, math.nan):
        with pytest.raises(InvalidInput, match="percentile is"):
            clip(statistics, method="percentile", percentile=percentile)
    statistics.absmax[0, 1] = math.inf
    with pytest.raises(InvalidInput, match="not finite"):
        clip(statistics)
