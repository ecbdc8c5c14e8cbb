"""The fused operations: what computes them, and that arguments arrive where they belong."""

from __future__ import annotations

import inspect
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.fused import ops
from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import arguments

B, H, W, C, HEADS, HIDDEN = 2, 3, 5, 64, 2, 48
N = H * W
HALF = torch.bfloat16


def product(depth: int, columns: int) -> tuple[Tensor, ...]:
    values = torch.randint(-127, 128, (B, N, depth), dtype=torch.int8)
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8)
    scales = torch.rand(B, N) * 0.02 + 0.001
    return values, scales, weight, torch.rand(columns) * 0.002, torch.randn(columns)


def convolution(depth: int, columns: int, phases: bool = True) -> tuple[Tensor, ...]:
    outer = (4, columns, 2, 2) if phases else (columns, 3, 3)
    values = torch.randint(-127, 128, (B, H, W, depth), dtype=torch.int8)
    weight = torch.randint(-127, 128, (*outer, depth), dtype=torch.int8)
    scales = torch.rand(4 * columns if phases else columns) * 0.002
    return values, torch.tensor(0.01), weight, scales, torch.randn(columns)


def calls() -> dict[str, partial[Any]]:
    """Every operation with small arguments, two of them also in place; only the backend is missing."""
    x = torch.randn(B, N, C).to(HALF)
    vector, per_image = torch.randn(C), torch.randn(B, 1, C)
    table = torch.randn(B, 2, C).unsqueeze(2).unbind(1)
    state = torch.rand(B, HEADS, 33, 32)
    keys, values = torch.randn(2, B, HEADS, 304, 32).to(HALF)
    lengths = torch.tensor([7, 300], dtype=torch.int32)
    wide = torch.randn(B, N, 2 * HIDDEN).to(HALF)
    weight, bias = torch.randn(8, C), torch.randn(8)
    scale, image = torch.tensor(0.03), torch.randn(B, H, W, 32).to(HALF)
    digits, steps, matrix, columns, _ = product(C, 3 * C)
    two = torch.stack([digits, digits.flip(0)], dim=-2)
    return {
        "quantize_rows": partial(ops.quantize_rows, x),
        "norm_modulate_quantize": partial(ops.norm_modulate_quantize, x, *table, 1e-6, scale),
        "dwconv_glu_quantize": partial(
            *(ops.dwconv_glu_quantize, wide, torch.randn(3, 3, 2 * HIDDEN).to(HALF)),
            *(torch.randn(2 * HIDDEN), H, W),
        ),
        "w8a8_linear": partial(ops.w8a8_linear, *product(C, 40), HALF, silu=True),
        "w8a8_linear in place": partial(
            *(ops.w8a8_linear, *product(48, C), HALF),
            limit=60000.0,
            gate=vector,
            constant=per_image,
            residual=x,
            out=x,
        ),
        "w8a8_linear_quantize": partial(
            *(ops.w8a8_linear_quantize, *product(48, C), HALF),
            residual=x,
            **dict(zip(("shift", "scale"), table, strict=True)),
            plain=(0, 1),
        ),
        "sampler_step": partial(ops.sampler_step, *torch.randn(4, B, 8, H, W), torch.randn(7)),
        "qkv_linear_attention": partial(ops.qkv_linear_attention, *product(C, 3 * C), HALF, HEADS),
        "qk_norm_linear_attention": partial(
            *(ops.qk_norm_linear_attention, torch.randn(B, N, 3 * C).to(HALF), torch.rand(C), HEADS, 1e-5)
        ),
        "linear_attention_finish": partial(
            *(ops.linear_attention_finish, x, state, 1e-15, torch.rand(B, N, 2), torch.rand(C), scale)
        ),
        "cross_attention_quantize": partial(
            *(ops.cross_attention_quantize, x, keys, values.transpose(2, 3).contiguous(), lengths),
            *(torch.rand(C), 1e-5),
        ),
        "patch_embed": partial(
            *(ops.patch_embed, torch.randn(B, 8, H, W), weight, torch.randn(C), torch.randn(N, C), 2, HALF)
        ),
        "velocity_head": partial(
            *(ops.velocity_head, x, *table, 1e-6, weight, bias, torch.tensor(4.5), (H, W))
        ),
        "w8a8_conv2d": partial(
            *(ops.w8a8_conv2d, *convolution(C, 24), HALF),
            upsample="phases",
            activation="silu",
            out_scale=scale,
        ),
        "w8a8_conv2d in place": partial(
            *(ops.w8a8_conv2d, *convolution(C, 32, phases=False), HALF),
            norm_weight=torch.rand(32),
            norm_bias=torch.randn(32),
            residual=image,
            out=image,
        ),
        "w8a8_conv2d with both": partial(
            *(ops.w8a8_conv2d, *convolution(C, 32, phases=False), HALF),
            out_norm_weight=torch.rand(32),
            out_norm_bias=torch.randn(32),
            next_scale=scale,
        ),
        "norm_add_quantize": partial(
            *(ops.norm_add_quantize, x.flip(1).contiguous(), x, torch.rand(C), torch.randn(C), 1e-5, scale)
        ),
        "tensor_scale": partial(ops.tensor_scale, x),
        "multiscale_linear_attention": partial(
            *(ops.multiscale_linear_attention, torch.randn(B, N, 96).to(HALF)),
            *(torch.randn(5, 5, 96) / 5, torch.randn(96, 32) / 6, H, W),
        ),
        "quantize_digits": partial(ops.quantize_digits, torch.randn(B, N, 2 * C), True),
        "add_norm_digits": partial(
            *(ops.add_norm_digits, torch.randn(B, N, C), torch.randn(B, N, C), vector, torch.rand(C), 1e-6)
        ),
        "w8a16_linear": partial(
            *(ops.w8a16_linear, two, steps, matrix, columns, torch.randn(3 * C), torch.randn(N, 8, 2), 2 * C)
        ),
        "soft_capped_attention": partial(
            *(ops.soft_capped_attention, torch.randn(B, N, 4 * 2 * C), keys[0, :, :40].contiguous()),
            *(values[0, :, :40].contiguous(), torch.tensor(33, dtype=torch.int32), 12, 0.2, 5.0, 37),
        ),
    }


NAMES = list(calls())


def run(name: str, backend: str) -> list[Tensor]:
    torch.manual_seed(0)
    result = calls()[name](backend=backend)
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("name", NAMES)
def test_torch_is_the_reference(name: str) -> None:
    torch.manual_seed(0)
    call = calls()[name]
    operation, *given = call.args
    options = {key: value for key, value in call.keywords.items() if key != "out"}
    expected = arguments.definition(operation)(*given, **options)
    expected = [expected] if isinstance(expected, Tensor) else expected
    for result, wanted in zip(run(name, "torch"), expected, strict=True):
        assert torch.equal(result, wanted)


def test_every_operation_has_an_example() -> None:
    assert {call.args[0] for call in calls().values()} == set(ops.OPERATIONS)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("in place")])
def test_in_place(name: str) -> None:
    call = calls()[name]
    out = call.keywords["out"]
    before = out.clone()
    assert call(backend="torch") is out and not torch.equal(out, before)


def assert_close(results: list[Tensor], expected: list[Tensor]) -> None:
    """The kernels have tests of their own: here, that arguments arrive where they belong.

    A number near the middle of two levels may round to either. Sums in another order, or factors rounded to
    bf16 on the way, move a number by up to 2^-8 of it: at 40 levels, the mean here, by 0.16 of one, which is
    the share of numbers that change. Other results are bf16 or fp32.
    """
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape and result.dtype == wanted.dtype
        if result.dtype == torch.int8 and result.shape[-2] == 2:
            # two digits of one number
            result, wanted = (254 * t[..., 0, :].int() + t[..., 1, :].int() for t in (result, wanted))
        if not result.dtype.is_floating_point:
            levels = (result.int() - wanted.int()).abs()
            assert levels.max() <= 1 and levels.float().mean() <= 0.2
            continue
        distance = (result.double() - wanted.double()).norm() / wanted.double().norm()
        assert distance <= 2 * 2**-8


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", NAMES)
def test_cuda(name: str) -> None:
    assert_close(run(name, "cuda"), run(name, "torch"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [name for name in NAMES if name.split()[0] not in ops.CUDA_ONLY])
def test_triton(name: str) -> None:
    assert_close(run(name, "triton"), run(name, "torch"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [name for name in ops.OPERATIONS if name not in ops.CUDA_ONLY])
def test_triton_has_the_signature_of_the_definition(name: str) -> None:
    """Names, order and defaults; a kernel may take more by name."""
    theirs = inspect.signature(getattr(reference_fused, name)).parameters
    ours = inspect.signature(ops._implementation("triton", name)).parameters
    common = [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs]
    assert common == [(p.name, p.kind, p.default) for p in theirs.values()]
    more = [p for p in ours.values() if p.name not in theirs]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in more)


@pytest.mark.usefixtures("emulated")
def test_a_workspace_is_used_again() -> None:
    space = ops.workspace("cuda", B, N, HEADS, torch.device("cpu"))
    call = calls()["qkv_linear_attention"]
    results = [call(workspace=space, backend="cuda") for _ in range(3)]
    for q, state in results[1:]:
        assert torch.equal(q, results[0][0]) and torch.equal(state, results[0][1])
    assert ops.workspace("torch", B, N, HEADS, torch.device("cpu")) is None


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_no_operation_has_a_gradient(backend: str) -> None:
    call = calls()["patch_embed"]
    call.args[1].requires_grad_()
    assert not call(backend=backend).requires_grad


def test_triton_is_imported_when_it_is_needed() -> None:
    code = "import sys, sana_edge.pipeline; sys.exit('sana_edge.kernels.triton.quantize_rows' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
