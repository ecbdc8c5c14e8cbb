"""The denoiser's operations against their definitions in sana_edge.kernels.reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import ops
from sana_edge.kernels import reference

# both code paths: without gradients tensors are reused and work is cut into pieces
MODES = pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def check(op: Callable[..., Tensor], definition: Callable[..., Tensor], *args: object, grad: bool) -> None:
    """Same values as the definition: to fp32 rounding, or to twice the rounding of a bf16 result."""
    expected = definition(*args)
    given = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    with torch.set_grad_enabled(grad):
        actual = op(*given)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    bound = 1e-6 if actual.dtype == torch.float32 else 2 * 2**-8
    distance = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert distance <= bound


@MODES
@DTYPES
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "width"), [(1, 1, 1, 8), (2, 63, 3, 32), (3, 100, 5, 16)]
)
def test_relu_linear_attention(
    rows: int, tokens: int, heads: int, width: int, dtype: torch.dtype, grad: bool
) -> None:
    # slices of a fused tensor, as the denoiser has them
    fused = torch.randn(rows, tokens, 3 * heads * width).abs().to(dtype)
    q, k, v = fused.chunk(3, dim=-1)
    check(ops.relu_linear_attention, reference.relu_linear_attention, q, k, v, heads, grad=grad)


@MODES
def test_relu_linear_attention_of_tokens_without_positive_entries_is_zero(grad: bool) -> None:
    q, k, v = torch.randn(3, 1, 6, 8)
    q[:, 2] = -q[:, 2].abs()
    with torch.set_grad_enabled(grad):
        output = ops.relu_linear_attention(q.clone(), k.clone(), v, 1)
    assert output.isfinite().all() and not output[:, 2].any() and output[:, 3].any()


@MODES
def test_relu_linear_attention_stays_fp32_under_autocast(grad: bool) -> None:
    q, k, v = torch.randn(3, 2, 50, 32).unbind(0)
    expected = reference.relu_linear_attention(q, k, v, 2)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        actual = ops.relu_linear_attention(q.clone(), k.clone(), v, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@MODES
@DTYPES
@pytest.mark.parametrize("masked", [False, True])
def test_cross_attention(masked: bool, dtype: torch.dtype, grad: bool) -> None:
    q, k, v = (torch.randn(2, 3, length, 24).to(dtype) for length in (35, 13, 13))
    mask = (torch.arange(13) < torch.tensor([[4], [13]]))[:, None, None] if masked else None
    check(ops.cross_attention, reference.cross_attention, q, k, v, mask, grad=grad)


@MODES
@DTYPES
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "tokens", "width", "out"), [(1, 1, 8, 3), (3, 63, 100, 40)])
def test_linear(
    rows: int, tokens: int, width: int, out: int, bias: bool, dtype: torch.dtype, grad: bool
) -> None:
    x, weight = torch.randn(rows, tokens, width).to(dtype), torch.randn(out, width).to(dtype)
    check(ops.linear, reference.linear, x, weight, torch.randn(out).to(dtype) if bias else None, grad=grad)


@MODES
@DTYPES
@pytest.mark.parametrize("shape", [(40,), (3, 1, 40)], ids=["shared", "per-row"])
def test_norm_modulate(shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> None:
    x, scale, shift = (3 * torch.randn(3, 7, 40) + 1).to(dtype), torch.randn(shape), torch.randn(shape)
    check(ops.norm_modulate, reference.norm_modulate, x, scale.to(dtype), shift.to(dtype), 1e-6, grad=grad)


@MODES
@DTYPES
def test_rms_norm(dtype: torch.dtype, grad: bool) -> None:
    x, weight = (torch.randn(2, 7, 120) * 5).to(dtype)[..., 40:80], torch.randn(40).to(dtype)
    check(ops.rms_norm, reference.rms_norm, x, weight, 1e-5, grad=grad)


@MODES
@DTYPES
@pytest.mark.parametrize(("rows", "height", "width", "hidden"), [(1, 1, 1, 4), (2, 5, 9, 24), (3, 12, 3, 17)])
def test_glu_depthwise(
    rows: int, height: int, width: int, hidden: int, dtype: torch.dtype, grad: bool
) -> None:
    x, weight, bias = (
        torch.randn(shape).to(dtype)
        for shape in ((rows, height * width, 2 * hidden), (2 * hidden, 1, 3, 3), (2 * hidden,))
    )
    check(ops.glu_depthwise, reference.glu_depthwise, x, weight, bias, height, width, grad=grad)


@MODES
@DTYPES
@pytest.mark.parametrize("hidden", [16, 400])
def test_expand_glu_depthwise_in_one_and_in_several_pieces(
    hidden: int, dtype: torch.dtype, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_PIECE_BYTES", 1)
    x, weight, bias = torch.randn(2, 54, 30), torch.randn(2 * hidden, 30) / 5, torch.randn(2 * hidden)
    expand = (weight.to(dtype), bias.to(dtype))
    depthwise = (torch.randn(2 * hidden, 1, 3, 3).to(dtype), torch.randn(2 * hidden).to(dtype))

    def definition(x: Tensor) -> Tensor:
        return reference.glu_depthwise(reference.linear(x, *expand), *depthwise, 6, 9)

    def columns_of(x: Tensor) -> ops.Columns:
        return lambda start, stop: ops.linear(x, *(tensor[start:stop] for tensor in expand))

    def op(x: Tensor) -> Tensor:
        return ops.expand_glu_depthwise(x, columns_of(x), depthwise, 6, 9)

    check(op, definition, x.to(dtype), grad=grad)


@MODES
def test_sums_are_in_place_only_without_gradients(grad: bool) -> None:
    x, y, gate = torch.randn(4, 3, 8), torch.randn(4, 3, 8), torch.randn(4, 1, 8)
    expected = x + gate * y
    with torch.set_grad_enabled(grad):
        given = x.clone()
        actual = ops.add(given, y, gate)
        torch.testing.assert_close(actual, expected)
        assert (actual is given) is not grad
        given = x.clone()
        parts = ops.add_parts(given, [y[:2], gate[2:]])
        torch.testing.assert_close(parts, torch.cat([x[:2] + y[:2], x[2:] + gate[2:]]))
        assert (parts is given) is not grad
        given = x.clone()
        saturated = ops.saturate(given, 0.5)
        torch.testing.assert_close(saturated, F.hardtanh(x, -0.5, 0.5))
        assert (saturated is given) is not grad


@pytest.mark.parametrize("width", [32, 24])
def test_triton_trains_where_it_can(interpreted: None, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Values and gradients of torch, also of heads that Triton has not, but for the order of fp32 sums."""
    heads, (height, columns) = 2, (3, 5)
    C, hidden = heads * width, 16
    qkv = torch.randn(2, height * columns, 3 * C, requires_grad=True)
    x = torch.randn(2, height * columns, 2 * hidden, requires_grad=True)
    weight = torch.randn(2 * hidden, 1, 3, 3, requires_grad=True)
    bias = torch.randn(2 * hidden, requires_grad=True)
    inputs = (qkv, x, weight, bias)

    def run() -> list[Tensor]:
        attended = ops.relu_linear_attention(*qkv.chunk(3, dim=-1), heads)
        mixed = ops.glu_depthwise(x, weight, bias, height, columns)
        gradients = torch.autograd.grad((attended.square().sum(), mixed.square().sum()), inputs)
        return [attended, mixed, *gradients]

    expected = run()
    monkeypatch.setattr(ops, "_triton_trains", lambda _: True)
    for actual, wanted in zip(run(), expected, strict=True):
        assert (actual - wanted).norm() <= 1e-4 * wanted.norm()
    with torch.inference_mode():
        # x is scratch then
        monkeypatch.setattr(ops, "_triton_trains", lambda _: pytest.fail("no gradient is recorded"))
        ops.glu_depthwise(x.detach().clone(), weight, bias, height, columns)
