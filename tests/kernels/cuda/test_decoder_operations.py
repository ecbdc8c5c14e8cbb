"""The decoder's sums of linear attention, its wide norm and its map's scale in CUDA against their references.

Sums are of fp32 in another order than torch's: n of them are off by n roundings of 2^-24 of their terms'
sizes at most, and by a few in the mean. A result may then round to the next of its 16-bit type, or of INT8's
levels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.int8 import quant
from sana_edge.kernels import reference_conv
from sana_edge.kernels.cuda import launch

STEPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
each_dtype = pytest.mark.parametrize("dtype", STEPS, ids=str)
SIZES = [(1, 5, 7, 2), (2, 8, 8, 1), (1, 17, 3, 1), (3, 1, 1, 2), (1, 9, 20, 1)]


@pytest.fixture(autouse=True)
def _garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, or as -128, which no result is."""
    empty = torch.empty

    def filled(*size: Any, **kwargs: Any) -> Tensor:
        out = empty(*size, **kwargs)
        return out.fill_(-128 if out.dtype == torch.int8 else torch.nan)

    monkeypatch.setattr(torch, "empty", filled)


def attention(images: int, height: int, width: int, heads: int, dtype: torch.dtype) -> tuple[Any, ...]:
    qkv = torch.randn(images, height * width, 96 * heads).to(dtype)
    depthwise, pointwise = torch.randn(5, 5, 96 * heads) / 5, torch.randn(96 * heads, 32) / 32**0.5
    return qkv, depthwise, pointwise, height, width


def check_attention(arguments: tuple[Any, ...]) -> None:
    q, state = launch.multiscale_linear_attention(*arguments)
    wanted_q, wanted_state = reference_conv.multiscale_linear_attention(*arguments)
    assert q.shape == wanted_q.shape and state.shape == wanted_state.shape and q.dtype == wanted_q.dtype
    # 25 and 32 products of numbers whose sizes add up to at most 200
    torch.testing.assert_close(q, wanted_q, rtol=STEPS[q.dtype], atol=200 * 57 * 2.0**-24)
    assert (q != wanted_q).float().mean() < 0.02
    # as many tokens more; in L2 roundings cancel but for their root
    tokens = arguments[3] * arguments[4]
    assert quant.relative_error(state, wanted_state) < (57 + tokens) ** 0.5 * 2.0**-24 * 4


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_attention(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    qkv, *weights, height, width = attention(*size, dtype)
    check_attention((qkv, *weights, height, width))
    check_attention((qkv, None, None, height, width))


@pytest.mark.usefixtures("emulated")
def test_attention_of_integers_is_exact() -> None:
    """Numbers of the second scale are below 200 here, so that all sums stay below 35 · 200² < 2^24."""
    size = (2, 5, 7, 2)
    qkv = torch.randint(-3, 4, (2, 35, 192)).half()
    depthwise = torch.randint(-1, 2, (5, 5, 192)).float()
    pointwise = (torch.rand(192, 32) < 0.1).float()
    arguments = (qkv, depthwise, pointwise, *size[1:3])
    found = launch.multiscale_linear_attention(*arguments)
    wanted = reference_conv.multiscale_linear_attention(*arguments)
    assert wanted[0].abs().max() < 200
    for result, expected in zip(found, wanted, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.usefixtures("emulated")
def test_a_block_has_several_patches() -> None:
    # 36 patches, and 32 parts at the most
    check_attention(attention(1, 45, 43, 1, torch.float16))


@pytest.mark.usefixtures("emulated")
def test_a_workspace_serves_one_call_after_the_other() -> None:
    space = launch.workspace(2, 2048, 4, torch.device("cpu"))
    small, large = attention(1, 5, 7, 1, torch.float16), attention(2, 9, 20, 2, torch.float16)
    for arguments in (large, small, large):
        expected = launch.multiscale_linear_attention(*arguments)
        found = launch.multiscale_linear_attention(*arguments, workspace=space)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        x = arguments[0]
        assert torch.equal(launch.tensor_scale(x, workspace=space), reference_conv.tensor_scale(x))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_attention_shows_what_is_not_finite(bad: float) -> None:
    qkv, *rest = attention(1, 12, 12, 1, torch.float16)
    # of v in the middle of the map: it reaches the sums of both scales
    qkv[0, 70, 70] = bad
    _, state = launch.multiscale_linear_attention(qkv, *rest)
    assert not state[0, 0].isfinite().all() and not state[0, 1].isfinite().all()
    assert state[0, 0, 32].isfinite().all()


def check_norm(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, static: Tensor | None, **memory: Any
) -> None:
    wanted = reference_conv.norm_add_quantize(y, x, weight, bias, 1e-5, static)
    out, values, scales = launch.norm_add_quantize(y, x, weight, bias, 1e-5, static, **memory)
    assert [t.shape for t in (out, values, scales)] == [t.shape for t in wanted]
    # sums of normalised parts of up to 8 and more cancel: C roundings of a root, and four
    torch.testing.assert_close(out, wanted[0], rtol=STEPS[x.dtype], atol=16 * (y.shape[-1] + 4) * 2.0**-24)
    assert (out != wanted[0]).float().mean() < 0.02
    difference = (values.int() - wanted[1].int()).abs()
    # a neighbour of 16 bits is up to 127 · its step of a level away
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02
    torch.testing.assert_close(scales, wanted[2], rtol=STEPS[x.dtype], atol=0, equal_nan=True)


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("columns", [16, 272, 512, 1024, 1296, 2560])
def test_norm(columns: int, dtype: torch.dtype) -> None:
    y, x = (torch.randn(2, 3, 3, columns).to(dtype) for _ in range(2))
    # a pixel of zeros: 0 · rsqrt(eps)
    y[0, 1] = 0
    weight, bias = torch.randn(columns), torch.randn(columns)
    check_norm(y, x, weight, bias, None)
    check_norm(y, x, weight, bias, torch.tensor(0.02))
    check_norm(y, x, weight, bias, None, out=x)


@pytest.mark.usefixtures("emulated")
def test_norm_shows_what_is_not_finite() -> None:
    y, x = torch.randn(2, 5, 64).half().unbind()
    y, x = y.clone(), x.clone()
    y[1, 3], x[2, 60], x[4, 0] = torch.nan, torch.inf, torch.nan
    for static in (None, torch.tensor(0.1)):
        out, _, scales = launch.norm_add_quantize(y, x, torch.ones(64), torch.zeros(64), 1e-5, static)
        assert scales.isnan().tolist() == [False, True, True, False, True]
        assert out[1].isnan().all() and out[2, 60].isinf() and out[4, 0].isnan()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (2, 5, 7, 48), (1, 70, 70, 32)], ids=str)
def test_scale_of_a_map(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for largest in (-100.0, 0.0, 1e-39, torch.nan, -torch.inf):
        if largest in (0.0, 1e-39):
            x.zero_()
        x.view(-1)[-3] = largest
        found, wanted = launch.tensor_scale(x), reference_conv.tensor_scale(x)
        assert found.shape == () and torch.equal(found.nan_to_num(-1), wanted.nan_to_num(-1))


def test_turing(emulated_turing: Any) -> None:
    # which multiplies no bf16 with its tensor cores
    check_attention(attention(1, 9, 11, 1, torch.bfloat16))
    y, x = (torch.randn(1, 3, 3, 1296).bfloat16() for _ in range(2))
    check_norm(y, x, torch.randn(1296), torch.randn(1296), None)
