"""Gemma-2's operations in CUDA against their definitions, on the emulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference_gemma
from sana_edge.kernels.cuda import launch

EPS = 1e-6
# half a low digit's step of each of two that are compared, and their own roundings
DIGIT = 1.02


def value(digits: Tensor, steps: Tensor) -> Tensor:
    high, low = digits.double().unbind(-2)
    return (254 * high + low) * steps.double()[..., None]


def check_digits(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], error: Tensor | float
) -> None:
    """Numbers that differ by ``error`` before they are rounded differ by a digit's step more."""
    steps, wanted = found[1], expected[1]
    assert torch.equal(steps.isnan(), wanted.isnan())
    finite = wanted.isfinite()
    allowed = (torch.as_tensor(error, dtype=torch.float64) + DIGIT * wanted.double()).expand_as(wanted)
    assert ((steps - wanted).abs() * 32258)[finite].le(allowed[finite]).all()
    difference = (value(*found) - value(*expected)).abs().amax(-1)
    assert difference[finite].le(allowed[finite]).all()


def hostile(rows: int, columns: int) -> Tensor:
    """Rows of zeros, NaN, infinity, almost nothing, and one that stands out."""
    x = torch.randn(rows, columns)
    x[0] = 0
    x[1 % rows, 3] = torch.nan
    x[2 % rows, -1] = -torch.inf
    x[3 % rows] *= 1e-38
    x[4 % rows, 7] = 1e4
    return x


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("columns", [16, 48, 1040, 3088])
def test_digits_are_those_of_the_definition(columns: int) -> None:
    x = hostile(7, columns)
    digits, steps = launch.quantize_digits(x)
    expected, wanted = reference_gemma.quantize_digits(x)
    finite = wanted.isfinite()
    torch.testing.assert_close(steps, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(digits[finite], expected[finite])
    # 16 bits of absmax
    absmax = x[finite].abs().amax(-1).double()
    error = (value(digits, steps)[finite] - x[finite].double()).abs().amax(-1)
    # what is smaller has no scale
    scaled = absmax >= 127 * 2.0**-126
    assert error[scaled].le(DIGIT / 2 * absmax[scaled] / 32258).all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [16, 1040, 9216])
def test_gated_digits(columns: int) -> None:
    """tanh within 2 · 2^-24, of which the gate's half takes part: the product errs by 2^-22 of gate · up."""
    x = torch.randn(3, 2 * columns) * 4
    gate, up = x.chunk(2, dim=-1)
    largest = (gate * up).abs().amax(-1)
    check_digits(
        launch.quantize_digits(x, True), reference_gemma.quantize_digits(x, True), 2.0**-22 * largest
    )
    plain = launch.quantize_digits(gate.contiguous())
    assert not torch.equal(launch.quantize_digits(x, True)[1], plain[1])


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("columns", [32, 1152, 2304, 3088])
def test_add_norm_digits(columns: int) -> None:
    """Sums of squares in another order: their roots within 30 roundings of 2^-24 in both, 2^-18 together."""
    x, y = torch.randn(5, columns), torch.randn(5, columns) * 7
    post, weight = torch.randn(columns), torch.rand(columns) + 0.5
    for first in (True, False):
        given = (x, None, None) if first else (x, y, post)
        total, *found = launch.add_norm_digits(*given, weight, EPS)
        wanted, *expected = reference_gemma.add_norm_digits(*given, weight, EPS)
        assert torch.equal(total, x) if first else not torch.equal(total, x)
        added = (wanted - x).abs().amax(-1)
        assert (total - wanted).abs().amax(-1).le(2.0**-18 * added + 2.0**-23 * wanted.abs().amax(-1)).all()
        largest = value(*expected).abs().amax(-1)
        check_digits(tuple(found), tuple(expected), 2.0**-17 * largest)


@pytest.mark.usefixtures("emulated")
def test_add_norm_digits_of_faults_stay_in_their_row() -> None:
    x, y, weight = torch.randn(4, 48), torch.randn(4, 48), torch.rand(48)
    x[1, 5], y[2, 6] = torch.nan, torch.inf
    _, _, steps = launch.add_norm_digits(x, y, weight, weight, EPS)
    assert steps.isnan().tolist() == [False, True, True, False]


def product(*lead: int, N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits (*lead, 2, K), steps, weight and its scales; results are of the size of 1."""
    digits = torch.randint(-127, 128, (*lead, 2, K), dtype=torch.int8)
    weight = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    return digits, torch.rand(lead) / (64 * 254), weight, torch.rand(N) / (64 * K**0.5)


# with few processors tiles are large
@pytest.mark.parametrize("processors", [1, 24])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 8, 16), (33, 72, 48), (150, 264, 32), (32, 64, 4096)])
def test_product_is_exact(emulated: Any, processors: int, M: int, N: int, K: int) -> None:
    """Sums are, and every step after them is rounded as in the definition."""
    if processors < 24:
        emulated.pretend(89, processors, 99 << 10)
    given, bias = product(M, N=N, K=K), torch.randn(N)
    assert torch.equal(launch.w8a16_linear(*given, bias), reference_gemma.w8a16_linear(*given, bias))
    assert torch.equal(launch.w8a16_linear(*given), reference_gemma.w8a16_linear(*given))


@pytest.mark.usefixtures("emulated", "guarded_outputs")
def test_product_rotates_its_first_columns() -> None:
    given = product(2, 11, N=56, K=32)
    rotation = reference_gemma.rotation_of(torch.arange(11) + 3, torch.rand(4))
    out = launch.w8a16_linear(*given, None, rotation, 40)
    assert torch.equal(out, reference_gemma.w8a16_linear(*given, None, rotation, 40))
    plain = launch.w8a16_linear(*given)
    assert torch.equal(out[..., 40:], plain[..., 40:])
    # a rotation keeps the length of each pair
    pairs, before = (t[..., :40].unflatten(-1, (-1, 2)).norm(dim=-1) for t in (out, plain))
    torch.testing.assert_close(pairs, before, rtol=2.0**-21, atol=0)


@pytest.mark.usefixtures("emulated")
def test_a_row_that_is_not_finite_stays_alone() -> None:
    digits, steps, weight, scales = product(20, N=24, K=32)
    steps[9] = torch.nan
    out = launch.w8a16_linear(digits, steps, weight, scales)
    assert out.isnan().all(-1).nonzero().tolist() == [[9]] and int(out.isnan().sum()) == 24


def test_a_prompt_reads_the_weight_once(emulated: Any) -> None:
    """32 tokens are the 64 rows of one tile: as many blocks as the weight has tiles."""
    given = product(32, N=192, K=128)
    emulated.count()
    launch.w8a16_linear(*given)
    counted = emulated.count()
    assert counted["launches"] == 1 and counted["blocks"] == 3 and counted["bank_conflicts"] == 0
    assert counted["int8_products"] == (64 // 16) * (192 // 8) * (128 // 32)


@pytest.mark.usefixtures("emulated_turing")
def test_turing() -> None:
    given = product(70, N=72, K=176)
    assert torch.equal(launch.w8a16_linear(*given), reference_gemma.w8a16_linear(*given))
    attend(texts=1, tokens=9, heads=4, kv=2, d=32, dtype=torch.float16)


def attend(
    texts: int,
    tokens: int,
    heads: int,
    kv: int,
    d: int,
    dtype: torch.dtype,
    capacity: int = 24,
    known: int = 19,
    cap: float | None = 3.0,
    window: int | None = None,
) -> Tensor:
    """Checks attention: fp32 in both, q k by sums of d in another order, a softmax in other parts.

    A score is off by (d + 3) 2^-24 of the largest |q| |k| scale and by 2^-22 of the cap, both as exponents;
    an output, a weighted mean of v, by twice that of the largest |v|, and by 2^-20 for the sums.
    """
    qkv = torch.randn(texts, tokens, (heads + 2 * kv) * d)
    keys, values = torch.randn(2, kv, capacity, d).to(dtype)
    # beyond what is known nothing is read
    keys[:, known:], values[:, known:] = torch.nan, torch.nan
    count, scale = torch.tensor(known, dtype=torch.int32), d**-0.5
    asked = (qkv, keys, values, count, heads, scale, cap, window)
    out, expected = launch.soft_capped_attention(*asked), reference_gemma.soft_capped_attention(*asked)
    q, k, v = qkv.abs().unflatten(-1, (-1, d)).split([heads, kv, kv], dim=2)
    longest = max(
        float(k.norm(dim=-1).max()), float(keys[:, :known].float().norm(dim=-1).max() if known else 0)
    )
    largest = max(float(v.max()), float(values[:, :known].float().abs().max()) if known else 0)
    moved = (d + 3) * 2.0**-24 * float(q.norm(dim=-1).max()) * longest * scale + 2.0**-22 * (cap or 0)
    bound = largest * (2 * torch.expm1(torch.tensor(2 * moved)).item() + 2.0**-20)
    assert float((out - expected).abs().max()) <= bound
    found: Tensor = out
    return found


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv", "d"), [(2, 1, 256), (3, 3, 8), (4, 2, 32), (6, 2, 64)], ids=lambda n: str(n)
)
def test_attention(heads: int, kv: int, d: int, dtype: torch.dtype) -> None:
    attend(1, 9, heads, kv, d, dtype)
    attend(2, 5, heads, kv, d, dtype, known=0, cap=None)
    attend(1, 21, heads, kv, d, dtype, capacity=40, known=40, window=7)
    attend(1, 1, heads, kv, d, dtype, capacity=1, known=1, window=1)


def test_attention_with_few_and_many_blocks(emulated: Any) -> None:
    for processors in (1, 200):
        emulated.pretend(89, processors, 99 << 10)
        attend(1, 37, 2, 1, 128, torch.bfloat16)


@pytest.mark.usefixtures("emulated")
def test_a_window_of_one_reads_itself() -> None:
    qkv = torch.randn(1, 6, 4 * 16)
    nothing = torch.zeros(1, 4, 16)
    out = launch.soft_capped_attention(
        qkv, nothing, nothing, torch.tensor(0, dtype=torch.int32), 2, 1.0, 50.0, 1
    )
    assert torch.equal(out, qkv[..., 48:].repeat(1, 1, 2))


@pytest.mark.usefixtures("emulated")
def test_scores_beyond_the_cap_are_alike() -> None:
    """Scores of ±1e6 become ±cap: all keys on one side weigh the same."""
    qkv = torch.zeros(1, 4, 24)
    qkv[..., :16] = 1e3
    qkv[0, :, 16:] = torch.arange(32.0).view(4, 8)
    nothing = torch.zeros(1, 4, 8)
    out = launch.soft_capped_attention(
        qkv, nothing, nothing, torch.tensor(0, dtype=torch.int32), 1, 1.0, 50.0
    )
    means = qkv[0, :, 16:].cumsum(0) / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(out[0], means, rtol=2.0**-20, atol=0)


@pytest.mark.usefixtures("emulated")
def test_a_fault_reaches_only_what_stands_behind_it() -> None:
    qkv = torch.randn(1, 8, 4 * 16)
    qkv[0, 5, 40] = torch.nan
    nothing = torch.zeros(1, 4, 16)
    out = launch.soft_capped_attention(
        qkv, nothing, nothing, torch.tensor(0, dtype=torch.int32), 2, 0.25, 50.0
    )
    assert out[0, :5].isfinite().all() and out[0, 5:].isnan().any(-1).all()
