"""dwconv_glu_quantize in CUDA against its reference, on the emulator.

Sums of ten terms in another order than torch's differ by about 10 roundings of 2^-24 of the terms' absolute
sum, SiLU by a few more: before the rounding to 16 bits (2^-9 or 2^-12) products agree within about 1e-5 of
what they are made of. So the two are mostly equal, some are neighbours among 16-bit numbers, which moves a
value by at most one level (1/127 is more than 2^-8) and a scale by one such rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import UnsupportedDevice
from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import launch

if TYPE_CHECKING:
    from emulator import Emulator

BOTH = [torch.float16, torch.bfloat16]


def close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    values, scales = found
    expected_values, expected_scales = expected
    assert values.shape == expected_values.shape
    assert scales.shape == expected_scales.shape
    torch.testing.assert_close(scales, expected_scales, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    same = (scales == expected_scales) & expected_scales.isfinite()
    difference = (values.int() - expected_values.int()).abs()
    if same.any():
        assert difference[same].max() <= 1
        assert difference[same].float().mean() <= max(2e-3, 1.5 / difference[same].numel())
    finite = expected_scales.isfinite()
    if finite.any():
        assert difference[finite].max() <= 2


def example(
    images: int, height: int, width: int, hidden: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = F.silu(torch.randn(images, height * width, 2 * hidden) * 2).to(dtype)
    return x, (torch.randn(3, 3, 2 * hidden) / 3).to(dtype), torch.randn(2 * hidden) / 3


def check(images: int, height: int, width: int, hidden: int, dtype: torch.dtype) -> None:
    x, weight, bias = example(images, height, width, hidden, dtype)
    close(
        launch.dwconv_glu_quantize(x, weight, bias, height, width),
        reference_fused.dwconv_glu_quantize(x, weight, bias, height, width),
        dtype,
    )


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 5, 7, 480),
        (2, 4, 4, 16),
        (1, 1, 1, 2880),
        (1, 3, 5, 2880),
        (1, 2, 3, 5600),
        (1, 1, 9, 48),
        (3, 9, 1, 32),
        (2, 8, 3, 32),
    ],
    ids=str,
)
def test_equals_reference(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(*shape, dtype)


@pytest.mark.parametrize("height", [1, 3, 4, 5])
def test_every_width(emulated: Emulator, height: int) -> None:
    """One processor makes patches as wide as they can be, a thousand make them narrow."""
    for processors in (1, 3, 1000):
        emulated.pretend(89, processors, 99 << 10)
        try:
            for width in range(1, 12):
                check(1, height, width, 16, torch.float16)
        finally:
            emulated.pretend(89, 24, 99 << 10)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_each_tap(dtype: torch.dtype) -> None:
    """Integers that are exact in every order: a wrong neighbour, channel or border shows."""
    height, width, hidden = 5, 6, 32
    x = torch.randint(-3, 4, (2, height * width, 2 * hidden)).to(dtype)
    for tap in range(9):
        weight = torch.zeros(9, 2 * hidden, dtype=dtype)
        weight[tap] = torch.randint(1, 4, (2 * hidden,)).to(dtype)
        weight[:, hidden:] = 0
        bias = torch.zeros(2 * hidden)
        # SiLU(64) = 64: the gate is 64 everywhere
        bias[hidden:] = 64
        kernel = weight.view(3, 3, 2 * hidden)
        values, scales = launch.dwconv_glu_quantize(x, kernel, bias, height, width)
        expected = reference_fused.dwconv_glu_quantize(x, kernel, bias, height, width)
        assert torch.equal(values, expected[0])
        assert torch.equal(scales, expected[1])


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_hostile_pixels(dtype: torch.dtype) -> None:
    height, width, hidden = 9, 11, 80
    x, weight, bias = example(1, height, width, hidden, dtype)
    bias[:] = 0
    image = x.view(height, width, -1)
    image[1, 1, 3] = torch.nan
    image[1, 5, hidden + 9] = torch.inf
    image[1, 9, 79] = -torch.inf
    # around (6, 2) all is zero: scale 1
    image[5:8, 1:4] = 0
    # products beyond fp16's 65504 become infinite
    image[6, 8] = 3e4
    for static in (None, torch.tensor(0.001)):
        close(
            launch.dwconv_glu_quantize(x, weight, bias, height, width, static),
            reference_fused.dwconv_glu_quantize(x, weight, bias, height, width, static),
            dtype,
        )
    _, scales = launch.dwconv_glu_quantize(x, weight, bias, height, width)
    assert scales[0, 6 * width + 2] == 1
    assert scales.view(height, width)[:3, :3].isnan().all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_gates_far_from_zero(dtype: torch.dtype) -> None:
    """SiLU of gates up to +-200, past what e^-x holds in fp32: neither NaN nor infinite."""
    hidden = 128
    x = torch.ones(1, 1, 2 * hidden, dtype=dtype)
    weight, bias = torch.zeros(3, 3, 2 * hidden, dtype=dtype), torch.ones(2 * hidden)
    bias[hidden:] = torch.linspace(-200, 200, hidden)
    found = launch.dwconv_glu_quantize(x, weight, bias, 1, 1)
    close(found, reference_fused.dwconv_glu_quantize(x, weight, bias, 1, 1), dtype)
    assert found[1].isfinite().all()


def test_turing(emulated_turing: Emulator) -> None:
    """64 KiB of shared memory hold 4 x 2 pixels of 2880 channels, and 4 x 1 of 5600."""
    emulated_turing.pretend(75, 24, 64 << 10)
    try:
        check(1, 5, 5, 2880, torch.float16)
        check(1, 3, 3, 5600, torch.float16)
        with pytest.raises(UnsupportedDevice):
            check(1, 1, 1, 8192, torch.float16)
    finally:
        emulated_turing.pretend(75, 24, 99 << 10)
