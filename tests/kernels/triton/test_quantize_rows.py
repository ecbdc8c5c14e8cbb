"""Triton's per-token INT8 against its definition, interpreted; and compiled ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.kernels import reference, reference_fused

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# SANA's widths; rows that no tile divides, single rows and elements, and the widest
SHAPES = [(1, 1), (3, 7), (13, 192), (1, 1152), (2, 3, 1152), (5, 2240), (3, 2880), (2, 5600), (2, 16384)]


@pytest.fixture
def kernels(interpreted: None) -> ModuleType:
    from sana_edge.kernels.triton import quantize_rows

    return quantize_rows


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(kernels: ModuleType, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape) * torch.logspace(-4, 4, shape[-2])[:, None]
    check(kernels, x.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("C", [192, 1152])
def test_equals_the_definition_for_all_rows_of_a_picture(kernels: ModuleType, C: int) -> None:
    check(kernels, torch.randn(4096, C).bfloat16())


@DTYPES
def test_ties_go_to_the_even_value(kernels: ModuleType, dtype: torch.dtype) -> None:
    """With the absmax 127 steps are 1, and all odd multiples of one half are ties."""
    ties = torch.arange(-126.5, 127, 1)
    rows = torch.stack([ties, ties.flip(0), -ties]).to(dtype)
    values = check(kernels, torch.cat([rows, torch.full((3, 1), 127, dtype=dtype)], dim=1))
    if dtype != torch.bfloat16:
        assert not (values[:, :-1] % 2).any()


def test_products_are_rounded_before_the_sum_that_rounds_them(kernels: ModuleType) -> None:
    """Of 2^20 random values some hundred are ties only once x · (1 / scale) is rounded to fp32."""
    x = (torch.arange(-2048, 2048) / 4096).repeat(8, 1) * torch.linspace(1, 2, 8)[:, None]
    x += torch.randint(-2, 3, x.shape) * 2.0**-26
    check(kernels, x)


def test_rows_that_have_no_scale_of_their_own(kernels: ModuleType) -> None:
    """Zeros, numbers too small for a reciprocal, and numbers at the end of fp32, eight rows to a tile."""
    largest = torch.finfo(torch.float32).max
    x = torch.randn(9, 100)
    x[1], x[4, ::2], x[4, 1::2] = 0, 0.0, -0.0
    x[2] *= 1e-41
    x[3], x[5, 7] = 126.9 * 2.0**-126, -largest
    x[6], x[7, 50] = 127 * 2.0**-126, largest
    values = check(kernels, x)
    assert not values[1:5].any() and (values[6] == 127).all() and values[5, 7] == -127


@DTYPES
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_have_the_scale_nan(
    kernels: ModuleType, bad: float, dtype: torch.dtype
) -> None:
    x = torch.randn(10, 192).to(dtype)
    x[3, 5] = x[8, 0] = x[8, 191] = bad
    values, scales = kernels.quantize_rows(x)
    fine = torch.ones(10, dtype=torch.bool)
    fine[[3, 8]] = False
    assert scales[~fine].isnan().all() and not values[~fine].any()
    expected = reference.quantize_rows(x[fine])
    assert torch.equal(values[fine], expected[0]) and torch.equal(scales[fine], expected[1])


@DTYPES
def test_one_given_scale(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Values beyond ±127 steps are clipped; rows that are not finite still show."""
    x = (torch.randn(13, 192) * torch.logspace(-4, 4, 13)[:, None]).to(dtype)
    x[4, 7], x[6, 0], x[8] = math.nan, -math.inf, 0
    given = torch.tensor(0.0173)
    values, scales = kernels.quantize_rows(x, given)
    expected = reference_fused.quantize_rows(x, given)
    bad = scales.isnan()
    assert bad.nonzero().flatten().tolist() == [4, 6] and not values[bad].any()
    assert torch.equal(values[~bad], expected[0][~bad]) and bool((scales[~bad] == given).all())
    assert torch.equal(bad, expected[1].isnan()) and int(values.abs().max()) == 127


@pytest.mark.parametrize(
    "given", [torch.ones(1), torch.ones(()).half(), torch.ones((), device="meta")], ids=str
)
def test_refuses_other_scales(kernels: ModuleType, given: Tensor) -> None:
    with pytest.raises(InvalidInput, match="static_scale of quantize_rows is"):
        kernels.quantize_rows(torch.ones(2, 8), given)


@pytest.mark.parametrize(("M", "C"), [(5, 192), (3, 1000)])
def test_writes_every_row_and_nothing_else(kernels: ModuleType, M: int, C: int) -> None:
    tile = kernels.pick_tile(C)
    x = torch.randn(M, C)
    values = torch.full((M + tile.rows, C), -128, dtype=torch.int8)
    scales = torch.full((M + tile.rows,), math.nan)
    grid = (-(-M // tile.rows),)
    kernels.quantize_rows_kernel[grid](x, None, values, scales, M, C=C, ROWS=tile.rows, BLOCK=tile.block)
    expected = reference.quantize_rows(x)
    assert torch.equal(values[:M], expected[0]) and torch.equal(scales[:M], expected[1])
    assert (values[M:] == -128).all() and scales[M:].isnan().all()


@pytest.mark.parametrize("shape", [(0, 192), (2, 0, 192)])
def test_no_rows(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    values, scales = kernels.quantize_rows(torch.empty(shape))
    assert values.shape == shape and scales.shape == shape[:-1]


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.ones(2, 8, dtype=torch.int8), "torch.int8"),
        (torch.ones(2, 8, dtype=torch.float64), "torch.float64"),
        (torch.ones(()), r"shape \(\)"),
        (torch.ones(2, 0), r"shape \(2, 0\)"),
        (torch.ones(1, 16385), "16385"),
        (torch.ones(8, 2).t(), "not contiguous"),
    ],
)
def test_refuses_what_it_cannot_read(kernels: ModuleType, x: Tensor, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        kernels.quantize_rows(x)
    assert caught.value.hint


def test_refuses_the_cpu_when_compiled(interpreted: None) -> None:
    import triton

    from sana_edge.kernels.triton.checks import check_rows
    from sana_edge.kernels.triton.int8_tile import round_half_even

    compiled = triton.JITFunction(round_half_even.fn)
    with pytest.raises(UnsupportedDevice, match="not on cpu"):
        check_rows("quantize_rows", compiled, torch.ones(2, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("C", "kind"),
    [
        (1152, "bf16"),
        *(pytest.param(C, "fp16", marks=pytest.mark.slow) for C in (192, 2240, 2880, 5600)),
        pytest.param(5600, "fp32", marks=pytest.mark.slow),
    ],
)
def test_compiles(kernels: ModuleType, compiled: Callable[..., dict[str, str]], C: int, kind: str) -> None:
    tile = kernels.pick_tile(C)
    code = compiled(
        "quantize_rows.quantize_rows_kernel",
        {"p_x": f"*{kind}", "p_values": "*i8", "p_scales": "*fp32", "M": "i32"},
        {"p_static": None, "C": C, "ROWS": tile.rows, "BLOCK": tile.block},
        num_warps=tile.warps,
    )
    # rows stay in registers and are read in 16 bytes at a time, once
    assert "STACK:0" in code["usage"] and "LDG.E.128" in code["sass"] and "LDL" not in code["sass"]
    # nothing is contracted: the product is clipped before 1.5 · 2^23 is added to it
    assert "fma.rn" not in code["ptx"] and "0f4B400000" in code["ptx"] and "div.rn.f32" in code["ptx"]


def check(kernels: ModuleType, x: Tensor) -> Tensor:
    """Bit for bit; returns the values."""
    given = x.clone()
    values, scales = kernels.quantize_rows(x)
    expected = reference.quantize_rows(x)
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    assert torch.equal(scales, expected[1])
    assert torch.equal(values, expected[0])
    assert torch.equal(x, given)
    return values
