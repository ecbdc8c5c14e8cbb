"""The linear layers, float and INT8: one interface, the same result within INT8's own error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.int8 import matmul, quant
from sana_edge.int8.linear import Linear, W8A8Linear
from sana_edge.kernels import reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
STATIC = pytest.mark.parametrize("static", [False, True], ids=["token", "tensor"])
# (tokens, in, out)
SHAPES = pytest.mark.parametrize("shape", [(1, 9, 5), (7, 30, 21), (17, 100, 64), (300, 64, 700)], ids=str)


def random_linear(width: int, out: int, bias: bool = True) -> Linear:
    layer = Linear(width, out, bias=bias)
    with torch.no_grad():
        layer.weight.normal_().mul_(torch.logspace(-1, 1, out)[:, None])
        if bias:
            layer.bias.normal_()
    return layer


def int8(layer: Linear, x: Tensor, static: bool) -> W8A8Linear:
    return W8A8Linear.from_float(layer, input_scale=quant.tensor_scale(x) if static else None, static=static)


@pytest.mark.parametrize("bias", [False, True])
def test_a_float_layer_is_nn_linear(bias: bool) -> None:
    layer, x = random_linear(30, 21, bias), torch.randn(2, 7, 30)
    expected = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for rows in (x, x[0], x[0, 0]):
            expected = F.linear(rows, layer.weight, layer.bias)
            torch.testing.assert_close(layer(rows), expected, rtol=1e-5, atol=1e-4)
        pieces = [layer.columns(x)(start, stop) for start, stop in ((0, 5), (5, 21))]
        torch.testing.assert_close(torch.cat(pieces, -1), layer(x), rtol=1e-5, atol=1e-4)


def test_a_float_layer_is_trained_whole_and_in_pieces() -> None:
    layer, x = random_linear(30, 21), torch.randn(2, 7, 30, requires_grad=True)
    grads = []
    for output in (F.linear(x, layer.weight, layer.bias), layer(x), torch.cat(
        [layer.columns(x)(0, 8), layer.columns(x)(8, 21)], dim=-1
    )):  # fmt: skip
        grads.append(torch.autograd.grad(output.square().sum(), [x, layer.weight, layer.bias]))
    for actual in grads[1:]:
        for grad, expected in zip(actual, grads[0], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_weight_of_another_dtype_is_cast_when_it_is_used(stored: torch.dtype) -> None:
    layer, x = random_linear(30, 21).to(stored), torch.randn(2, 7, 30)
    expected = F.linear(x, layer.weight.float(), layer.bias.float())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
    assert layer.weight.dtype == stored


@pytest.mark.parametrize("quantized", [False, True])
def test_an_observer_sees_the_float_input(quantized: bool) -> None:
    linear, x = random_linear(30, 21), torch.randn(2, 7, 30)
    layer = W8A8Linear.from_float(linear) if quantized else linear
    seen: list[Tensor] = []
    layer.observer = seen.append
    layer(x)
    layer.columns(x)
    assert len(seen) == 2 and all(one is x for one in seen)
    layer.observer = None
    layer(x)
    assert len(seen) == 2


@DTYPES
@STATIC
@pytest.mark.parametrize("bias", [False, True])
@SHAPES
def test_int8_is_bit_for_bit_as_defined(
    shape: tuple[int, int, int], bias: bool, static: bool, dtype: torch.dtype
) -> None:
    tokens, width, out = shape
    linear, x = random_linear(width, out, bias), torch.randn(2, tokens, width).to(dtype)
    layer = int8(linear, x, static)
    # beyond the calibrated range, where static scales clip
    x[0, 0] *= 3
    scales = quant.row_scales(x) if layer.input_scale is None else layer.input_scale
    steps = scales if static else scales.unsqueeze(-1)
    weight, columns = quant.quantize_weight(linear.weight.detach())
    args = (reference.quantize_tensor(x, steps), scales, weight, columns, linear.bias, dtype)
    actual = layer(x)
    assert actual.dtype == dtype and torch.equal(actual, reference.w8a8_linear(*args))
    prepared = layer.prepare(x)
    cut = out // 3
    pieces = [layer.rows(prepared, 0, cut), layer.rows(prepared, cut, out)]
    assert torch.equal(torch.cat(pieces, -1), actual)
    assert torch.equal(layer.columns(x)(cut, out), pieces[1])


def noise(layer: Linear, x: Tensor, layer8: W8A8Linear) -> Tensor:
    """(out,): the standard deviation of INT8's error for each output channel.

    A rounding is off by a uniform part of a step, variance step² / 12; over K products the errors of the
    activations are weighted with w and those of the weights with x.
    """
    scales = layer8.input_scale if layer8.static else quant.row_scales(x).unsqueeze(-1)
    assert scales is not None
    weight, columns = layer.weight.detach(), layer8.weight_scale
    inputs = scales.square().mean() * weight.square().sum(1) / 12
    weights = columns.square() * x.square().sum(-1).mean() / 12
    return (inputs + weights).sqrt()


def distances(layer: Linear, x: Tensor, layer8: W8A8Linear) -> Tensor:
    """(out,): RMS distance of INT8 from float in standard deviations of the expected noise."""
    moved = (layer8(x) - layer(x)).flatten(0, -2)
    return moved.square().mean(0).sqrt() / noise(layer, x, layer8)


# a channel's error is the RMS over 120 tokens, themselves sums of 200 roundings: its own deviation is about
# sqrt(1 / 240) of it, as much again comes from the roundings of its weights, and 40 channels stay within four
# times the two
TOLERANCE = 1.6


@STATIC
def test_int8_is_as_close_to_float_as_its_rounding_allows(static: bool) -> None:
    linear, x = random_linear(200, 40), torch.randn(2, 60, 200)
    with torch.no_grad():
        found = distances(linear, x, int8(linear, x, static))
    assert found.min() > 1 / TOLERANCE and found.max() < TOLERANCE


def scaled(name: str, factor: float) -> Callable[[W8A8Linear], None]:
    def change(layer: W8A8Linear) -> None:
        getattr(layer, name).mul_(factor)

    return change


def one_channel(name: str) -> Callable[[W8A8Linear], None]:
    """One output channel has what belongs to another."""

    def change(layer: W8A8Linear) -> None:
        # the bias shares the float layer's memory
        tensor = getattr(layer, name).clone()
        tensor[7] = tensor[23].clone()
        setattr(layer, name, tensor)

    return change


def two_inputs(layer: W8A8Linear) -> None:
    layer.weight[:, [3, 9]] = layer.weight[:, [9, 3]]


def no_bias(layer: W8A8Linear) -> None:
    layer.bias = None


FAULTS: dict[str, Callable[[W8A8Linear], None]] = {
    "weight scale twice too large": scaled("weight_scale", 2),
    "weight scale a tenth too large": scaled("weight_scale", 1.1),
    "weight scale of another channel": one_channel("weight_scale"),
    "weight of another channel": one_channel("weight"),
    "bias of another channel": one_channel("bias"),
    "input channels swapped": two_inputs,
    "bias dropped": no_bias,
}


@STATIC
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_far_outside_of_the_tolerance(fault: str, static: bool) -> None:
    linear, x = random_linear(200, 40), torch.randn(2, 60, 200)
    with torch.no_grad():
        layer = int8(linear, x, static)
        FAULTS[fault](layer)
        assert distances(linear, x, layer).max() > 4 * TOLERANCE


def test_a_wrong_input_scale_is_far_outside_of_the_tolerance() -> None:
    """A scale half as large clips, one three times as large rounds three times as much."""
    linear, x = random_linear(200, 40), torch.randn(2, 60, 200)
    with torch.no_grad():
        good = int8(linear, x, True)
        expected = noise(linear, x, good)
        for factor in (0.3, 20):
            layer = W8A8Linear.from_float(linear, input_scale=quant.tensor_scale(x) * factor, static=True)
            moved = (layer(x) - linear(x)).flatten(0, -2).square().mean(0).sqrt()
            assert (moved / expected).max() > 4 * TOLERANCE


@STATIC
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_comes_out_as_nan_and_alone(value: float, static: bool) -> None:
    linear, x = random_linear(30, 21), torch.randn(2, 7, 30)
    layer = int8(linear, x, static)
    expected = layer(x)
    x[1, 4, 11] = value
    actual = layer(x)
    assert actual[1, 4].isnan().all()
    expected[1, 4] = actual[1, 4]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@STATIC
def test_zero_tokens_give_the_bias_and_zero_channels_zero(static: bool) -> None:
    linear, x = random_linear(30, 21), torch.randn(2, 7, 30)
    with torch.no_grad():
        linear.weight[5] = 0
    layer = int8(linear, x, static)
    x[0, 3] = 0
    actual = layer(x)
    assert torch.equal(actual[0, 3], linear.bias) and (actual[..., 5] == linear.bias[5]).all()


def test_gradients_end_at_an_int8_layer() -> None:
    layer = W8A8Linear.from_float(random_linear(30, 21))
    assert not layer(torch.randn(2, 7, 30, requires_grad=True)).requires_grad


@pytest.mark.parametrize("bias", [False, True])
@STATIC
def test_the_state_survives_and_loading_turns_the_memory(static: bool, bias: bool) -> None:
    linear, x = random_linear(30, 21, bias), torch.randn(2, 7, 30)
    layer = int8(linear, x, static)
    state = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    names = {"weight", "weight_scale", *(["bias"] if bias else []), *(["input_scale"] if static else [])}
    assert state.keys() == names
    assert state["weight"].dtype == torch.int8 and state["weight_scale"].dtype == torch.float32
    for assign in (False, True):
        with torch.device("cpu" if not assign else "meta"):
            loaded = W8A8Linear(30, 21, bias=bias, input_scale=static)
        loaded.load_state_dict(state, assign=assign)
        loaded.set_static(static)
        assert torch.equal(loaded(x), layer(x))
        assert loaded.weight.t().is_contiguous() and layer.weight.t().is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_cast_touches_an_int8_layer(dtype: torch.dtype) -> None:
    linear, x = random_linear(30, 21), torch.randn(2, 7, 30)
    layer = int8(linear, x, True)
    before, expected = dict(layer.state_dict()), layer(x)
    nn.Sequential(layer).to(dtype)
    after = layer.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(layer(x), expected) and layer.weight.t().is_contiguous()


def test_what_cannot_be_quantized_is_refused() -> None:
    linear = random_linear(30, 21)
    with pytest.raises(InvalidInput, match="needs an input scale"):
        W8A8Linear.from_float(linear, static=True)
    for value in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            linear.weight[2, 3] = value
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            W8A8Linear.from_float(linear)


def test_without_int_mm_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = W8A8Linear.from_float(random_linear(1500, 21)), torch.randn(2, 7, 1500)
    expected = layer(x)
    monkeypatch.setattr(matmul, "int8_refusal", lambda device: "refused")
    monkeypatch.delattr(torch, "_int_mm")
    assert torch.equal(layer(x), expected)
