"""Triton's LayerNorm, adaLN and INT8 in one against the definition, interpreted; and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference, reference_fused

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
EPS = 1e-6
# u, half a unit in the last place of fp32, and more additions than follow one another in a sum of 5600: on
# a GPU 32 in a thread and 9 between threads, 16 + 3 + 6 in numpy's pairwise sums, 16 + 11 + 4 + 8 in torch's
U = 2.0**-24
DEPTH = 64


@pytest.fixture
def kernels(interpreted: None) -> ModuleType:
    from sana_edge.kernels.triton import norm_quantize

    return norm_quantize


@DTYPES
@pytest.mark.parametrize(
    ("B", "N", "C"),
    [(1, 1, 1), (2, 3, 7), (3, 5, 192), (1, 1, 1152), (2, 3, 1152), (1, 2, 2240), (1, 3, 2880), (2, 1, 5600)],
)
def test_is_within_rounding_of_the_definition(
    kernels: ModuleType, B: int, N: int, C: int, dtype: torch.dtype
) -> None:
    # rows far from zero, narrower than eps, and with one channel far beyond the others
    x = torch.randn(B, N, C) + 3 * torch.randn(B, N, 1)
    x[0, 0] *= 1e-4
    x[-1, -1, C // 2] += 100
    check(kernels, x.to(dtype), 1 + torch.randn(C), torch.randn(C))


@pytest.mark.slow
@pytest.mark.parametrize("C", [192, 1152])
def test_is_within_rounding_for_all_rows_of_two_pictures(kernels: ModuleType, C: int) -> None:
    check(kernels, torch.randn(2, 2048, C).bfloat16(), 1 + torch.randn(2, 1, C), torch.randn(2, 1, C))


@pytest.mark.parametrize(("B", "N", "C"), [(3, 5, 192), (2, 4, 1152)])
def test_each_picture_has_its_own_vectors(kernels: ModuleType, B: int, N: int, C: int) -> None:
    """Eight rows of 192 channels lie in one tile, of which five belong to the first picture."""
    x = torch.randn(B, N, C)
    # as the denoiser has them: slices of one table, in its dtype
    table = torch.randn(B, 6, C).half()
    check(kernels, x, table[:, 1:2], table[:, 4:5])
    check(kernels, x, table[:, 1:2].float(), table[0, 4])
    check(kernels, x, table[:1, 1:2], table[:, 4:5].bfloat16())


def test_rows_far_from_zero_keep_their_variance(kernels: ModuleType) -> None:
    """Mean of squares less square of the mean, 10^6 each, would be off by a tenth of the variance, 1."""
    check(kernels, 1000 + torch.randn(2, 3, 1152), 1 + torch.randn(1152), torch.randn(1152), most=1e-2)


def test_rows_of_one_value_are_the_shift(kernels: ModuleType) -> None:
    x, C = torch.zeros(2, 3, 192), 192
    x[1] = 2.0
    shift = torch.randn(C)
    values, _ = check(kernels, x, torch.randn(C), shift)
    assert torch.equal(values, reference.quantize_rows(shift)[0].expand(2, 3, C))
    values, scales = kernels.norm_modulate_quantize(x, torch.randn(C), torch.zeros(C), EPS)
    assert not values.any() and (scales == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_have_the_scale_nan(kernels: ModuleType, bad: float) -> None:
    x, scale, shift = torch.randn(2, 5, 192), torch.randn(192), torch.randn(192)
    expected = kernels.norm_modulate_quantize(x, scale, shift, EPS)
    x[1, 2, 100] = bad
    values, scales = kernels.norm_modulate_quantize(x, scale, shift, EPS)
    fine = torch.ones(2, 5, dtype=torch.bool)
    fine[1, 2] = False
    assert scales[1, 2].isnan() and not values[1, 2].any()
    assert torch.equal(values[fine], expected[0][fine]) and torch.equal(scales[fine], expected[1][fine])


def test_one_given_scale(kernels: ModuleType) -> None:
    """As the row's own scale but for the scale: y / 0.02 is within 2e-4 of a tie in few of 2880 values."""
    x, scale, shift = torch.randn(3, 5, 192), 1 + torch.randn(192), torch.randn(192)
    x[1, 2, 100] = math.nan
    given = torch.tensor(0.02)
    values, scales = kernels.norm_modulate_quantize(x, scale, shift, EPS, given)
    expected = reference_fused.norm_modulate_quantize(x, scale, shift, EPS, given)
    fine = scales == given
    assert int((~fine).sum()) == 1 and scales[1, 2].isnan() and bool(expected[1][1, 2].isnan())
    off = (values[fine].int() - expected[0][fine].int()).abs()
    assert int(off.max()) <= 1 and int(off.sum()) <= 5 and int(values.abs().max()) == 127


@pytest.mark.parametrize(("N", "C"), [(5, 192), (3, 1000)])
def test_writes_every_row_and_nothing_else(kernels: ModuleType, N: int, C: int) -> None:
    tile = kernels.pick_tile(C)
    x, scale, shift = torch.randn(1, N, C), torch.randn(C), torch.randn(C)
    values = torch.full((N + tile.rows, C), -128, dtype=torch.int8)
    scales = torch.full((N + tile.rows,), math.nan)
    kernels.norm_modulate_quantize_kernel[(-(-N // tile.rows),)](
        *(x, scale, shift, None, values, scales, N, N, 0, 0, EPS), C=C, ROWS=tile.rows, BLOCK=tile.block
    )
    within(values[None, :N], scales[None, :N], x, scale, shift)
    assert (values[N:] == -128).all() and scales[N:].isnan().all()


def test_no_rows(kernels: ModuleType) -> None:
    ones = torch.ones(192)
    values, scales = kernels.norm_modulate_quantize(torch.empty(2, 0, 192), ones, ones, EPS)
    assert values.shape == (2, 0, 192) and scales.shape == (2, 0)


@pytest.mark.parametrize(
    ("x", "vector", "words"),
    [
        (torch.ones(2, 3, 8).int(), torch.ones(8), "x of .* is torch.int32"),
        (torch.ones(3, 8), torch.ones(8), r"x of .* has shape \(3, 8\)"),
        (torch.ones(2, 8, 3).mT, torch.ones(8), "x of .* is .* not contiguous"),
        (torch.ones(2, 3, 8), torch.ones(8).double(), "torch.float64"),
        (torch.ones(2, 3, 8), torch.ones(7), r" is torch.float32 \(7,\)"),
        (torch.ones(2, 3, 8), torch.ones(2, 3, 8), r"is torch.float32 \(2, 3, 8\)"),
        (torch.ones(2, 3, 8), torch.ones(16)[::2], "not contiguous"),
        (torch.ones(2, 3, 8), torch.ones(8, device="meta"), " of .* on meta"),
    ],
)
def test_refuses_what_it_cannot_read(kernels: ModuleType, x: Tensor, vector: Tensor, words: str) -> None:
    fine = torch.ones(x.shape[-1])
    for scale, shift in ((vector, fine), (fine, vector)):
        with pytest.raises(InvalidInput, match=words) as caught:
            kernels.norm_modulate_quantize(x, scale, shift, EPS)
        assert caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("C", "kind"),
    [(1152, "bf16"), *(pytest.param(C, "fp16", marks=pytest.mark.slow) for C in (192, 2240, 2880, 5600))],
)
def test_compiles(kernels: ModuleType, compiled: Callable[..., dict[str, str]], C: int, kind: str) -> None:
    tile = kernels.pick_tile(C)
    pointers = {"p_x": kind, "p_scale": kind, "p_shift": kind, "p_values": "i8", "p_scales": "fp32"}
    numbers = ("M", "tokens", "stride_scale", "stride_shift")
    code = compiled(
        "norm_quantize.norm_modulate_quantize_kernel",
        {
            **{name: f"*{kind}" for name, kind in pointers.items()},
            **dict.fromkeys(numbers, "i32"),
            "eps": "fp32",
        },
        {"p_static": None, "C": C, "ROWS": tile.rows, "BLOCK": tile.block},
        multiples=("stride_scale", "stride_shift"),
        num_warps=tile.warps,
    )
    assert "STACK:0" in code["usage"] and "LDG.E.128" in code["sass"] and "LDL" not in code["sass"]
    # the sum with 1.5 · 2^23 stays a sum
    assert "add.f32" in code["ptx"] and "0f4B400000" in code["ptx"] and "sqrt.rn.f32" in code["ptx"]


def check(
    kernels: ModuleType, x: Tensor, scale: Tensor, shift: Tensor, most: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Kernel and definition are within the bound of the exact result, and a step from each other at most."""
    given = x.clone()
    values, scales = kernels.norm_modulate_quantize(x, scale, shift, EPS)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32 and torch.equal(x, given)
    expected = reference.norm_modulate_quantize(x, scale, shift, EPS)
    within(values, scales, x, scale, shift, most)
    within(*expected, x, scale, shift, most)
    assert (values.int() - expected[0].int()).abs().max() <= 1
    return values, scales


def within(
    values: Tensor, scales: Tensor, x: Tensor, scale: Tensor, shift: Tensor, most: float = 1e-4
) -> None:
    """At most half a step from y = c · r · scale + shift in fp64, and what fp32 adds to that.

    c = x - mean, r = 1 / sqrt(variance + eps). A sum with its division, which on a GPU errs by 2u, is off by
    g = (DEPTH + 8) u of the sum of its magnitudes:
      mean: m = g · mean|x|; c: m + u (|c| + m), within 2m + u|c|;
      variance: c's common error enters squared, its rounding by 2u: relative v = 2g + (r · 2m)²;
      r: v / 2 and the roundings of sum, root and division, 3u; two products and a sum: 4u; so
      y: e = |scale| r (2m + |c| (v / 2 + 8u)) + 4u |shift|.
    The largest e of a row, over its absmax, is the relative error of its scale, besides its rounding 2u. In
    steps, absmax / 127, it counts twice, from y and from the scale, with 127 · 4u for both roundings.

    Args:
        most: the bound on the scale itself is smaller than this in half of the rows, or it would say little.
    """
    g = (min(x.shape[-1], DEPTH) + 8) * U
    x, scale, shift = x.double(), scale.double(), shift.double()
    c = x - x.mean(-1, keepdim=True)
    r = (c.square().mean(-1, keepdim=True) + EPS).rsqrt()
    y = c * r * scale + shift
    m = g * x.abs().mean(-1, keepdim=True)
    v = 2 * g + (r * 2 * m).square()
    e = scale.abs() * r * (2 * m + c.abs() * (v / 2 + 8 * U)) + 4 * U * shift.abs()
    absmax = y.abs().amax(-1, keepdim=True)
    relative = e.amax(-1, keepdim=True) / absmax + 4 * U
    assert x.shape[-1] == 1 or relative.median() < most
    exact = absmax / 127
    assert ((scales.unsqueeze(-1) - exact).abs() <= exact * relative).all()
    assert ((values - y / exact).abs() <= 0.5 + 2 * 127 * relative).all()
