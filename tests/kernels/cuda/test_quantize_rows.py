"""quantize_rows in CUDA against its reference, on the emulator.

The kernel does what the reference does, in the same order and with the same roundings: scales and values are
equal bit for bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import launch


def check(x: Tensor, static_scale: Tensor | None = None) -> None:
    values, scales = launch.quantize_rows(x, static_scale)
    expected_values, expected_scales = reference_fused.quantize_rows(x, static_scale)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    finite = expected_scales.isfinite()
    assert torch.equal(values[finite], expected_values[finite])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 1152), (2, 5, 16), (1, 2240), (2, 16384)], ids=str)
def test_equals_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(torch.randn(shape).mul_(5).to(dtype))


@pytest.mark.usefixtures("emulated")
def test_hostile_rows() -> None:
    x = torch.randn(7, 192)
    x[0] = 0
    x[1, 3] = torch.nan
    x[2, 191] = torch.inf
    x[3, 0] = -torch.inf
    x[4] *= 1e-30
    x[5, 7] = 3e38
    check(x)
    check(x, torch.tensor(0.01))
