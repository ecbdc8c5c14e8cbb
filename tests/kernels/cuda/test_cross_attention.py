"""cross_attention_quantize in CUDA against its reference, on the emulator.

What the kernel rounds and the reference does not; u is the type's rounding (2^-11 in fp16, 2^-8 in bf16), V
the largest |v| that counts:

- The softmax's numerators p = exp(s - max), by factors within 1 + u, and in fp16 by 2^-25 where they are
  subnormal. They are divided by the sum of the rounded ones: an output stays a weighted mean of v and moves
  by sum (p' - p) (v - out) / sum p', where sum p' >= 1: at most 2 V (u + keys 2^-25).
- q after its norm, by factors within 1 + u: a score moves by D = u A at most, A the largest in a row of
  |q| |k|^T / sqrt(d); every weight by a factor within exp(2 D), an output by 2 V (exp(2 D) - 1).
- fp32 sums in another order: a score by (d + 3) 2^-24 A, as above; the sums of the outputs by 2^-20 V.
- The output, by u V in both; together 2 u V.

The scale of a row then moves by 1 / 127 of that bound, and a value by half a step of rounding in both.
"""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.kernels import reference, reference_fused
from sana_edge.kernels.cuda import launch, library

HERE = Path(__file__).parent
HALVES = [torch.float16, torch.bfloat16]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SHAPES = [(16, 72), (20, 112), (3, 64), (2, 32), (2, 8), (2, 120), (16, 48)]


class Case(NamedTuple):
    q: Tensor
    keys: Tensor
    values_transposed: Tensor
    lengths: Tensor


def case(
    lengths: list[int], tokens: int, heads: int, head_dim: int, dtype: torch.dtype, capacity: int = 0
) -> Case:
    """Random q, k and v; beyond the lengths are huge numbers, which must not matter."""
    capacity = capacity or -(-max(lengths) // 16) * 16
    q = torch.randn(len(lengths), tokens, heads * head_dim) * 2
    keys = torch.randn(len(lengths), heads, capacity, head_dim)
    values = torch.randn(len(lengths), heads, capacity, head_dim)
    for prompt, length in enumerate(lengths):
        keys[prompt, :, length:] = 60000
        values[prompt, :, length:] = -60000
    counts = torch.tensor(lengths, dtype=torch.int32)
    return Case(q.to(dtype), keys.to(dtype), values.transpose(2, 3).contiguous().to(dtype), counts)


def bounds(c: Case, norm_q: Tensor | None, eps: float) -> Tensor:
    """How far an output may be from the reference, per row: see above."""
    heads, capacity, head_dim = c.keys.shape[1:]
    counts = (torch.arange(capacity) < c.lengths[:, None])[:, None, :, None]
    q = c.q.float() if norm_q is None else reference.rms_norm(c.q.float(), norm_q, eps)
    each = q.unflatten(-1, (heads, -1)).transpose(1, 2).abs()
    scores = each @ (c.keys.float().abs() * counts).transpose(2, 3) / math.sqrt(head_dim)
    largest = scores.amax((1, 3))
    v = (c.values_transposed.transpose(2, 3).float().abs() * counts).amax((1, 2, 3))[:, None]
    u = ROUNDING[c.q.dtype]
    moved = (head_dim + 3) * 2.0**-24 * largest + (0 if norm_q is None else u * largest)
    small = capacity * 2.0**-25 if c.q.dtype == torch.float16 else 0.0
    return 2 * v * (u + small + torch.expm1(2 * moved) + 2.0**-21 + u)


def check(
    c: Case, norm_q: Tensor | None = None, eps: float = 1e-5, static_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    values, scales = launch.cross_attention_quantize(*c, norm_q, eps, static_scale)
    expected_values, expected_scales = reference_fused.cross_attention_quantize(*c, norm_q, eps, static_scale)
    assert torch.equal(scales.isnan(), expected_scales.isnan())
    finite = expected_scales.isfinite()
    bound = bounds(c, norm_q, eps)
    if static_scale is None:
        assert (scales - expected_scales)[finite].abs().le(bound[finite] / 127 + 1e-30).all()
    else:
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    outputs, expected = values * scales[..., None], expected_values * expected_scales[..., None]
    allowed = bound + (scales + expected_scales) * 0.501
    assert (outputs - expected).abs().amax(-1)[finite].le(allowed[finite]).all()
    return values, scales


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_near_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens = 19 if shape[0] > 3 else 63
    values, _ = check(case([7, 61], tokens, *shape, dtype))
    assert values.abs().amax(-1).eq(127).all()
    check(case([16], 1, *shape, dtype), torch.rand(shape[0] * shape[1]) + 0.5)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_lengths(dtype: torch.dtype) -> None:
    check(case([300, 1, 16], 5, 3, 64, dtype, capacity=304))
    check(case([300], 3, 16, 72, dtype, capacity=304), torch.rand(16 * 72) + 0.5, 1e-6)
    check(case([17, 2, 48], 100, 2, 32, dtype, capacity=64), static_scale=torch.tensor(0.02))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_its_own_roundings(dtype: torch.dtype, normed: bool) -> None:
    """Up to 16 keys the running maximum is the maximum: with the same roundings in torch only fp32 differs.

    Then an output is now and then rounded to the other neighbour, which moves a value by one level at most.
    """
    c = case([16, 11, 5], 33, 16, 72, dtype)
    norm_q = torch.rand(16 * 72) + 0.5 if normed else None
    values, scales = launch.cross_attention_quantize(*c, norm_q)
    q = c.q if norm_q is None else reference.rms_norm(c.q.float(), norm_q, 1e-5).to(dtype)
    scores = q.float().unflatten(-1, (16, 72)).transpose(1, 2) @ c.keys.float().transpose(2, 3) / 72**0.5
    scores.masked_fill_((torch.arange(16) >= c.lengths[:, None])[:, None, None], -torch.inf)
    p = (scores - scores.amax(-1, keepdim=True)).exp().to(dtype).float()
    out = (p @ c.values_transposed.float().transpose(2, 3)) / p.sum(-1, keepdim=True)
    expected_values, expected_scales = reference.quantize_rows(out.transpose(1, 2).flatten(2).to(dtype))
    torch.testing.assert_close(scales, expected_scales, rtol=2 * ROUNDING[dtype], atol=0)
    differences = (values.int() - expected_values.int()).abs()
    assert differences.max() <= 1
    assert differences.float().mean() < 0.01


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_one_key_gives_its_value(dtype: torch.dtype) -> None:
    c = case([1, 1], 18, 20, 112, dtype)
    values, scales = launch.cross_attention_quantize(*c)
    rows = c.values_transposed[..., 0].flatten(1)[:, None].expand(c.q.shape)
    expected_values, expected_scales = reference.quantize_rows(rows)
    assert torch.equal(values, expected_values)
    assert torch.equal(scales, expected_scales)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_hostile_scores(dtype: torch.dtype) -> None:
    """Scores of +-1e4 on 37 keys: the weights are 0 and 1, and the outputs V of the largest, bit for bit."""
    heads, head_dim, length = 2, 32, 37
    c = case([length], 40, heads, head_dim, dtype, capacity=48)
    signs = (torch.arange(length) * 5 % length - length // 2).to(dtype)
    c.keys[0, :, :length] = signs[:, None] * 2
    # of all +-64 / sqrt(32): the scores' steps are 724
    c.q[:] = torch.where(torch.arange(40) % 2 == 0, 64.0, -64.0)[:, None].to(dtype)
    values, scales = launch.cross_attention_quantize(*c)
    best = torch.where(torch.arange(40) % 2 == 0, signs.argmax(), signs.argmin())
    rows = c.values_transposed[0].flatten(0, 1).T[best][None]
    expected_values, expected_scales = reference.quantize_rows(rows)
    assert torch.equal(values, expected_values)
    assert torch.equal(scales, expected_scales)


@pytest.mark.usefixtures("emulated")
def test_minus_infinity_at_first() -> None:
    """A row whose first 16 scores overflow to -infinity has the softmax of the others."""
    c = case([20], 17, 2, 32, torch.bfloat16)
    c.keys[..., 0] = 0
    c.keys[0, :, :16, 0] = 1e30
    c.q[..., ::32] = 0
    c.q[0, 3, ::32] = -1e30
    values, scales = launch.cross_attention_quantize(*c)
    expected_values, expected_scales = reference_fused.cross_attention_quantize(*c)
    assert scales.isfinite().all()
    torch.testing.assert_close(scales, expected_scales, rtol=2 * ROUNDING[torch.bfloat16], atol=0)
    assert (values.int() - expected_values.int()).abs().max() <= 1


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_faults_stay_in_their_row(dtype: torch.dtype, normed: bool) -> None:
    c = case([7, 20], 35, 3, 64, dtype)
    norm_q = torch.rand(192) + 0.5 if normed else None
    before, before_scales = check(c, norm_q)
    rows = [(0, 3), (0, 34), (1, 16)]
    for (prompt, row), fault in zip(rows, [torch.nan, torch.inf, -torch.inf], strict=True):
        c.q[prompt, row, 100] = fault
    after, after_scales = check(c, norm_q)
    for prompt, row in rows:
        assert after_scales[prompt, row].isnan()
        after[prompt, row] = before[prompt, row]
        after_scales[prompt, row] = before_scales[prompt, row]
    assert torch.equal(after, before)
    assert torch.equal(after_scales, before_scales)


@pytest.mark.usefixtures("emulated")
def test_rows_of_zeros() -> None:
    c = case([9], 17, 3, 64, torch.float16)
    c.q[0, 5] = 0
    check(c)
    check(c, torch.ones(192))
    c.values_transposed[..., :9] = 0
    values, scales = check(c)
    assert not values.any()
    assert scales.eq(1).all()


@pytest.mark.usefixtures("emulated")
def test_memory_beyond_the_length_does_not_matter() -> None:
    c = case([9, 20], 17, 3, 64, torch.bfloat16, capacity=48)
    values, scales = launch.cross_attention_quantize(*c)
    for prompt, length in enumerate([9, 20]):
        c.keys[prompt, :, length:] = torch.nan
        c.values_transposed[prompt, ..., length:] = 0
    again, again_scales = launch.cross_attention_quantize(*c)
    assert torch.equal(values, again)
    assert torch.equal(scales, again_scales)


def test_one_launch_and_no_more_products_than_needed(emulated: Any) -> None:
    c = case([61, 17], 33, 16, 72, torch.float16, capacity=304)
    emulated.count()
    check(c)
    counted = emulated.count()
    # blocks of 16 tokens and keys: 5 steps of q k^T twice, 9 tiles of p v, one for the sums
    assert counted["launches"] == 1
    assert counted["half_products"] == 3 * 16 * (4 + 2) * (2 * 5 + 9 + 1)


@pytest.mark.usefixtures("emulated_turing")
@pytest.mark.parametrize("shape", [(20, 112), (3, 64)], ids=str)
def test_turing(shape: tuple[int, int]) -> None:
    check(case([7, 33], 17, *shape, torch.float16), torch.rand(shape[0] * shape[1]) + 0.5)
    with pytest.raises(UnsupportedDevice):
        launch.cross_attention_quantize(*case([7], 3, *shape, torch.bfloat16))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 65536}, "size"),
        ({"heads": 21, "head_dim": 112}, "size"),
        ({"heads": 17, "head_dim": 128}, "size"),
        ({"heads": 1, "head_dim": 72}, "size"),
        ({"head_dim": 36}, "size"),
        ({"capacity": 0}, "size"),
    ],
    ids=str,
)
def test_refuses(changes: dict[str, int | None], message: str) -> None:
    memory = torch.zeros(1 << 16, dtype=torch.uint8)
    pointers = ("q", "norm_q", "keys", "values_transposed", "lengths", "static_scale", "values", "scales")
    arguments: dict[str, Any] = dict.fromkeys(pointers, memory)
    sizes = {"prompts": 1, "tokens": 1, "heads": 2, "head_dim": 32, "capacity": 16, "type": 1}
    arguments |= {**sizes, "norm_eps": 0.0}
    for name, change in changes.items():
        arguments[name] = memory[change:] if name in pointers and change is not None else change
    with pytest.raises(InvalidInput, match=message):
        library.load().call("cross_attention_quantize", memory.device, **arguments)


def test_maps(tmp_path: Path) -> None:
    """Every element once, and fragments of both products that belong together: cross_attention_maps.cpp."""
    program = tmp_path / "maps"
    flags = [
        "-std=c++17",
        "-DSANA_EDGE_EMULATED=890",
        "-DSANA_EDGE_BUILDING",
        f"-I{HERE.parents[2] / 'csrc'}",
    ]
    compiler = os.environ.get("CXX", "g++")
    source = HERE / "cross_attention_maps.cpp"
    emulator = HERE.parents[2] / "csrc" / "emulator" / "emulator.cpp"
    subprocess.run([compiler, *flags, source, emulator, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0
