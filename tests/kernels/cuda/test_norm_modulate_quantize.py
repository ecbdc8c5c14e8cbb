"""norm_modulate_quantize in CUDA against its reference, on the emulator.

Sums over a row of C in another order than the reference's: each errs by about log2(C) + 40 roundings of
2^-24 (lanes add up to 40 numbers one by one), and so does torch's: the mean is right within 50 · 2^-24 of
the row's absolute mean and 1 / deviation within 50 · 2^-24 of itself. With rows whose mean is at most as
large as their deviation, values then differ by at most about 1e-5 of the row's absmax: scales are compared
with rtol 1e-5, and a level (1/127 = 8e-3 of absmax) only changes where a value is within 1e-5 · 127 of the
middle between two: one value in 400 at most, and never by 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import launch

if TYPE_CHECKING:
    pass

EPS = 1e-6


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    values, scales = found
    expected_values, expected_scales = expected
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0, equal_nan=True)
    finite = expected_scales.isfinite()
    difference = (values.int() - expected_values.int()).abs()[finite]
    if difference.numel():
        assert difference.max() <= 1
        assert difference.float().mean() <= max(1 / 400, 1.5 / difference.numel())


def modulation(images: int, columns: int) -> tuple[Tensor, Tensor]:
    """Scale and shift as parts of one table of six, as in a block."""
    table = torch.randn(images, 6, columns)
    return table[:, 1:2].add_(1), table[:, 0:1]


def check(x: Tensor, static_scale: Tensor | None = None) -> None:
    scale, shift = modulation(len(x), x.shape[-1])
    close(
        launch.norm_modulate_quantize(x, scale, shift, EPS, static_scale),
        reference_fused.norm_modulate_quantize(x, scale, shift, EPS, static_scale),
    )


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 9, 192), (3, 5, 1152), (2, 3, 2240), (1, 3, 5600), (1, 2, 8192), (2, 1, 16), (1, 257, 32)],
    ids=str,
)
def test_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check((torch.randn(shape) * 3 + 1).to(dtype))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [1280, 1296, 2560, 2576, 5120, 5136])
def test_widths_where_the_warps_of_a_row_change(columns: int) -> None:
    check(torch.randn(1, 3, columns))


@pytest.mark.usefixtures("emulated")
def test_vectors_for_all_images() -> None:
    x = torch.randn(3, 5, 192)
    for scale, shift in ((torch.randn(192), torch.randn(192)), (torch.randn(1, 1, 192), torch.randn(192))):
        close(
            launch.norm_modulate_quantize(x, scale, shift, EPS),
            reference_fused.norm_modulate_quantize(x, scale, shift, EPS),
        )


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("columns", [192, 2240])
def test_hostile_rows(columns: int) -> None:
    x = torch.randn(1, 9, columns)
    x[0, 0] = 0
    x[0, 1, 3] = torch.nan
    x[0, 2, -1] = torch.inf
    x[0, 3, 0] = -torch.inf
    x[0, 4] *= 1e-30
    # squares overflow: 1 / deviation is 0
    x[0, 5] *= 1e30
    # one value stands out of all and saturates a static scale
    x[0, 6, 7] = 1e4
    scale, shift = torch.rand(columns) + 0.5, torch.randn(columns)
    for static in (None, torch.tensor(0.01)):
        close(
            launch.norm_modulate_quantize(x, scale, shift, EPS, static),
            reference_fused.norm_modulate_quantize(x, scale, shift, EPS, static),
        )
    # all zeros where scale and shift are: scale 1, not 0
    values, scales = launch.norm_modulate_quantize(
        torch.randn(1, 3, columns), torch.zeros(columns), torch.zeros(columns), EPS
    )
    assert torch.equal(scales, torch.ones(1, 3))
    assert not values.any()


@pytest.mark.usefixtures("emulated_turing")
def test_turing() -> None:
    check(torch.randn(2, 3, 1152).half())
