"""The Mix-FFN's middle in Triton, its gradient, and its INT8 rows, interpreted; and compiled."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference, reference_fused

# images, height, width, hidden: one pixel; a row, a column; tiles with tails; more rows than a program has
SHAPES = [(1, 1, 1, 1), (2, 1, 5, 3), (1, 7, 1, 66), (2, 3, 17, 5), (1, 17, 3, 64)]
# a number's distance from its neighbour: half of it is lost by rounding to nearest, all of it where Triton's
# interpreter cuts bf16 off; and the smallest numbers, of fp32 where exp has overflowed
STEPS = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
SMALLEST = {torch.float32: 2.0**-100, torch.float16: 2**-24, torch.bfloat16: 2.0**-100}
DTYPES = pytest.mark.parametrize("dtype", list(STEPS), ids=["fp32", "fp16", "bf16"])
U = 2.0**-24


@pytest.fixture
def op(interpreted: None) -> Iterator[ModuleType]:
    """The kernels' module, while new tensors are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield importlib.import_module("sana_edge.kernels.triton.mix_ffn")
    torch.use_deterministic_algorithms(False)


class Inputs(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor
    height: int
    width: int


def inputs(B: int, H: int, W: int, hidden: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """x (B, N, 2h), weight (2h, 1, 3, 3) and bias (2h,)."""
    x = 2 * torch.randn(B, H * W, 2 * hidden)
    weight, bias = torch.randn(2 * hidden, 1, 3, 3) / 3, torch.randn(2 * hidden)
    return Inputs(x.to(dtype), weight.to(dtype), bias.to(dtype), H, W)


def results(function: Callable[..., Tensor], given: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of x, weight and bias."""
    x, weight, bias = (tensor.detach().requires_grad_() for tensor in given[:3])
    out = function(x, weight, bias, given.height, given.width)
    return out.detach(), *torch.autograd.grad(out, (x, weight, bias), grad)


def exact(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """The definition in fp64."""
    image = F.silu(x.double()).transpose(1, 2).reshape(len(x), -1, height, width)
    mixed = F.conv2d(image, weight.double(), bias.double(), padding=1, groups=image.shape[1])
    value, gate = mixed.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    return value * F.silu(gate)


def slope(x: Tensor) -> Tensor:
    """SiLU's derivative, its terms' absolute values added."""
    return x.sigmoid() * (1 + x.abs() * (1 - x.sigmoid()))


def sizes(given: Inputs, grad: Tensor, activate: bool = True) -> tuple[Tensor, ...]:
    """Of output and gradients, what an error of one unit in all that they are made of may come to.

    A convolution errs by units of all its terms' absolute values; SiLU of that by its slope, which is at most
    1.1, and its slope by the second derivative, at most 1/2.
    """
    x, weight, bias = (tensor.double() for tensor in given[:3])
    size = (given.height, given.width)

    def image(t: Tensor) -> Tensor:
        return t.transpose(1, 2).unflatten(2, size)

    def tokens(t: Tensor) -> Tensor:
        return t.flatten(2).transpose(1, 2)

    act = image(F.silu(x) if activate else x)
    groups = x.shape[2]
    value, gate = tokens(F.conv2d(act, weight, bias, padding=1, groups=groups)).chunk(2, dim=-1)
    most = tokens(F.conv2d(act.abs(), weight.abs(), bias.abs(), padding=1, groups=groups))
    most_value, most_gate = most.chunk(2, dim=-1)
    silu, value = F.silu(gate).abs(), value.abs()
    out = most_value * silu + value * (slope(gate) * most_gate + silu)
    of_value = grad.double().abs() * (silu + slope(gate) * most_gate)
    of_gate = grad.double().abs() * (most_value * slope(gate) + value * (slope(gate) + most_gate / 2))
    mixed = image(torch.cat([of_value, of_gate], dim=-1))
    of_x = F.conv_transpose2d(mixed, weight.abs(), padding=1, groups=groups)
    pieces = F.unfold(act.abs(), 3, padding=1).unflatten(1, (groups, 9))
    of_weight = (pieces * mixed.flatten(2).unsqueeze(2)).sum((0, 3)).view_as(weight)
    return out, tokens(of_x) * slope(x), of_weight, mixed.sum((0, 2, 3))


def check(op: ModuleType, given: Inputs, grad: Tensor) -> tuple[Tensor, ...]:
    """Within the rounding of fp32, and of the result's own dtype, of the definition in fp64.

    A sum of n terms in fp32, in any order, is off by at most n units of 2^-24 of its terms' absolute values;
    exp by 8, a division by 4, and single operations by 1. From x to its gradient there are two SiLU and two
    slopes (14 each), two sums (10 each) and fewer than 16 others: below 100. A weight's gradient adds over
    all B · N tokens.
    """
    dtype = given.x.dtype
    actual = results(op.glu_depthwise, given, grad)
    expected = results(exact, Inputs(*(t.double() for t in given[:3]), *given[3:]), grad.double())
    B, N, _ = given.x.shape
    units = (100, 100, 100 + B * N, 100 + B * N)
    for name, got, right, size, unit in zip(
        ("output", "x", "weight", "bias"), actual, expected, sizes(given, grad), units, strict=True
    ):
        assert got.dtype == dtype and got.shape == right.shape and got.is_contiguous()
        error = unit * U * size
        off = (got.double() - right).abs() - error - STEPS[dtype] * (right.abs() + error) - SMALLEST[dtype]
        assert bool((off <= 0).all()), f"{name}: {int((off > 0).sum())} values, by up to {float(off.max())}"
    return actual


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(op: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = inputs(*shape, dtype)
    kept = [tensor.clone() for tensor in given[:3]]
    check(op, given, torch.randn(*given.x.shape[:2], shape[3]).to(dtype))
    assert all(torch.equal(*pair) for pair in zip(kept, given[:3], strict=True))


def test_is_the_reference(op: ModuleType) -> None:
    """fp64 above and the reference in fp32 are the same formula."""
    given, grad = inputs(2, 5, 6, 8), torch.randn(2, 30, 8)
    for got, right in zip(
        results(op.glu_depthwise, given, grad), results(reference.glu_depthwise, given, grad), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_a_missing_pixel_is_noticed(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(1, 9, 3, 16)
    mix = op.glu_depthwise
    off = torch.ones_like(given.x)
    off[:, -1] = 0
    monkeypatch.setattr(op, "glu_depthwise", lambda x, *rest: mix(x * off, *rest))
    with pytest.raises(AssertionError, match="values, by up to"):
        check(op, given, torch.randn(1, 27, 16))


def test_many_chunks(op: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that end in the middle of a row and of a tile; the last one short."""
    monkeypatch.setattr(op, "CHUNK_TOKENS", 20)
    check(op, inputs(2, 7, 11, 3), torch.randn(2, 77, 3))


def test_the_same_bytes_alone_and_in_a_batch(op: ModuleType) -> None:
    given, grad = inputs(2, 2, 17, 6), torch.randn(2, 34, 6)
    together, again = (results(op.glu_depthwise, given, grad) for _ in range(2))
    alone = results(op.glu_depthwise, given._replace(x=given.x[1:].clone()), grad[1:])
    assert all(torch.equal(*pair) for pair in zip(together, again, strict=True))
    assert all(torch.equal(batch[1:], single) for batch, single in zip(together[:2], alone[:2], strict=True))


def test_dtypes_of_their_own_and_layouts_of_the_gradient(op: ModuleType) -> None:
    given = inputs(1, 4, 5, 8)
    mixed = given._replace(x=given.x.bfloat16())
    grad = torch.randn(1, 8, 20).transpose(1, 2)
    out, *grads = results(op.glu_depthwise, mixed, grad.bfloat16())
    assert out.dtype == grads[0].dtype == torch.bfloat16 and grads[1].dtype == grads[2].dtype == torch.float32
    check(op, given, grad)
    check(op, given, torch.ones(()).expand(1, 20, 8))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
def test_nan_and_infinity_reach_their_neighbours_only(op: ModuleType) -> None:
    given = inputs(2, 5, 18, 4)
    given.x[0, 2 * 18 + 16, 1], given.x[1, 4 * 18 + 17, 6] = torch.nan, torch.inf
    out = op.glu_depthwise(*given)
    assert torch.equal(out.isfinite(), reference.glu_depthwise(*given).isfinite())
    assert int((~out.isfinite()).sum()) == 9 + 4 and not out[0, 2 * 18 + 16, 1].isfinite()


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_large_values(op: ModuleType) -> None:
    """exp overflows below -88: SiLU, its gradient and what they meet are 0 there, not NaN."""
    given = inputs(1, 3, 4, 2)
    given.x[0, ::2] *= 1000
    check(op, given, torch.randn(1, 12, 2))


def test_empty(op: ModuleType) -> None:
    out, *grads = results(op.glu_depthwise, inputs(0, 3, 4, 2), torch.zeros(0, 12, 2))
    assert out.shape == (0, 12, 2) and not any(bool(grad.any()) for grad in grads)
    values, scales = op.dwconv_glu_quantize(*rows(inputs(0, 3, 4, 2)))
    assert values.shape == (0, 12, 2) and scales.shape == (0, 12)


def rows(given: Inputs) -> Inputs:
    """With the weight as the INT8 path has it: (3, 3, 2h)."""
    return given._replace(weight=given.weight.flatten(1).T.reshape(3, 3, -1).contiguous())


def within(found: tuple[Tensor, Tensor], given: Inputs, static_scale: Tensor | None = None) -> None:
    """Half a step from y in fp64, and what fp32 (see `check`; 64 units) and the rounding to x's dtype add.

    The largest error of a row over its absmax is the relative error of its scale, besides two roundings. In
    steps it counts twice, from y and from the scale.
    """
    values, scales = found
    x, weight, bias = (tensor.double() for tensor in given[:3])
    image = x.transpose(1, 2).unflatten(2, given[3:])
    mixed = F.conv2d(image, weight.flatten(0, 1).T.reshape(-1, 1, 3, 3), bias, padding=1, groups=x.shape[2])
    value, gate = mixed.flatten(2).transpose(1, 2).chunk(2, dim=-1)
    y = value * F.silu(gate)
    kernel = given._replace(weight=given.weight.flatten(0, 1).T.reshape(-1, 1, 3, 3))
    error = 64 * U * sizes(kernel, y, activate=False)[0]
    error += STEPS[given.x.dtype] * (y.abs() + error) + SMALLEST[given.x.dtype]
    absmax = y.abs().amax(-1, keepdim=True)
    step = absmax / 127 if static_scale is None else static_scale.double().expand_as(absmax)
    relative = error.amax(-1, keepdim=True) / (127 * step) + 4 * U
    assert ((scales.unsqueeze(-1) - step).abs() <= step * relative).all()
    clipped = (y / step).clamp(-127, 127)
    assert ((values - clipped).abs() <= 0.5 + 2 * 127 * relative).all()


@DTYPES
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 2, 480), (1, 1, 3, 2880), (1, 1, 2, 5600)], ids=str)
def test_rows(op: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = rows(inputs(*shape, dtype))
    found = op.dwconv_glu_quantize(*given)
    assert found[0].dtype == torch.int8 and found[1].dtype == torch.float32
    expected = reference_fused.dwconv_glu_quantize(*given)
    within(found, given)
    within(expected, given)
    if dtype != torch.bfloat16:
        assert int((found[0].int() - expected[0].int()).abs().max()) <= 1
        assert float((found[0] != expected[0]).float().mean()) < 0.02


def test_one_given_scale(op: ModuleType) -> None:
    given, scale = rows(inputs(2, 3, 7, 33, torch.float16)), torch.tensor(0.0113)
    given.x[1, 8, 3] = torch.nan
    values, scales = op.dwconv_glu_quantize(*given, scale)
    expected = reference_fused.dwconv_glu_quantize(*given, scale)
    assert torch.equal(scales.isnan(), expected[1].isnan()) and int(scales.isnan().sum()) == 9
    fine = ~scales.isnan()
    assert bool((scales[fine] == scale).all()) and not values[~fine].any()
    assert int((values[fine].int() - expected[0][fine].int()).abs().max()) <= 1
    assert int(values.abs().max()) == 127


def test_rows_of_zeros_and_saturated_ones(op: ModuleType) -> None:
    given = rows(inputs(1, 4, 4, 8, torch.float16))
    nothing = given._replace(x=torch.zeros_like(given.x), bias=torch.zeros_like(given.bias))
    values, scales = op.dwconv_glu_quantize(*nothing)
    assert not values.any() and bool((scales == 1).all())
    # beyond fp16: infinity, which a scale of NaN shows
    values, scales = op.dwconv_glu_quantize(*given._replace(x=torch.full_like(given.x, 6e4)))
    expected = reference_fused.dwconv_glu_quantize(*given._replace(x=torch.full_like(given.x, 6e4)))
    assert torch.equal(scales.isnan(), expected[1].isnan()) and bool(scales.isnan().any())


def test_rows_and_nothing_else(op: ModuleType) -> None:
    """21 pixels are five tiles of four tokens, and one."""
    given = rows(inputs(1, 3, 7, 100))
    tile = op.pick_tile(100)
    values = torch.full((21 + tile.rows, 100), -128, dtype=torch.int8)
    scales = torch.full((21 + tile.rows,), math.nan)
    op.dwconv_glu_quantize_kernel[(-(-21 // tile.rows),)](
        *(*given[:3], None, values, scales, 21, 3, 7), HIDDEN=100, ROWS=tile.rows, BLOCK=tile.channels
    )
    within((values[None, :21], scales[None, :21]), given)
    assert (values[21:] == -128).all() and scales[21:].isnan().all()


def test_refusals(op: ModuleType) -> None:
    given = inputs(1, 3, 4, 4)
    for changed, words in (
        ({"x": given.x.int()}, "x of glu_depthwise is torch.int32"),
        ({"height": 4}, r"x of glu_depthwise has shape \(1, 12, 8\) for 4 by 4"),
        ({"x": given.x[..., :7].contiguous()}, r"shape \(1, 12, 7\)"),
        ({"x": given.x[0]}, r"shape \(12, 8\)"),
        ({"x": given.x.mT.contiguous().mT}, "x of glu_depthwise is .* not contiguous"),
        ({"weight": rows(given).weight}, r"weight of glu_depthwise is torch.float32 \(3, 3, 8\)"),
        ({"weight": given.weight.double()}, "weight of glu_depthwise is torch.float64"),
        ({"bias": given.bias[:4]}, r"bias of glu_depthwise is torch.float32 \(4,\)"),
        ({"bias": given.bias.to("meta")}, "bias of .* on meta"),
    ):
        with pytest.raises(InvalidInput, match=words) as caught:
            op.glu_depthwise(*given._replace(**changed))
        assert caught.value.hint
    with pytest.raises(InvalidInput, match="weight of dwconv_glu_quantize is"):
        op.dwconv_glu_quantize(*given)
    with pytest.raises(InvalidInput, match="static_scale of dwconv_glu_quantize is"):
        op.dwconv_glu_quantize(*rows(given), torch.ones(1))


KERNELS = [
    ("forward", "bf16", 2880),
    ("backward", "bf16", 2880),
    ("grad", "bf16", 2880),
    ("rows", "fp16", 2880),
    *(
        pytest.param(kernel, kind, hidden, marks=pytest.mark.slow)
        for kernel, kind, hidden in (
            ("forward", "fp32", 480),
            ("grad", "fp32", 5600),
            ("rows", "bf16", 480),
            ("rows", "bf16", 5600),
            ("rows", "fp32", 2880),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "kind", "hidden"), KERNELS)
def test_compiles(
    op: ModuleType, compiled: Callable[..., dict[str, str]], kernel: str, kind: str, hidden: int
) -> None:
    pointers = dict.fromkeys(("p_x", "p_weight", "p_bias", "p_grad", "p_out"), f"*{kind}")
    pointers |= dict.fromkeys(("p_mixed", "p_parts", "p_scales"), "*fp32") | {"p_values": "*i8"}
    constexprs: dict[str, object] = {"p_static": None}
    if kernel == "rows":
        name, tile = "dwconv_glu_quantize_kernel", op.pick_tile(hidden)
        pointers |= {"p_weight": "*fp32", "p_bias": "*fp32"}
        constexprs |= {"HIDDEN": hidden, "ROWS": tile.rows, "BLOCK": tile.channels}
    elif kernel == "grad":
        name, tile = "glu_depthwise_grad_kernel", op.GRADIENT
        constexprs |= {"CHANNELS": 2 * hidden, "BLOCK_N": tile.rows, "BLOCK_C": tile.channels}
    else:
        name, tile = "glu_depthwise_kernel", op.CONVOLUTION
        pointers |= {"p_out": "*fp32"} if kernel == "backward" else {}
        constexprs |= {"p_grad": None} if kernel == "forward" else {}
        constexprs |= {"HIDDEN": hidden, "ROWS": tile.rows, "BLOCK_X": tile.columns, "BLOCK_C": tile.channels}
    names = getattr(op, name).arg_names
    code = compiled(
        f"mix_ffn_kernels.{name}",
        {arg: pointers.get(arg, "i32") for arg in names if arg not in constexprs},
        {arg: value for arg, value in constexprs.items() if arg in names},
        ["W"],
        num_warps=tile.warps,
    )
    # summed in a fixed order; nothing on the stack; 16 bytes at a time
    assert not re.search(r"\b(atom|red)\.", code["ptx"])
    assert "STACK:0" in code["usage"] and int(code["shared"]) <= 99 << 10, code["usage"]
    assert re.search(r"LDG\S*\.128" if kernel == "rows" else r"LDG\S*\.(64|128)", code["sass"])
