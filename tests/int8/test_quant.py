"""The mathematics of INT8, and the denoiser's INT8 operations against their definitions."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sana_edge.int8 import matmul, ops, quant
from sana_edge.kernels import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# (M, K, N): single rows, nothing a multiple of 8, several pieces of rows and columns, sums beyond 2^24
SHAPES = [(1, 9, 5), (7, 13, 3), (17, 33, 40), (16, 64, 24), (300, 40, 600), (3, 2500, 10)]


@pytest.fixture
def without_int_mm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuses(*args: Tensor) -> Tensor:
        raise RuntimeError("no kernel for int8\nmore")

    monkeypatch.setattr(torch, "_int_mm", refuses)
    matmul.trial.cache_clear()
    yield
    matmul.trial.cache_clear()


def test_scales_are_never_zero_and_show_what_is_not_finite() -> None:
    absmax = torch.tensor([127.0, 0.0, 1e-40, 2.0**-126, 1.0, math.inf, math.nan])
    expected = torch.tensor([1.0, 1.0, 1.0, 1.0, 1 / 127, math.inf, math.nan])
    torch.testing.assert_close(quant.scales(absmax), expected, rtol=1e-7, atol=0, equal_nan=True)
    # of the smallest scale that is not replaced there is a reciprocal
    assert quant.scales(torch.tensor(127 * 2.0**-126)).reciprocal().isfinite()


def test_rounding_is_half_to_even_and_the_range_symmetric() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 128.0, -127.4, -128.0, -1e9, 1e9, math.inf])
    expected = torch.tensor([0, 2, 2, 0, -2, 126, 127, 127, -127, -127, -127, 127, 127])
    assert torch.equal(quant.quantize(x, torch.ones(())).long(), expected)


@DTYPES
def test_values_are_at_most_half_a_step_away(dtype: torch.dtype) -> None:
    """With the reciprocal and the product rounded to 2^-24 each, 127 times a step is 2^-16 steps off."""
    x = (torch.randn(50, 37) * torch.logspace(-6, 4, 50)[:, None]).to(dtype)
    values, rows = quant.quantize_rows(x)
    distance = (values.float() * rows[:, None] - x.float()).abs() / rows[:, None]
    assert distance.max() <= 0.5 + 2**-15
    # the absmax of every row is the end of the range
    assert (values.abs().amax(1) == 127).all() and (x.float().abs().amax(1) > 0).all()


def test_weights_have_a_scale_for_each_output_channel() -> None:
    weight = torch.randn(6, 4, 3, 3) * torch.tensor([1, 10, 0.1, 0, 1e-3, 1.0]).view(-1, 1, 1, 1)
    values, columns = quant.quantize_weight(weight)
    assert values.dtype == torch.int8 and values.shape == weight.shape
    assert torch.equal(columns, quant.scales(weight.abs().amax((1, 2, 3))))
    assert columns[3] == 1 and not values[3].any()
    distance = quant.dequantize_weight(values, columns) - weight
    assert (distance.abs().amax((1, 2, 3)) <= columns * (0.5 + 2**-15)).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_changes_no_product(alpha: float) -> None:
    x, weight = torch.randn(20, 12) * torch.logspace(-2, 2, 12), torch.randn(7, 12)
    x[:, 3], weight[:, 5] = 0, 0
    inputs, columns = x.abs().amax(0), weight.abs().amax(0)
    s = quant.smoothing(inputs, columns, alpha)
    assert s[3] == 1 and s[5] == 1
    used = torch.ones(12, dtype=torch.bool).index_fill(0, torch.tensor([3, 5]), False)
    assert s[used].double().log().mean().abs() < 1e-6
    torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-4, atol=1e-4)
    # the formula: what alpha leaves of the spread of the inputs
    ratio = s[used] * columns[used] ** (1 - alpha) / inputs[used] ** alpha
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_errors_relative_and_in_decibel() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert quant.relative_error(expected * 1.01, expected) == pytest.approx(0.01, rel=1e-5)
    assert quant.sqnr(expected * 1.01, expected) == pytest.approx(40, abs=1e-4)
    assert quant.relative_error(expected, expected) == 0 and quant.sqnr(expected, expected) == math.inf
    zero = torch.zeros(2)
    assert quant.relative_error(zero, zero) == 0 and quant.relative_error(expected, zero) == math.inf


@DTYPES
@pytest.mark.parametrize("shape", [(1, 9), (3, 5, 64), (2, 700, 1152)], ids=str)
def test_rows_are_quantized_as_defined(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The last shape is more than one piece."""
    x = torch.randn(shape).to(dtype)
    x.flatten(0, -2)[0] = 0
    values, scales = ops.quantize_rows(x)
    defined, rows = reference.quantize_rows(x)
    assert torch.equal(values, defined) and torch.equal(scales, rows)
    assert scales.flatten()[0] == 1 and not values.flatten(0, -2)[0].any()
    scale = torch.tensor(0.013)
    values, scales = ops.quantize_tensor(x, scale)
    assert torch.equal(values, reference.quantize_tensor(x, scale))
    assert torch.equal(scales, scale.expand(shape[:-1]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("static", [False, True])
def test_what_is_not_finite_gives_a_scale_of_nan(value: float, static: bool) -> None:
    x = torch.randn(4, 3, 20)
    x[1, 2, 7] = value
    scales = ops.quantize_tensor(x, torch.tensor(0.02))[1] if static else ops.quantize_rows(x)[1]
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(scales.isnan(), expected) and scales[~expected].isfinite().all()
    assert torch.equal(reference.quantize_rows(x)[1].isnan(), expected)


def integers(M: int, K: int, N: int) -> tuple[Tensor, Tensor]:
    """Over the whole range; the first row and column are the extremes, whose sum is the largest."""
    values, weight = (torch.randint(-127, 128, (rows, K), dtype=torch.int8) for rows in (M, N))
    values[0], weight[0] = 127, -127
    return values, weight


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape: tuple[int, int, int], held: bool) -> None:
    values, weight = integers(*shape)
    sums = ops.int8_sums(values, ops.hold_weight(weight) if held else weight)
    assert sums.dtype == torch.int32 and torch.equal(sums.long(), values.long() @ weight.long().T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact_without_int_mm(shape: tuple[int, int, int], without_int_mm: None) -> None:
    values, weight = integers(*shape)
    assert ops.int8_refusal("cpu") == "no kernel for int8"
    assert torch.equal(ops.int8_sums(values, weight).long(), values.long() @ weight.long().T)


@pytest.mark.parametrize("refused", ["", "not here"], ids=["onednn", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_cpus_that_int_mm_is_slow_on(
    shape: tuple[int, int, int], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not refused and matmul.onednn_linear_refusal():
        pytest.skip(matmul.onednn_linear_refusal())
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    if refused:
        monkeypatch.setattr(matmul, "onednn_linear_refusal", lambda: refused)
    values, weight = integers(*shape)
    sums = matmul.multiplier(ops.hold_weight(weight))(values)
    assert torch.equal(sums, (values.long() @ weight.long().T).float())
    works, words = matmul.describe("cpu")
    assert works == (not refused) and "AVX512-VNNI" in words


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["AVX2_VNNI", "AVX2"])
def test_a_laptop_s_instructions_give_the_same_sums(limit: str) -> None:
    """oneDNN obeys the variable; without VNNI its sums saturate, which the trial has to notice."""
    code = (
        "import torch; torch.cpu._is_vnni_supported = lambda: False\n"
        "from sana_edge.int8 import matmul as int_mm; torch.manual_seed(0)\n"
        "v, w = (torch.randint(-127, 128, (n, 1152), dtype=torch.int8) for n in (300, 200))\n"
        "exact = (v.long() @ w.long().T).float()\n"
        "assert torch.equal(int_mm.multiplier(int_mm.hold_weight(w))(v), exact)\n"
        "print(int_mm.describe('cpu')[1])"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("oneDNN on cpu", "cpu multiplies in fp32"))


def test_wrong_sums_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # saturates at 16 bits, as instructions without VNNI do
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda *args: real(*args).clamp(-32768, 32767))
    matmul.trial.cache_clear()
    assert ops.int8_refusal("cpu") == "torch._int_mm gives wrong sums"
    matmul.trial.cache_clear()


def test_the_memory_of_a_held_weight_is_transposed() -> None:
    weight = torch.randint(-127, 128, (150, 33), dtype=torch.int8)
    held = ops.hold_weight(weight)
    assert torch.equal(held, weight) and held.t().is_contiguous()
    assert ops.hold_weight(held) is held


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_bit_for_bit_as_defined(
    shape: tuple[int, int, int], one_scale: bool, bias: bool, dtype: torch.dtype
) -> None:
    """The same roundings in the same order: sum to fp32, row scale, column scale, bias, dtype."""
    M, K, N = shape
    values, weight = integers(M, K, N)
    scales = torch.tensor(0.02) if one_scale else torch.rand(1, M) / 100
    args = (values[None], scales, weight, torch.rand(N) / 100, torch.randn(N) if bias else None, dtype)
    actual, expected = ops.w8a8_linear(*args), reference.w8a8_linear(*args)
    assert actual.dtype == dtype and actual.shape == (1, M, N)
    assert torch.equal(actual, expected)


# what an implementation can get wrong, done to the arguments of a right one
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
FAULTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Arguments]] = {
    "row scale of the next token": lambda q, s, w, c, b: (q, s.roll(1), w, c, b),
    "one row scale for all": lambda q, s, w, c, b: (q, s.mean().expand_as(s), w, c, b),
    "column scale of the next channel": lambda q, s, w, c, b: (q, s, w, c.roll(1), b),
    "one column scale for all": lambda q, s, w, c, b: (q, s, w, c.mean().expand_as(c), b),
    "scale a hundredth too large": lambda q, s, w, c, b: (q, s, w, c * 1.01, b),
    "two output channels swapped": lambda q, s, w, c, b: (q, s, swapped(w, 0), c, b),
    "two input channels swapped": lambda q, s, w, c, b: (q, s, swapped(w, 1), c, b),
    "bias dropped": lambda q, s, w, c, b: (q, s, w, c, torch.zeros_like(b)),
    "bias of the next channel": lambda q, s, w, c, b: (q, s, w, c, b.roll(1)),
    "bias before the scales": lambda q, s, w, c, b: (q, s, w, c, b * c * s.mean()),
    "one sum off by one step of a weight": lambda q, s, w, c, b: (q, s, stepped(w), c, b),
}


def swapped(weight: Tensor, dim: int) -> Tensor:
    order = torch.arange(weight.shape[dim])
    order[[2, 5]] = order[[5, 2]]
    return weight.index_select(dim, order)


def stepped(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[3, 4] += 1 if weight[3, 4] < 127 else -1
    return weight


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    """The comparison above asks for equal bits; each fault moves the result by over a thousand roundings."""
    values, weight = integers(17, 33, 40)
    scales, columns, bias = torch.rand(17) / 100 + 0.001, torch.rand(40) / 100 + 0.001, torch.randn(40)
    expected = reference.w8a8_linear(values, scales, weight, columns, bias)
    assert torch.equal(ops.w8a8_linear(values, scales, weight, columns, bias), expected)
    moved = ops.w8a8_linear(*FAULTS[fault](values, scales, weight, columns, bias)) - expected
    assert moved.abs().max() > 1000 * 2**-24 * expected.abs().mean()
