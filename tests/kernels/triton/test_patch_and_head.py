"""The denoiser's first and last layers in Triton against `reference_fused`, interpreted; and compiled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference_fused

EPS = 1e-6
U = 2.0**-24
# a number's distance from its neighbour: half of it is lost by rounding to nearest, all of it where Triton's
# interpreter cuts bf16 off
STEPS = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(STEPS), ids=["fp32", "fp16", "bf16"])
# images, channels, height, width, C: one cell; tails of all kinds; SANA's 32 channels and a width of it
SHAPES = [(1, 1, 1, 1, 1), (2, 4, 5, 7, 72), (1, 32, 4, 6, 1152), (3, 33, 3, 11, 64)]


@pytest.fixture
def op(interpreted: None) -> Iterator[SimpleNamespace]:
    """Both kernels' modules, ``patch`` and ``head``, while new tensors are filled with NaN."""
    from sana_edge.kernels.triton import patch_embed, velocity_head

    torch.use_deterministic_algorithms(True)
    yield SimpleNamespace(patch=patch_embed, head=velocity_head)
    torch.use_deterministic_algorithms(False)


def near(found: Tensor, right: Tensor, error: Tensor) -> None:
    off = (found.double() - right).abs() - error
    assert bool((off <= 0).all()), f"{int((off > 0).sum())} values, by up to {float(off.max())}"


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_patch_embed(op: SimpleNamespace, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums of ``channels`` products in fp32 and two additions, of factors that are the same, then rounded.

    bf16 is given as such: the interpreter would round the latent in its own way.
    """
    B, channels, H, W, C = shape
    latent = torch.randn(B, channels, H, W)
    latent = latent.to(dtype) if dtype == torch.bfloat16 else latent
    weight, bias = torch.randn(channels, C), torch.randn(C)
    for positions, copies in ((None, 1), (torch.randn(H * W, C), 2)):
        found = op.patch.patch_embed(latent, weight, bias, positions, copies, dtype)
        assert found.dtype == dtype and found.shape == (copies * B, H * W, C)
        factors = latent.to(dtype).double().flatten(2).mT, weight.double()
        added = bias.double() + (0 if positions is None else positions.double())
        size = (
            factors[0].abs() @ factors[1].abs() + bias.abs() + (0 if positions is None else positions.abs())
        )
        right = (factors[0] @ factors[1] + added).repeat(copies, 1, 1)
        error = ((channels + 4) * U * size).repeat(copies, 1, 1)
        error += STEPS[dtype] * (right.abs() + error) + (2**-24 if dtype == torch.float16 else 0)
        near(found, right, error)
        near(reference_fused.patch_embed(latent, weight, bias, positions, copies, dtype), right, error)


def velocity(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, guidance: float | None
) -> tuple[Tensor, Tensor]:
    """The velocities of tokens (B, N, channels) in fp64, and their error in fp32.

    c = x - mean, r = 1 / sqrt(variance + eps), y = c · r · scale + shift. A sum of C terms is off by at most
    g = (C + 8) u of its magnitudes: the mean by m = g · mean|x|, c by 2 m + u |c|, the variance relatively by
    2 g + (2 m r)², r by half of that and 3 u; so y by |scale| r (2 m + |c| (v / 2 + 8 u)) + 4 u |shift|.
    The product adds g of its own, and guidance takes (1 - g) u + g c in three more operations.
    """
    x, scale, shift, weight = (t.double() for t in (x, scale, shift, weight))
    g = (x.shape[2] + 8) * U
    c = x - x.mean(-1, keepdim=True)
    r = (c.square().mean(-1, keepdim=True) + EPS).rsqrt()
    m = g * x.abs().mean(-1, keepdim=True)
    v = 2 * g + (2 * m * r).square()
    y = c * r * scale + shift
    e = scale.abs() * r * (2 * m + c.abs() * (v / 2 + 8 * U)) + 4 * U * shift.abs()
    out, size = y @ weight.T + bias, y.abs() @ weight.abs().T + bias.abs()
    error = e @ weight.abs().T + g * size
    if guidance is None:
        return out, error
    (unguided, prompted), (first, second) = out.chunk(2), error.chunk(2)
    difference = (prompted - unguided).abs()
    added = abs(guidance) * (first + second + 3 * U * difference) + U * (unguided.abs() + difference)
    return unguided + guidance * (prompted - unguided), 2 * (first + added)


@DTYPES
@pytest.mark.parametrize("guidance", [None, 4.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_velocity_head(
    op: SimpleNamespace, shape: tuple[int, ...], guidance: float | None, dtype: torch.dtype
) -> None:
    B, channels, H, W, C = shape
    rows = B if guidance is None else 2 * B
    x = (torch.randn(rows, H * W, C) + 3 * torch.randn(rows, H * W, 1)).to(dtype)
    weight, bias = torch.randn(channels, C), torch.randn(channels)
    table = torch.randn(rows, 2, C)
    asked = None if guidance is None else torch.tensor(guidance)
    for scale, shift in ((table[:, :1], table[:, 1:]), (table[0, 0], table[:1, 1:])):
        found = op.head.velocity_head(x, scale, shift, EPS, weight, bias, asked, (H, W))
        assert found.dtype == torch.float32 and found.shape == (B, channels, H, W)
        right, error = (t.mT.unflatten(2, (H, W)) for t in velocity(x, scale, shift, weight, bias, guidance))
        near(found, right, error)
        near(reference_fused.velocity_head(x, scale, shift, EPS, weight, bias, asked, (H, W)), right, error)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_bad_tokens_stay_where_they_are(op: SimpleNamespace) -> None:
    x, ones = torch.randn(4, 35, 72), torch.ones(72)
    x[1, 3, 5], x[2, 30, 71] = math.nan, math.inf
    weight, bias, guidance = torch.randn(8, 72), torch.randn(8), torch.tensor(2.0)
    out = op.head.velocity_head(x, ones, ones, EPS, weight, bias, guidance, (5, 7))
    assert torch.equal(
        out.isfinite(),
        reference_fused.velocity_head(x, ones, ones, EPS, weight, bias, guidance, (5, 7)).isfinite(),
    )
    assert int((~out.isfinite()).sum()) == 2 * 8


def test_the_same_bytes_alone_and_in_a_batch(op: SimpleNamespace) -> None:
    x, ones, weight, bias = torch.randn(3, 35, 72), torch.ones(72), torch.randn(8, 72), torch.randn(8)
    rest = ones, ones, EPS, weight, bias, None, (5, 7)
    together, again, alone = (op.head.velocity_head(given, *rest) for given in (x, x, x[1:2]))
    assert torch.equal(together, again) and torch.equal(together[1:2], alone)


def test_empty(op: SimpleNamespace) -> None:
    ones = torch.ones(8)
    tokens = op.patch.patch_embed(torch.zeros(0, 4, 2, 3), torch.ones(4, 8), ones, None, 2, torch.half)
    assert tokens.shape == (0, 6, 8)
    out = op.head.velocity_head(
        torch.zeros(0, 6, 8), ones, ones, EPS, torch.ones(4, 8), torch.ones(4), None, (2, 3)
    )
    assert out.shape == (0, 4, 2, 3)


def test_refusals(op: SimpleNamespace) -> None:
    def refused(match: str, function: Callable[..., object], *inputs: Any) -> None:
        with pytest.raises(InvalidInput, match=match) as caught:
            function(*inputs)
        assert caught.value.hint

    latent, weight, bias = torch.ones(2, 4, 2, 3), torch.ones(4, 8), torch.ones(8)
    ask, rest = op.patch.patch_embed, (None, 1, torch.float32)
    refused("latent of patch_embed has shape", ask, latent[0], weight, bias, *rest)
    refused("latent of .* is .* not contiguous", ask, latent.mT, weight, bias, *rest)
    refused("weight of .* is", ask, latent, weight[:3], bias, *rest)
    refused("weight of .* on meta", ask, latent, weight.to("meta"), bias, *rest)
    refused("positions of .* is", ask, latent, weight, bias, torch.ones(5, 8), 1, torch.float32)
    refused("up to 64|latent of", ask, torch.ones(1, 65, 1, 1), torch.ones(65, 8), bias, *rest)
    refused("cannot give 1 copies of torch.int8", ask, latent, weight, bias, None, 1, torch.int8)
    x, head, rest = torch.ones(3, 6, 8), torch.ones(4, 8), (torch.ones(4), None, (2, 3))
    ask = op.head.velocity_head
    refused("x of velocity_head has shape", ask, x, bias, bias, EPS, head, torch.ones(4), None, (2, 4))
    refused("x of .* has shape", ask, x, bias, bias, EPS, head, torch.ones(4), torch.ones(()), (2, 3))
    refused("scale of .* is", ask, x, torch.ones(2, 1, 8), bias, EPS, head, *rest)
    refused("shift of .* is torch.int64", ask, x, bias, bias.long(), EPS, head, *rest)
    refused("weight of .* is", ask, x, bias, bias, EPS, head.T, *rest)
    refused("bias of .* is", ask, x, bias, bias, EPS, head, torch.ones(3), None, (2, 3))


def compile_first(op: SimpleNamespace, compiled: Callable[..., dict[str, str]], kind: str) -> dict[str, str]:
    pointers = dict.fromkeys(("p_latent", "p_weight", "p_bias", "p_positions"), "*fp32")
    signature = {**pointers, "p_out": f"*{kind}", "images": "i32", "cells": "i32"}
    tile = dict(zip(("BLOCK_N", "BLOCK_C"), op.patch.TILE, strict=True))
    sizes = {"CHANNELS": 32, "DEPTH": 32, "C": 1152, "COPIES": 2, **tile}
    return compiled("patch_embed.patch_embed_kernel", signature, sizes, ["cells"])


def compile_last(op: SimpleNamespace, compiled: Callable[..., dict[str, str]], kind: str) -> dict[str, str]:
    names = op.head.velocity_head_kernel.arg_names
    values: dict[str, object] = {"C": 1152, "CHANNELS": 32, "WIDTH": 32, "BLOCK_N": op.head.TILE[0]}
    values |= {"BLOCK_C": op.head.TILE[1]}
    signature = {name: "*fp32" if name.startswith("p_") else "i32" for name in names if name not in values}
    return compiled(
        "velocity_head.velocity_head_kernel",
        {**signature, "p_x": f"*{kind}", "eps": "fp32"},
        values,
        ["tokens", "stride_scale", "stride_shift"],
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (compile_first, "bf16"),
        (compile_last, "fp16"),
        pytest.param(compile_first, "fp32", marks=pytest.mark.slow),
        pytest.param(compile_last, "fp32", marks=pytest.mark.slow),
    ],
)
def test_compiles(
    op: SimpleNamespace,
    compiled: Callable[..., dict[str, str]],
    build: Callable[..., dict[str, str]],
    kind: str,
) -> None:
    code = build(op, compiled, kind)
    assert re.search(r"mma\S*\.tf32\.tf32", code["ptx"]) and not re.search(r"\b(atom|red)\.", code["ptx"])
    assert "STACK:0" in code["usage"] and int(code["shared"]) <= 99 << 10, code["usage"]
