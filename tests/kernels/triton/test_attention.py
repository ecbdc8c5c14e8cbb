"""Attention of the GPU path in Triton against `reference_fused`, interpreted; and compiled ahead of time."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference_fused

EPS = 1e-15
U = 2.0**-24
# a number's distance from its neighbour: half of it is lost by rounding to nearest, all of it where Triton's
# interpreter cuts bf16 off; and the smallest numbers
STEPS = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SMALLEST = {torch.float32: 0.0, torch.float16: 2**-24, torch.bfloat16: 0.0}
DTYPES = pytest.mark.parametrize("dtype", list(STEPS), ids=["fp32", "fp16", "bf16"])
# images, tokens, heads, head dim: one token; less than a tile; several chunks; 24 by 32 tokens are 768
SHAPES = [(1, 1, 1, 16), (2, 17, 3, 32), (1, 290, 1, 32), (1, 70, 1, 64)]
Rows = tuple[Tensor, Tensor]


@pytest.fixture
def op(interpreted: None) -> Iterator[ModuleType]:
    """The kernels' module, while new tensors are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield importlib.import_module("sana_edge.kernels.triton.attention")
    torch.use_deterministic_algorithms(False)


def heads_of(t: Tensor, heads: int) -> Tensor:
    """(B, N, C) to (B, heads, N, d) in fp64."""
    return t.double().unflatten(-1, (heads, -1)).transpose(1, 2)


def product(B: int, N: int, C: int, K: int = 48) -> tuple[Tensor, ...]:
    """INT8 tokens, scales, weight (3 C, K), its scales, and a bias: results of the size of 1."""
    values, weight = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((B, N, K), (3 * C, K)))
    return values, torch.rand(B, N) / 64, weight, torch.rand(3 * C) / (64 * K**0.5), torch.randn(3 * C) / 2


def near(found: Tensor, right: Tensor, error: Tensor) -> None:
    off = (found.double() - right).abs() - error
    assert bool((off <= 0).all()), f"{int((off > 0).sum())} values, by up to {float(off.max())}"


def check_state(state: Tensor, k: Tensor, v: Tensor, heads: int, more: int = 0) -> None:
    """Sums of N products in fp32, in any order, each of 16 single operations and ``more``, in fp64."""
    k, v = heads_of(k, heads).relu(), heads_of(v, heads)
    ones = torch.ones_like(v[..., :1])
    right = k.transpose(2, 3) @ v, (k.transpose(2, 3) @ ones).transpose(2, 3)
    size = k.transpose(2, 3) @ v.abs(), right[1]
    near(state, torch.cat(right, 2), (k.shape[2] + 16 + more) * U * torch.cat(size, 2))


def within(found: Rows, y: Tensor, error: Tensor, dtype: torch.dtype, given: Tensor | None = None) -> None:
    """Half a step from y in fp64, and what its error and its rounding to ``dtype`` add.

    The largest error of a row over its absmax is the relative error of its scale, besides two roundings. In
    steps it counts twice, from y and from the scale.
    """
    values, scales = found
    assert values.dtype == torch.int8 and scales.dtype == torch.float32
    error = error + STEPS[dtype] * (y.abs() + error) + SMALLEST[dtype]
    absmax = y.abs().amax(-1, keepdim=True)
    step = absmax / 127 if given is None else given.double().expand_as(absmax)
    step = torch.where(step == 0, 1.0, step)
    relative = error.amax(-1, keepdim=True) / (127 * step) + 4 * U
    near(scales.unsqueeze(-1), step, step * relative)
    near(values, (y / step).clamp(-127, 127), 0.5 + 2 * 127 * relative)


def finish(
    q: Tensor, state: Tensor, eps: float, roots: Tensor | None = None, norm: Tensor | None = None
) -> Rows:
    """What `linear_attention_finish` quantizes, in fp64, and its error in fp32.

    Sums of d products, above and below the line, and fewer than 16 single operations.
    """
    q = q.double()
    if roots is not None and norm is not None:
        q = q * roots[..., :1].double() * norm.double()
    q, state = heads_of(q.relu(), state.shape[1]), state.double()
    divisor = q @ state[:, :, -1:].transpose(2, 3) + eps
    units = 2 * (2 * q.shape[-1] + 16) * U
    y, size = q @ state[:, :, :-1] / divisor, q @ state[:, :, :-1].abs() / divisor
    return y.transpose(1, 2).flatten(2), units * size.transpose(1, 2).flatten(2)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qkv(op: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    B, N, heads, d = shape
    inputs = product(B, N, heads * d)
    q, state = op.qkv_linear_attention(*inputs, dtype, heads)
    expected = reference_fused.qkv_linear_attention(*inputs, dtype, heads)
    # as Triton's interpreter rounds them
    rounded = op.w8a8_linear(*inputs, dtype).chunk(3, dim=-1)
    assert torch.equal(q, rounded[0].relu()) and state.shape == (B, heads, d + 1, d)
    check_state(state, *rounded[1:], heads)
    if dtype != torch.bfloat16:
        assert torch.equal(q, expected[0])
        check_state(expected[1], *rounded[1:], heads)
    found = op.linear_attention_finish(q, state, EPS)
    within(found, *finish(q, state, EPS), dtype)
    # ReLU is applied once more, to no effect, or for the first time
    again = op.linear_attention_finish(rounded[0], state, EPS)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    right = reference_fused.linear_attention_finish(q, state, EPS)
    assert int((found[0].int() - right[0].int()).abs().max()) <= (1 if dtype != torch.bfloat16 else 2)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_qk_norm(op: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """A root's square is a sum of C terms: it errs by half of C + 4 units, of three more operations."""
    B, N, heads, d = shape
    C = heads * d
    qkv, norm_q, norm_k = torch.randn(B, N, 3 * C).to(dtype), torch.randn(C), torch.randn(C)
    roots, state = op.qk_norm_linear_attention(qkv, norm_k, heads, 1e-5)
    parts = qkv.double().chunk(3, dim=-1)
    exact = torch.stack([(t.square().mean(-1) + 1e-5).rsqrt() for t in parts[:2]], -1)
    near(roots, exact, (C / 2 + 8) * U * exact)
    near(
        reference_fused.qk_norm_linear_attention(qkv, norm_k, heads, 1e-5)[0], exact, (C / 2 + 8) * U * exact
    )
    check_state(state, parts[1] * exact[..., 1:] * norm_k.double(), parts[2], heads, C)
    q = qkv[..., :C]
    found = op.linear_attention_finish(q, state, EPS, roots, norm_q)
    within(found, *finish(q, state, EPS, roots, norm_q), dtype)


def test_many_chunks(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op.linear_attention, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(op.linear_attention, "MOST_CHUNKS", 3)
    qkv = torch.randn(1, 385, 96)
    check_state(op._state(qkv, None, None, 2), *qkv.chunk(3, -1)[1:], 2)


def test_a_missing_token_is_noticed(op: ModuleType) -> None:
    qkv = torch.randn(1, 100, 96)
    state = op._state(qkv[:, :-1].contiguous(), None, None, 2)
    with pytest.raises(AssertionError, match="values, by up to"):
        check_state(state, *qkv.chunk(3, -1)[1:], 2)


def test_the_same_bytes_alone_and_in_a_batch(op: ModuleType) -> None:
    values, scales, *weight = product(2, 90, 64)

    def attend(*tokens: Tensor) -> tuple[Tensor, ...]:
        q, state = op.qkv_linear_attention(*tokens, *weight, torch.float16, 2)
        return *op.linear_attention_finish(q, state, EPS), state

    found, again, alone = attend(values, scales), attend(values, scales), attend(values[1:], scales[1:])
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    assert all(torch.equal(batch[1:], single) for batch, single in zip(found, alone, strict=True))


def test_finish_of_zeros_and_bad_rows(op: ModuleType) -> None:
    """Rows without a positive query give 0 and the scale 1; NaN in one token stays there."""
    q, state = torch.randn(2, 40, 96).half(), torch.randn(2, 3, 33, 32)
    state[:, :, -1] = state[:, :, -1].abs() + 1
    q[0, 5], q[1, 7, 40] = -1, torch.nan
    values, scales = op.linear_attention_finish(q, state, EPS)
    assert not values[0, 5].any() and scales[0, 5] == 1
    assert scales.isnan().nonzero().tolist() == [[1, 7]] and not values[1, 7].any()
    given = torch.tensor(0.0023)
    values, scales = op.linear_attention_finish(q, state, EPS, static_scale=given)
    fine = scales == given
    assert int((~fine).sum()) == 1 and int(values.abs().max()) == 127
    y, error = finish(q[:1], state[:1], EPS)
    within((values[:1], scales[:1]), y, error, torch.float16, given)
    assert torch.equal(
        reference_fused.linear_attention_finish(q, state, EPS, static_scale=given)[1].isnan(), ~fine
    )


def test_empty(op: ModuleType) -> None:
    for shape in ((0, 5, 96), (2, 0, 96)):
        state = op._state(torch.zeros(shape), None, None, 2)
        assert state.shape == (shape[0], 2, 17, 16) and not state.any()
        values, scales = op.linear_attention_finish(torch.zeros(shape)[..., :32], state, EPS)
        assert values.shape == (*shape[:2], 32) and scales.shape == shape[:2]
    keys = torch.zeros(0, 2, 4, 16)
    values, _ = op.cross_attention_quantize(
        torch.zeros(0, 5, 32), keys, keys.mT.contiguous(), torch.zeros(0, dtype=torch.int32)
    )
    assert values.shape == (0, 5, 32)


def cross(R: int, T: int, heads: int, d: int, capacity: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    q, keys = torch.randn(R, T, heads * d), torch.randn(R, heads, capacity, d)
    values, lengths = torch.randn(R, heads, d, capacity), torch.randint(1, capacity + 1, (R,))
    lengths[0] = capacity
    return q.to(dtype), keys.to(dtype), values.to(dtype), lengths.int()


def read(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, norm: Tensor | None = None, eps: float = 1e-5
) -> Rows:
    """What `cross_attention_quantize` quantizes, in fp64, and its error.

    Scores are sums of d products, of a normalised query, which errs by (C / 2 + 8) units, in two parts: of
    16 bits these keep 21 digits of fp16, 15 of bf16, and a part below fp16's numbers is off by 2^-25.
    exp turns a score's error s, and that of the largest, into 2 s of the weight, and as much of their sum;
    weights of 16 bits add half a step, or 2^-25 where they are below fp16's numbers; sums of L terms L units.
    """
    dtype, (heads, L, d) = q.dtype, keys.shape[1:]
    q64, C = q.double(), q.shape[2]
    units = (d + 16) * U
    if norm is not None:
        q64 = q64 * (q64.square().mean(-1, keepdim=True) + eps).rsqrt() * norm.double()
        units += (C / 2 + 8) * U + STEPS[dtype] ** 2
    q64, k64, v64 = heads_of(q64, heads), keys.double(), values.double().mT
    scale = d**-0.5
    mask = (torch.arange(L) < lengths[:, None])[:, None, None]
    scores = (q64 @ k64.mT * scale).masked_fill(~mask, -math.inf)
    s = units * (q64.abs() @ k64.abs().mT * scale)
    s = (
        (s + SMALLEST[dtype] * k64.abs().sum(-1).unsqueeze(2) * scale)
        .masked_fill(~mask, 0)
        .amax(-1, keepdim=True)
    )
    weights = scores.softmax(-1)
    error = (weights @ v64.abs()) * (4 * s + STEPS[dtype] + (2 * L + 32) * U)
    error += L * SMALLEST[dtype] * v64.abs().amax(2, keepdim=True)
    return tuple(t.transpose(1, 2).flatten(2) for t in (weights @ v64, error))


# prompts, tokens, heads, head dim, capacity: one key; SANA's heads and capacity; tails
CROSS = [(1, 1, 1, 16, 1), (2, 21, 2, 72, 70), (1, 3, 1, 112, 304), (3, 65, 2, 64, 33), (1, 17, 3, 5, 40)]


@DTYPES
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", CROSS, ids=str)
def test_cross(op: ModuleType, shape: tuple[int, ...], norm: bool, dtype: torch.dtype) -> None:
    inputs = cross(*shape, dtype)
    norm_q = torch.randn(shape[2] * shape[3]) if norm else None
    found = op.cross_attention_quantize(*inputs, norm_q)
    within(found, *read(*inputs, norm_q), dtype)
    within(reference_fused.cross_attention_quantize(*inputs, norm_q), *read(*inputs, norm_q), dtype)


def test_what_is_behind_the_lengths_is_not_read(op: ModuleType) -> None:
    q, keys, values, _ = cross(2, 20, 2, 16, 100, torch.float16)
    lengths = torch.tensor([65, 3], dtype=torch.int32)
    expected = op.cross_attention_quantize(q, keys, values, lengths)
    for i, length in enumerate(lengths):
        keys[i, :, length:], values[i, :, :, length:] = torch.nan, torch.inf
    found = op.cross_attention_quantize(q, keys, values, lengths)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert bool(found[1].isfinite().all())


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_cross_of_large_scores_and_bad_rows(op: ModuleType) -> None:
    """One key takes all; the largest may come last. NaN in a token stays there."""
    q, keys, values, lengths = cross(1, 20, 2, 16, 90, torch.float16)
    q, q[0, 4, 20] = q * 200, torch.nan
    lengths[0], given = 89, torch.tensor(0.01)
    y, error = read(q, keys, values, lengths)
    fine = torch.arange(20) != 4
    for asked in (None, given):
        found = op.cross_attention_quantize(q, keys, values, lengths, static_scale=asked)
        assert found[1][0, 4].isnan() and not found[0][0, 4].any()
        within((found[0][:, fine], found[1][:, fine]), y[:, fine], error[:, fine], torch.float16, asked)


def test_refusals(op: ModuleType) -> None:
    q, keys, values, lengths = cross(2, 5, 2, 16, 7, torch.float32)

    def refused(match: str, function: Callable[..., object], *inputs: object) -> None:
        with pytest.raises(InvalidInput, match=match) as caught:
            function(*inputs)
        assert caught.value.hint

    ask = op.cross_attention_quantize
    refused("lengths of .* is", ask, q, keys, values, lengths.long())
    refused("keys of .* is torch.float16", ask, q, keys.half(), values, lengths)
    refused("values_transposed of .* is", ask, q, keys, values.mT.contiguous(), lengths)
    refused("for 32 channels", ask, q, keys[:, :1], values, lengths)
    refused("norm_q of .* is", ask, q, keys, values, lengths, torch.ones(16))
    refused("static_scale of", ask, q, keys, values, lengths, None, 1e-5, torch.ones(2))
    ask = op.linear_attention_finish
    state, roots = torch.ones(2, 2, 17, 16), torch.ones(2, 5, 2)
    refused("state of .* is", ask, q, state[:, :, :-1], EPS)
    refused("in 0 heads", ask, q, state[0], EPS)
    refused("one of roots and norm_q", ask, q, state, EPS, roots)
    refused("roots of .* is", ask, q, state, EPS, roots[:1], torch.ones(32))
    refused("q of .* is", ask, q.mT, state, EPS)
    refused("32 channels in 4 heads", op.qk_norm_linear_attention, q.repeat(1, 1, 3), torch.ones(32), 4, 1e-5)
    refused("qkv of .* is", op.qk_norm_linear_attention, q, torch.ones(32), 2, 1e-5)
    values8, scales, weight, columns, bias = product(1, 4, 32)
    refused(
        "qkv_linear_attention has", op.qkv_linear_attention, values8, scales, weight[:95], columns, bias, 0, 2
    )


STATES = ("p_parts", "p_state", "p_roots", "p_norm", "p_scales")
KERNELS = [
    ("kv_state", "fp16", 32, False),
    ("linear_attention_finish", "fp16", 32, False),
    ("cross_attention", "fp16", 72, False),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("rms_roots", "bf16", 32, True),
            ("kv_state", "bf16", 32, True),
            ("kv_state", "fp32", 32, False),
            ("linear_attention_finish", "bf16", 32, True),
            ("linear_attention_finish", "fp32", 64, True),
            ("cross_attention", "bf16", 112, True),
            ("cross_attention", "fp16", 64, True),
            ("cross_attention", "fp32", 72, False),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "kind", "D", "norm"), KERNELS)
def test_compiles(
    op: ModuleType, compiled: Callable[..., dict[str, str]], kernel: str, kind: str, D: int, norm: bool
) -> None:
    tile, crossed, wide = op.linear_attention.TILES.get(D), op.CROSS[4 if kind == "fp32" else 2], 2240
    options, constexprs = {
        "rms_roots": ({"num_warps": op.int8_tile.pick_tile(wide).warps}, {}),
        "kv_state": ({"num_warps": tile and tile.warps, "num_stages": 1}, {"BLOCK_N": tile and tile.summed}),
        "linear_attention_finish": ({"num_warps": op.FINISHED_WARPS}, {"BLOCK_N": op.FINISHED}),
        "cross_attention": (
            {"num_warps": crossed.warps, "num_stages": 1},
            {"BLOCK_N": crossed.tokens, "BLOCK_L": crossed.keys},
        ),
    }[kernel]
    names = getattr(op, f"{kernel}_kernel").arg_names
    left_out: dict[str, object] = {"p_static": None} | ({} if norm else {"p_norm": None, "p_roots": None})
    rows = op.int8_tile.pick_tile(wide)
    known = {"D": D, "BLOCK_D": 1 << (D - 1).bit_length(), "WIDEN": False, **left_out}
    known |= {"C": wide, "PARTS": 2, "ROWS": rows.rows, "BLOCK": rows.block, **constexprs}
    known = {name: value for name, value in known.items() if name in names}
    signature = {name: "i32" for name in names if name not in known}
    signature |= {name: "*fp32" if name in STATES else f"*{kind}" for name in signature if name[:2] == "p_"}
    special = {"eps": "fp32", "scale": "fp32", "p_lengths": "*i32"}
    special |= {"p_values": "*i8"} if kernel == "linear_attention_finish" else {}
    signature |= {name: kind for name, kind in special.items() if name in signature}
    multiples = [name for name in names if name.endswith(("_row", "_token")) or name == "capacity"]
    code = compiled(f"attention_kernels.{kernel}_kernel", signature, known, multiples, **options)
    assert not re.search(r"\b(atom|red)\.", code["ptx"])
    assert int(code["shared"]) <= 99 << 10
    # on 12.0 at most four registers, of wide heads
    stack = re.search(r"STACK:(\d+)", code["usage"])
    assert stack and int(stack[1]) <= (16 if kernel == "cross_attention" and D > 64 else 0), code["usage"]
    if kernel == "rms_roots":
        return
    exact = kind != "fp32" and (kernel == "cross_attention" or (kernel == "kv_state" and not norm))
    factors = {"fp16": "f16.f16", "bf16": "bf16.bf16"}[kind] if exact else "tf32.tf32"
    assert re.search(rf"mma(\.sync|_async)\S*\.{re.escape(factors)}", code["ptx"])
