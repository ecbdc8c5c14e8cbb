"""The decoder's convolution in CUDA against its reference, on the emulator.

Sums are exact integers, and what scales them is rounded as in the reference: without SiLU and normalisation
the results are equal bit for bit. Where there is SiLU, exp and the quotient may each differ by 2 ulp of fp32
(1.2e-7), and the normalisation's root and sums of up to 256 squares by 256 + 4 roundings of 2^-24, 1.6e-5 of
a value: a result may then round to the next of its 16-bit type (2^-10 or 2^-7 of it), or to a neighbouring
level of INT8.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.kernels import reference, reference_conv
from sana_edge.kernels.cuda import launch, operations

CSRC = Path(__file__).parents[3] / "csrc"
each_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def problem(
    size: tuple[int, int, int],
    depth: int,
    columns: int,
    kernel: int = 3,
    upsample: str = "none",
    bias: bool = True,
) -> Problem:
    """values, scale, weight, weight_scales, bias: outputs of a few units, whatever the depth."""
    outer = {"none": (columns,), "phases": (4, columns), "shuffle": (4 * columns,)}[upsample]
    side = 2 if upsample == "phases" else kernel
    weight_scales = torch.rand(outer) + 0.5
    scale = torch.tensor(1.0 / (127 * 127 / 3 * (side * side * depth) ** 0.5))
    offsets = torch.randn(outer[-1] if upsample != "phases" else columns) if bias else None
    weight = integers(*outer, side, side, depth)
    return integers(*size, depth), scale, weight, weight_scales, offsets


def check(arguments: Problem, dtype: torch.dtype, **options: Any) -> Tensor:
    actual = launch.w8a8_conv2d(*arguments, dtype, **options)
    options.pop("out", None)
    expected = reference_conv.w8a8_conv2d(*arguments, dtype, **options)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    normed = {"norm_weight", "out_norm_weight"} & options.keys()
    exact = options.get("activation") != "silu" and not normed
    if exact:
        assert torch.equal(actual, expected)
    elif actual.dtype == torch.int8:
        difference = (actual.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert (difference > 0).float().mean() < 1e-3
    else:
        # a neighbour of the 16-bit type; near 0 sums of normalised parts of up to about 8 cancel
        step = 2.0**-10 if dtype == torch.float16 else 2.0**-7
        torch.testing.assert_close(actual, expected, rtol=step, atol=8 * 1.6e-5)
        assert (actual != expected).float().mean() < 0.02
    return actual


@pytest.fixture(autouse=True)
def _garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, or as -128, which no result is."""
    empty = torch.empty

    def filled(*size: Any, **kwargs: Any) -> Tensor:
        out = empty(*size, **kwargs)
        return out.fill_(-128 if out.dtype == torch.int8 else torch.nan)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize(
    ("size", "depth", "columns", "kernel"),
    [
        ((2, 5, 7), 16, 16, 3),
        ((1, 5, 7), 48, 3, 3),
        ((1, 13, 11), 32, 129, 3),
        ((2, 9, 9), 80, 64, 1),
        ((1, 1, 1), 256, 200, 3),
        ((1, 3, 50), 16, 37, 1),
    ],
    ids=str,
)
def test_equals_reference(
    size: tuple[int, int, int], depth: int, columns: int, kernel: int, dtype: torch.dtype
) -> None:
    arguments = problem(size, depth, columns, kernel)
    check(arguments, dtype)
    check(problem(size, depth, columns, kernel, bias=False), dtype, activation="relu")
    check(arguments, dtype, residual=torch.randn(*size, columns).to(dtype))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("upsample", ["none", "phases", "shuffle"])
def test_sums_are_exact(upsample: str) -> None:
    # 4 · 272 or 9 · 272 products of 127²: 25 bits, more than fp32 holds
    values, _, weight, scales, _ = problem((1, 3, 5), 272, 24, upsample=upsample)
    values.fill_(127)
    weight.fill_(-127)
    weight.flatten(0, -2)[::3] = 127
    arguments = (values, torch.tensor(2.0**-15), weight, torch.ones_like(scales), None)
    check(arguments, torch.float16, upsample=upsample)


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("columns", [16, 64, 104, 128, 192, 256])
def test_norm_and_residual(columns: int, dtype: torch.dtype) -> None:
    values, scale, weight, weight_scales, _ = problem((1, 5, 7), 32, columns)
    # a pixel of zeros: 0 · rsqrt(eps)
    values[0, :3, :3] = 0
    x = torch.randn(1, 5, 7, columns).to(dtype)
    norm = {"norm_weight": torch.randn(columns), "norm_bias": torch.randn(columns), "norm_eps": 1e-5}
    arguments = (values, scale, weight, weight_scales, None)
    check(arguments, dtype, residual=x, **norm)
    check(arguments, dtype, norm_weight=norm["norm_weight"])


@pytest.mark.usefixtures("emulated")
def test_writes_over_the_residual() -> None:
    arguments = problem((1, 13, 11), 16, 128)
    x = torch.randn(1, 13, 11, 128).bfloat16()
    expected = launch.w8a8_conv2d(*arguments, norm_weight=torch.ones(128), residual=x)
    out = launch.w8a8_conv2d(*arguments, norm_weight=torch.ones(128), residual=x, out=x)
    assert out is x
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [16, 21, 128, 144])
def test_int8_for_the_next_convolution(columns: int) -> None:
    arguments = problem((2, 5, 7), 32, columns)
    # of outputs of about 3: a part of them saturates
    scale = torch.tensor(0.02)
    assert check(arguments, torch.float16, out_scale=scale).abs().max() == 127
    check(arguments, torch.float16, out_scale=scale, activation="silu")
    check(arguments, torch.float16, out_scale=scale, residual=torch.randn(2, 5, 7, columns).half())


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("columns", [16, 21, 104, 128, 144, 256])
def test_the_last_norm(columns: int, dtype: torch.dtype) -> None:
    """Of the sum with the residual; columns that are not there take no part in it."""
    arguments = problem((1, 5, 7), 32, columns, bias=False)
    norm = {"norm_weight": torch.randn(columns), "norm_bias": torch.randn(columns)}
    last = {"out_norm_weight": torch.randn(columns), "out_norm_bias": torch.randn(columns)}
    x = torch.randn(1, 5, 7, columns).to(dtype)
    assert check(arguments, dtype, residual=x, **norm, **last).min() == 0
    check(arguments, dtype, residual=x, **last, out_activation="silu", out_scale=torch.tensor(0.02))


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("upsample", ["none", "phases", "shuffle"])
@pytest.mark.parametrize("columns", [16, 21, 144])
def test_16_bit_and_int8(columns: int, upsample: str, dtype: torch.dtype) -> None:
    """INT8 of what was rounded: what the next layer would make of it."""
    arguments = problem((2, 5, 3), 32, columns, upsample=upsample)
    options: dict[str, Any] = {"upsample": upsample}
    if upsample == "none":
        options["residual"] = torch.randn(2, 5, 3, columns).to(dtype)
    else:
        options |= {"shortcut": torch.randn(2, 5, 3, columns).to(dtype), "repeats": 4}
    scale = torch.tensor(0.02)
    expected = launch.w8a8_conv2d(*arguments, dtype, **options)
    rows, levels = launch.w8a8_conv2d(*arguments, dtype, **options, next_scale=scale)
    assert torch.equal(rows, expected)
    assert torch.equal(levels, reference.quantize_tensor(expected, scale))
    wanted = reference_conv.w8a8_conv2d(*arguments, dtype, **options, next_scale=scale)
    assert torch.equal(rows, wanted[0]) and torch.equal(levels, wanted[1])


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_says_what_is_not_finite(bad: float | None) -> None:
    arguments = problem((1, 5, 7), 16, 24)
    residual = torch.randn(1, 5, 7, 24).half()
    if bad is not None:
        residual[0, 4, 6, 23] = bad
    weight, scale, finite = torch.ones(24), torch.tensor(0.02), torch.tensor(3.0)
    options = {"residual": residual, "out_norm_weight": weight, "out_scale": scale}
    launch.w8a8_conv2d(*arguments, torch.float16, **options, finite=finite)
    assert finite == 3 if bad is None else finite.isnan()
    assert scale == torch.tensor(0.02)


@pytest.mark.usefixtures("emulated")
@each_dtype
@pytest.mark.parametrize("upsample", ["phases", "shuffle"])
@pytest.mark.parametrize(("depth", "columns"), [(32, 16), (16, 3), (64, 32), (16, 72), (48, 136)], ids=str)
def test_upsampling(upsample: str, depth: int, columns: int, dtype: torch.dtype) -> None:
    check(problem((2, 5, 7), depth, columns, upsample=upsample), dtype, upsample=upsample)
    check(problem((1, 1, 1), depth, columns, upsample=upsample, bias=False), dtype, upsample=upsample)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("upsample", ["phases", "shuffle"])
@pytest.mark.parametrize("repeats", [1, 2, 3, 4])
def test_shortcut_of_an_upsampling(upsample: str, repeats: int) -> None:
    columns = 24
    shortcut = torch.randn(2, 5, 3, 4 * columns // repeats).bfloat16()
    arguments = problem((2, 5, 3), 16, columns, upsample=upsample)
    check(arguments, torch.bfloat16, upsample=upsample, shortcut=shortcut, repeats=repeats)
    check(arguments, torch.bfloat16, upsample=upsample, out_scale=torch.tensor(0.1))


@pytest.mark.usefixtures("emulated")
def test_silu() -> None:
    values, scale, weight, weight_scales, bias = problem((1, 5, 7), 16, 64)
    # far negative, where exp overflows, and far positive
    assert bias is not None
    bias[::5], bias[1::5] = -200, 200
    check((values, scale, weight, weight_scales, bias), torch.float16, activation="silu")


@pytest.mark.usefixtures("emulated")
def test_a_scale_that_is_not_finite_shows() -> None:
    values, _, weight, weight_scales, bias = problem((1, 2, 3), 16, 16)
    out = launch.w8a8_conv2d(values, torch.tensor(torch.nan), weight, weight_scales, bias, activation="relu")
    assert out.isnan().all()


def test_no_bank_conflicts(emulated: Any) -> None:
    for columns in (16, 64, 128, 256):
        check(problem((1, 5, 7), 48, columns), torch.float16, norm_weight=torch.ones(columns))
    counted = emulated.count()
    assert counted["launches"] == 4
    assert counted["matrix_reads"] > 0
    assert counted["bank_conflicts"] == 0


def test_turing(emulated_turing: Any) -> None:
    # 64 KiB of shared memory in a block, and copies through registers
    emulated_turing.pretend(75, 30, 64 << 10)
    for columns in (16, 64, 128, 256):
        check(
            problem((2, 5, 7), 80, columns),
            torch.float16,
            norm_weight=torch.randn(columns),
            residual=torch.randn(2, 5, 7, columns).half(),
        )
    check(problem((2, 5, 7), 48, 40, upsample="phases"), torch.float16, upsample="phases")
    emulated_turing.pretend(75, 24, 99 << 10)


def test_wide_tiles(emulated: Any) -> None:
    # which small maps have where there are few SMs
    emulated.pretend(89, 1, 99 << 10)
    try:
        size = (1, 13, 11)
        check(problem(size, 16, 200), torch.float16, residual=torch.randn(*size, 200).half())
        check(problem(size, 80, 129), torch.float16)
        check(problem(size, 16, 144), torch.bfloat16, out_scale=torch.tensor(0.02))
        for upsample in ("phases", "shuffle"):
            shortcut = torch.randn(1, 3, 5, 136).half()
            arguments = problem((1, 3, 5), 16, 136, upsample=upsample)
            check(arguments, torch.float16, upsample=upsample, shortcut=shortcut, repeats=4)
    finally:
        emulated.pretend(89, 24, 99 << 10)


@pytest.mark.usefixtures("emulated")
def test_as_deep_as_the_decoder() -> None:
    check(problem((1, 2, 2), 1024, 8), torch.float16)
    check(problem((1, 2, 2), 1024, 8, upsample="phases"), torch.float16, upsample="phases")


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("columns", [3, 24, 128])
@pytest.mark.parametrize("upsample", ["none", "phases", "shuffle"])
def test_reads_and_writes_nothing_beyond(
    upsample: str, columns: int, guarded: Callable[[Tensor], Tensor]
) -> None:
    # every tensor ends at a page that cannot be read; C's own alignment allows it for rows of 16 bytes only
    values, scale, weight, weight_scales, bias = problem((1, 8, 8), 16, columns, upsample=upsample)
    assert bias is not None
    factor = 1 if upsample == "none" else 2
    out = guarded(torch.zeros(1, 8 * factor, 8 * factor, columns).half())
    options: dict[str, Any] = {"upsample": upsample, "out": out}
    if upsample == "none":
        options["residual"] = guarded(torch.randn(1, 8, 8, columns).half())
    else:
        options["shortcut"] = guarded(torch.randn(1, 8, 8, 4 * columns).half())
    arguments = (guarded(values), guarded(scale), guarded(weight), guarded(weight_scales), guarded(bias))
    check(arguments, torch.float16, **options)


GOOD: dict[str, int | float] = {
    **dict.fromkeys(("values", "weight", "scale", "weight_scales", "out"), 4096),
    **dict.fromkeys(("images", "height", "width"), 1),
    "depth": 16,
    "columns": 16,
    "kernel": 3,
    "type": 1,
    "repeats": 1,
}


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (0, {"images": 0}),
        (2, {"depth": 0}),
        (2, {"depth": 14576}),
        (2, {"columns": 0}),
        (2, {"kernel": 2}),
        (2, {"kernel": 3, "upsample": 1}),
        (2, {"height": 1 << 16, "width": 1 << 15}),
        (2, {"columns": 264, "norm_weight": 4096}),
        (2, {"columns": 264, "out_norm_weight": 4096}),
        (2, {"next_scale": 4096, "next_values": 4096, "out_scale": 4096}),
        (1, {"next_scale": 4096}),
        (2, {"shortcut": 4096}),
        (2, {"upsample": 2, "residual": 4096}),
        (2, {"upsample": 2, "shortcut": 4096, "repeats": 0}),
        (2, {"upsample": 2, "shortcut": 4096, "repeats": 5}),
        (3, {"out": 4098}),
    ],
    ids=str,
)
def test_statuses(status: int, changes: dict[str, int], emulated_library: Path) -> None:
    function = ctypes.CDLL(str(emulated_library)).sana_edge_w8a8_conv2d
    arguments = operations.OPERATIONS["w8a8_conv2d"].struct(**{**GOOD, **changes})
    assert function(ctypes.byref(arguments), None) == status


def test_maps(tmp_path: Path) -> None:
    program = tmp_path / "maps"
    source = Path(__file__).with_name("conv_maps.cpp")
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-DSANA_EDGE_EMULATED=890",
        f"-I{CSRC}",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
