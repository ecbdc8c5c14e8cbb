"""w8a8_linear_quantize in CUDA against its reference, on the emulator.

Its product is `w8a8_linear`'s, bit for bit. Its rows are those of norm_modulate_quantize and quantize_rows of
that product: bit for bit up to 1280 columns, where one warp has a row there too; beyond, sums are made in
another order, with the tolerance of test_norm_modulate_quantize.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import launch

HALVES = (torch.float16, torch.bfloat16)
EPS = 1e-6


def operands(images: int, tokens: int, columns: int, depth: int = 48) -> tuple[Tensor, ...]:
    values = torch.randint(-128, 128, (images, tokens, depth), dtype=torch.int8)
    weight = torch.randint(-128, 128, (columns, depth), dtype=torch.int8)
    scales, weight_scales = torch.rand(images, tokens) / 64, torch.rand(columns) / (64 * depth**0.5)
    return values, scales, weight, weight_scales, torch.randn(columns)


def apart(out: Tensor, norm: dict[str, Any], plain: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows by the operations that come one after the other."""
    static, plain_static = norm.get("static_scale"), norm.get("plain_static_scale")
    if norm.get("scale") is None:
        return launch.quantize_rows(out, plain_static)
    values, scales = launch.norm_modulate_quantize(out, norm["scale"], norm["shift"], EPS, static)
    for image in range(*plain):
        values[image], scales[image] = launch.quantize_rows(out[image], plain_static)
    return values, scales


def check(
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    plain: tuple[int, int],
    workspace: Tensor | None = None,
    **asked: Any,
) -> None:
    norm = {name: asked.get(name) for name in ("scale", "shift", "static_scale", "plain_static_scale")}
    out, *rows = launch.w8a8_linear_quantize(
        *inputs, dtype, plain=plain, eps=EPS, workspace=workspace, **asked
    )
    product = {name: value for name, value in asked.items() if name not in norm}
    assert torch.equal(out, launch.w8a8_linear(*inputs, dtype, **product))
    expected = apart(out, norm, plain)
    reference = reference_fused.w8a8_linear_quantize(*inputs, dtype, plain=plain, eps=EPS, **asked)
    if out.shape[-1] <= 1280:
        assert all(torch.equal(found, wanted) for found, wanted in zip(rows, expected, strict=True))
    for pair in (expected, reference[1:]):
        torch.testing.assert_close(rows[1], pair[1], rtol=1e-5, atol=0)
        levels = (rows[0].int() - pair[0].int()).abs()
        assert levels.max() <= 1 and levels.float().mean() <= max(1 / 400, 1.5 / levels.numel())


@pytest.mark.usefixtures("emulated", "guarded_outputs")
@pytest.mark.parametrize("shape", [(2, 70, 144), (3, 5, 32), (1, 1, 16)], ids=str)
def test_equals_the_operations_one_by_one(shape: tuple[int, int, int]) -> None:
    images, tokens, columns = shape
    dtype = HALVES[tokens % 2]
    inputs, residual = operands(*shape), torch.randn(shape).to(dtype)
    table = torch.randn(images, 1, 6 * columns).chunk(6, dim=-1)
    norm = {"scale": table[1], "shift": table[0]}
    check(inputs, dtype, (0, 0), residual=residual, **norm)
    check(inputs, dtype, (images - 1, images), residual=residual, gate=table[2], **norm)
    shifted = {"gate": table[2], "constant": torch.randn(columns), "residual": residual}
    check(inputs, dtype, (0, 1), **shifted, **norm)
    every = {"limit": 0.5, **shifted}
    static = {"static_scale": torch.tensor(0.04), "plain_static_scale": torch.tensor(0.03)}
    check(inputs, dtype, (0, 1), **every, **norm, **static)
    check(inputs, dtype, (0, 0), residual=residual)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [2240, 2304])
def test_widths_of_two_warps(columns: int) -> None:
    scale, shift = torch.randn(2, columns)
    check(operands(1, 2, columns, 16), torch.bfloat16, (0, 0), scale=scale, shift=shift)


@pytest.mark.parametrize("processors", [1, 200])
def test_blocks_at_work_together_and_not(emulated: Any, processors: int) -> None:
    """Several rows of tiles and several tiles a row; whether blocks wait changes nothing.

    The counters are zeros again, so that one workspace serves the next call, of other tiles.
    """
    emulated.pretend(89, processors, 99 << 10)
    space = launch.workspace(1, 1, 1, torch.device("cpu"))
    for shape in ((2, 90, 272), (1, 33, 400)):
        scale, shift = torch.randn(2, shape[2])
        inputs, residual = operands(*shape), torch.randn(shape).half()
        check(inputs, torch.float16, (0, 0), scale=scale, shift=shift, residual=residual, workspace=space)
        assert not space[: 1 << 16].any()


@pytest.mark.usefixtures("emulated")
def test_a_row_that_is_not_finite() -> None:
    inputs = operands(1, 9, 48)
    inputs[1][0, 4] = torch.nan
    scale, shift = torch.randn(2, 48)
    for norm in ({}, {"scale": scale, "shift": shift}):
        _, _, scales = launch.w8a8_linear_quantize(*inputs, torch.float16, eps=EPS, **norm)
        assert bool(scales[0, 4].isnan()) and int(scales.isnan().sum()) == 1


def test_turing(emulated_turing: Any) -> None:
    emulated_turing.pretend(75, 40, 64 << 10)
    scale, shift = torch.randn(2, 144)
    check(operands(2, 70, 144), torch.float16, (1, 2), scale=scale, shift=shift)
