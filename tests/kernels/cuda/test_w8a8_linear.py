"""The INT8 linear layer in CUDA against its reference, on the emulator.

Sums are exact, and without SiLU every step after them is rounded as in the reference: results are equal bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.errors import SanaError, UnsupportedDevice
from sana_edge.kernels import reference_fused
from sana_edge.kernels.cuda import library as cuda_library
from sana_edge.kernels.cuda.launch import w8a8_linear

# TileName of csrc/gemm_tiles.h with rows and columns of each
TILES = {"large": (256, 128), "middle": (128, 128), "narrow": (128, 64), "small": (64, 64)}
TURING_TILES = {"turing": (128, 128), "turing_small": (64, 64)}
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _garbage() -> Iterator[None]:
    """New tensors are NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def force(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every product of a test use a tile of TILES."""
    emulated.count()  # skips where this is not the emulator
    return lambda name: monkeypatch.setitem(globals(), "w8a8_linear", partial(w8a8_linear, tile=number(name)))


def number(tile: str) -> int:
    return [*TILES, *TURING_TILES].index(tile) + 1


def operands(*lead: int, N: int, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (*lead, K), scales, weight and its scales; results are of the size of 1."""
    values, weight = (torch.randint(-128, 128, (*shape, K), dtype=torch.int8) for shape in (lead, (N,)))
    return values, torch.rand(lead) / 64, weight, torch.rand(N) / (64 * K**0.5)


def check(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype, **asked: Any
) -> Tensor:
    out = w8a8_linear(*inputs, bias, dtype, **asked)
    expected = reference_fused.w8a8_linear(*inputs, bias, dtype, **asked)
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
    return out


@pytest.mark.parametrize(("M", "N", "K"), [(1, 8, 16), (63, 24, 48), (257, 72, 208), (70, 1152, 32)])
@pytest.mark.parametrize("tile", TILES)
def test_each_tile(force: Callable[[str], None], tile: str, M: int, N: int, K: int) -> None:
    force(tile)
    dtype = HALVES[M % 2]
    check(operands(M, N=N, K=K), torch.randn(N), dtype)


@pytest.mark.parametrize("tile", TILES)
def test_reads_without_bank_conflicts(emulated: Any, force: Callable[[str], None], tile: str) -> None:
    force(tile)
    check(operands(128, N=128, K=128), None, torch.float16)
    counted = emulated.count()
    m, n = TILES[tile]
    assert counted["blocks"] == -(-128 // m) * (128 // n)
    assert counted["int8_products"] == counted["blocks"] * (m // 16) * (n // 8) * 4
    assert counted["bank_conflicts"] == 0 < counted["matrix_reads"]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("M", "N", "K"), [(3, 1152, 1152), (2, 40, 2880), (5, 64, 2240)])
def test_widths_of_sana(M: int, N: int, K: int) -> None:
    check(operands(M, N=N, K=K), torch.randn(N), torch.bfloat16)


@pytest.mark.usefixtures("emulated")
def test_largest_sums() -> None:
    """5600 products of 128² or 127² add up to 2^26.4, beyond what fp32 sums would keep; a bias takes them
    away again. fp32 has steps of 8 there, so that 4 may be left.
    """
    values = torch.full((3, 5600), -128, dtype=torch.int8)
    weight = torch.stack([values[0], -values[0] - 1, *[torch.ones_like(values[0])] * 6])
    values[1, 0], values[2] = 127, 127
    exact = values.long() @ weight.long().T
    assert int(exact.abs().max()) == 5600 * 128 * 128
    out = check((values, torch.ones(3), weight, torch.ones(8)), -exact[0].float(), torch.float16)
    assert float(out[0].abs().max()) <= 4


@pytest.mark.usefixtures("emulated")
def test_exact_sums() -> None:
    """Half of 5600 products are 127², then as many -127²: of 2^25.4 a few units are left, and must show."""
    values = torch.full((5, 5600), 127, dtype=torch.int8)
    weight = torch.full((8, 5600), 127, dtype=torch.int8)
    weight[:, 2800:] = -127
    values[:, 0], weight[:, 0] = torch.arange(5), 1
    values[:, -1], weight[:, -1] = 1, 5 * torch.arange(8)
    out = check((values, torch.ones(5), weight, torch.ones(8)), None, torch.float16)
    assert torch.equal(out, torch.arange(5.0).half()[:, None] + 5 * torch.arange(8.0).half())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("lead", [(2, 100), (3, 7), (65,)], ids=str)
def test_every_epilogue(dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    N, K = 72, 48
    inputs = operands(*lead, N=N, K=K)
    modulation = torch.randn(lead[0], 1, 6 * N).chunk(6, dim=-1)
    gate = modulation[4] if len(lead) == 2 else torch.randn(N)
    constant = modulation[1][:1] if lead[0] == 3 else torch.randn(N)
    bias, residual = torch.randn(N), torch.randn(*lead, N).to(dtype)
    plain = check(inputs, None, dtype)
    every: list[dict[str, Any]] = [
        {"limit": 0.5},
        {"gate": gate},
        {"residual": residual},
        {"constant": constant},
        {"gate": gate, "residual": residual},
        {"gate": gate, "residual": residual, "constant": constant},
        {"limit": 0.5, "gate": gate, "residual": residual, "constant": constant},
    ]
    for asked in every:
        assert not torch.equal(check(inputs, bias, dtype, **asked), plain)


@pytest.mark.usefixtures("emulated")
def test_vectors_that_begin_anywhere() -> None:
    """As those of a model do that are mapped from its file."""
    values, scales, weight, weight_scales = operands(5, N=72, K=48)
    apart = torch.cat([torch.zeros(1), weight_scales])[1:]
    assert apart.data_ptr() % 16
    check((values, scales, weight, apart), torch.randn(73)[1:], torch.float16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_silu(dtype: torch.dtype) -> None:
    """x / (1 + exp(-x)): exp and the quotient to a few units of 2^-24, the result rounded to 11 bits or 8, so
    that one result in hundreds is the neighbour. Below -87 exp overflows, and results are below 2^-119.
    """
    inputs, bias = operands(65, N=136, K=32), torch.linspace(-120, 120, 136)
    for residual in (None, torch.zeros(65, 136, dtype=dtype)):
        out = w8a8_linear(*inputs, bias, dtype, silu=True, residual=residual)
        expected = reference_fused.w8a8_linear(*inputs, bias, dtype, silu=True, residual=residual)
        torch.testing.assert_close(out, expected, rtol=torch.finfo(dtype).eps, atol=2**-119)
        assert float((out != expected).float().mean()) < 0.01
        # not x, and not ReLU
        assert float(out.float().min()) < -0.2


@pytest.mark.usefixtures("emulated")
def test_residual_is_overwritten() -> None:
    inputs, gate = operands(2, 150, N=136, K=48), torch.randn(2, 1, 136)
    residual = torch.randn(2, 150, 136).half()
    expected = reference_fused.w8a8_linear(*inputs, None, torch.float16, gate=gate, residual=residual)
    out = w8a8_linear(*inputs, None, torch.float16, gate=gate, residual=residual, out=residual)
    assert out.data_ptr() == residual.data_ptr()
    assert torch.equal(out, expected)


@pytest.mark.usefixtures("emulated")
def test_groups_of_tiles(force: Callable[[str], None]) -> None:
    """10 by 4 tiles: a group of 8 rows of tiles, and one of 2."""
    force("small")
    check(operands(581, N=200, K=16), None, torch.float16)


@pytest.mark.usefixtures("emulated")
def test_bad_rows() -> None:
    """The scale NaN shows in its row, also behind a clip, and nowhere else; zeros give the bias."""
    values, scales, weight, columns = operands(40, N=72, K=32)
    scales[7], values[9], columns = torch.nan, 0, columns * 1e6
    bias, residual = torch.randn(72), torch.zeros(40, 72, dtype=torch.float16)
    out = check((values, scales, weight, columns), bias, torch.float16, limit=65504.0, residual=residual)
    assert bool(out[7].isnan().all()) and bool(torch.cat([out[:7], out[8:]]).isfinite().all())
    assert torch.equal(out[9], bias.half()) and float(out[8].abs().max()) == 65504
    # without the clip what is too large is infinite
    assert bool(check((values, scales, weight, columns), bias, torch.float16)[8].isinf().any())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("M", "N"), [(1, 8), (100, 136)])
def test_writes_nothing_around(M: int, N: int) -> None:
    inputs = operands(M, N=N, K=32)
    around = torch.full((M + 300, N), torch.nan, dtype=torch.float16)
    out = w8a8_linear(*inputs, out=around[150 : 150 + M])
    assert torch.equal(out, reference_fused.w8a8_linear(*inputs, dtype=torch.float16))
    assert bool(around[:150].isnan().all()) and bool(around[150 + M :].isnan().all())


@pytest.mark.parametrize("tile", [*TURING_TILES, None])
def test_turing(emulated_turing: Any, tile: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_turing.pretend(75, 40, 64 << 10)
    if tile is not None:
        monkeypatch.setitem(globals(), "w8a8_linear", partial(w8a8_linear, tile=number(tile)))
    for M, N, K in [(1, 8, 16), (63, 24, 176), (140, 136, 208)]:
        gate, residual = torch.randn(N), torch.randn(M, N).half()
        check(operands(M, N=N, K=K), torch.randn(N), torch.float16, gate=gate, residual=residual)
    assert emulated_turing.count()["bank_conflicts"] == 0


def test_too_little_shared_memory(emulated: Any, emulated_library: Path) -> None:
    inputs = operands(64, N=64, K=64)
    emulated.pretend(89, 24, 32 << 10)
    check(inputs, None, torch.float16)
    emulated.pretend(89, 24, 16 << 10)
    with pytest.raises(UnsupportedDevice):
        w8a8_linear(*inputs)
    emulated.pretend(70, 24, 99 << 10)
    with pytest.raises(UnsupportedDevice):
        w8a8_linear(*inputs)
    emulated.pretend(89, 24, 99 << 10)


def test_refused_by_the_library(emulated: Any) -> None:
    """Each wrong field by itself, of arguments that are right."""
    del emulated
    values, scales, weight, columns = operands(3, N=8, K=16)
    right: dict[str, Any] = {
        "values": values,
        "scales": scales,
        "weight": weight,
        "weight_scales": columns,
        "out": torch.zeros(3, 8).half(),
        "rows": 3,
        "columns": 8,
        "depth": 16,
        "tokens": 3,
        "type": cuda_library.TYPES[torch.float16],
    }
    call = cuda_library.load().call
    call("w8a8_linear", values.device, **right)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("size", {"rows": 2**31}),
        ("size", {"columns": 12}),
        ("size", {"columns": 0}),
        ("size", {"columns": 2**30}),
        ("size", {"depth": 131072}),
        ("size", {"depth": 0}),
        ("size", {"tokens": 0, "gate": columns}),
        ("size", {"limit": -1.0}),
        ("size", {"limit": float("nan")}),
        ("size", {"tile": 5}),
        ("size", {"tile": -1}),
    ]
    for match, fields in wrong:
        with pytest.raises(SanaError, match=match):
            call("w8a8_linear", values.device, **{**right, **fields})
