"""The Triton W8A8 linear layer against its definition, interpreted; and compiled ahead of time."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.kernels import reference, reference_fused

Compiled = Callable[..., dict[str, str]]

# M, N, K: one element; odd; tails of every kind; several tiles; SANA 1.6B's deepest
SHAPES = [(1, 1, 1), (33, 70, 129), (130, 66, 208), (581, 193, 32), (16, 64, 5600)]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def op(interpreted: None) -> Iterator[ModuleType]:
    """The kernel's module, while new tensors are filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield importlib.import_module("sana_edge.kernels.triton.w8a8_linear")
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiles(interpreted: None) -> ModuleType:
    return importlib.import_module("sana_edge.kernels.triton.linear_tiles")


def operands(*lead: int, N: int, K: int, per_row: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values (*lead, K), scales, weight and its scales; results are of the size of 1."""
    values, weight = (torch.randint(-128, 128, (*shape, K), dtype=torch.int8) for shape in (lead, (N,)))
    scales = torch.rand(lead if per_row else ()) / 64
    return values, scales, weight, torch.rand(N) / (64 * max(K, 1) ** 0.5)


@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_in_every_bit(op: ModuleType, M: int, N: int, K: int, per_row: bool, bias: bool) -> None:
    inputs = operands(M, N=N, K=K, per_row=per_row)
    added = torch.randn(N) if bias else None
    for dtype in (torch.float32, torch.float16):
        out = op.w8a8_linear(*inputs, added, dtype)
        assert out.dtype == dtype
        assert torch.equal(out, reference.w8a8_linear(*inputs, added, dtype))


def test_each_tile(op: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for tile in {tile for table in tiles.TABLES.values() for tile in table.tiles}:
        monkeypatch.setattr(op, "pick_tile", lambda *_, chosen=tile: chosen)
        # whole tiles, and one row, column or 16 values more
        for more in (0, 1):
            M, N, K = 2 * tile.m + more, tile.n + more, tile.k + 16 * more
            inputs = operands(2, M // 2, N=N, K=K) if not more else operands(M, N=N, K=K)
            gate = torch.randn(2, 1, N) if not more else torch.randn(N)
            asked = {"gate": gate, "residual": torch.randn(*inputs[0].shape[:-1], N)}
            assert torch.equal(op.w8a8_linear(*inputs, **asked), reference.w8a8_linear(*inputs, **asked))


def test_groups(op: ModuleType, tiles: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 by 4 tiles: a group of 8 rows of tiles, and one of 2."""
    monkeypatch.setattr(op, "pick_tile", lambda *_: tiles.Tile(64, 64, 64, 4, 4))
    inputs = operands(581, N=193, K=32)
    assert torch.equal(op.w8a8_linear(*inputs), reference.w8a8_linear(*inputs))


def test_largest_sums(op: ModuleType) -> None:
    """5600 · 128² is beyond what fp32 or fp16 sums would keep: one step in the last value must show."""
    values = torch.full((3, 5600), -128, dtype=torch.int8)
    weight = torch.stack([values[0], -values[0] - 1, torch.ones_like(values[0])])
    values[1, 0], values[2] = 127, 127
    ones = torch.ones(())
    out = op.w8a8_linear(values, ones, weight, torch.ones(3))
    exact = values.long() @ weight.long().T
    assert torch.equal(out, exact.float())
    assert int(exact.abs().max()) == 5600 * 128 * 128 < 2**31


def test_bf16(op: ModuleType) -> None:
    """To nearest on a GPU. Triton's interpreter cuts the low 16 bits off: one or the other, nothing else."""
    inputs, bias = operands(70, N=96, K=64), torch.randn(96).bfloat16()
    out = op.w8a8_linear(*inputs, bias, torch.bfloat16)
    exact = reference.w8a8_linear(*inputs, bias)
    cut = (exact.view(torch.int32) & -65536).view(torch.float32)
    assert out.dtype == torch.bfloat16
    assert bool(((out.float() == cut) | (out == exact.bfloat16())).all())


@pytest.mark.parametrize("tokens", [40, 64])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gate_and_residual(op: ModuleType, tokens: int, rows: int, dtype: torch.dtype) -> None:
    """A gate that is a part of the modulation (B, 1, 6 C), of tiles within a picture and across pictures."""
    inputs = operands(3, tokens, N=72, K=48)
    parts = torch.randn(rows, 1, 6 * 72).to(dtype).chunk(6, dim=-1)
    gate = parts[4] if rows == 3 else parts[4][0, 0]
    asked = {"gate": gate, "residual": torch.randn(3, tokens, 72).to(dtype), "limit": 0.5}
    bias = torch.randn(72).to(dtype)
    out = op.w8a8_linear(*inputs, bias, dtype, **asked)
    assert torch.equal(out, reference.w8a8_linear(*inputs, bias, dtype, **asked))
    assert not torch.equal(out, reference.w8a8_linear(*inputs, bias, dtype, **{**asked, "limit": None}))


@pytest.mark.parametrize("tokens", [40, 64])
def test_constant_and_fp32_vectors(op: ModuleType, tokens: int) -> None:
    """fp32 vectors, of each picture and of all, with fp16 results that take the place of the residual."""
    inputs = operands(3, tokens, N=72, K=48)
    parts, bias = torch.randn(3, 1, 6 * 72).chunk(6, dim=-1), torch.randn(72)
    for gate, constant in ((parts[4], parts[1]), (None, parts[1]), (parts[4], parts[0][0, 0])):
        residual = torch.randn(3, tokens, 72).half()
        asked = {"gate": gate, "constant": constant}
        expected = reference_fused.w8a8_linear(*inputs, bias, torch.float16, residual=residual, **asked)
        out = op.w8a8_linear(*inputs, bias, torch.float16, residual=residual, out=residual, **asked)
        assert out is residual and torch.equal(out, expected)


def test_relu_of_the_first_columns(op: ModuleType) -> None:
    values, *rest = operands(70, N=96, K=64)
    rest[0][3] = torch.nan
    out = op.w8a8_linear(values, *rest, dtype=torch.float16, relu=33)
    expected = reference.w8a8_linear(values, *rest, dtype=torch.float16)
    expected[:, :33] = expected[:, :33].relu()
    assert torch.equal(out.nan_to_num(7), expected.nan_to_num(7)) and bool(out[3].isnan().all())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu(op: ModuleType) -> None:
    """x / (1 + exp(-x)): exp to 4 units in the last place at most in numpy and torch, the sum and quotient to
    half a unit: 2 · (4 + 1/2 + 1/2) · 2^-23 < 2^-19. Below -88.7 exp overflows, and results are below 2^-119.
    """
    inputs = operands(65, N=130, K=64)
    bias = torch.linspace(-120, 120, 130)
    out = op.w8a8_linear(*inputs, bias, silu=True)
    torch.testing.assert_close(
        out, reference.w8a8_linear(*inputs, bias, silu=True), rtol=2**-19, atol=2**-119
    )
    # not x, and not ReLU
    assert float(out.min()) < -0.2


def test_bad_rows(op: ModuleType) -> None:
    """The scale NaN shows in its row, also behind a clip, and nowhere else; zeros give the bias."""
    values, scales, weight, columns = operands(40, N=66, K=32)
    scales[7], values[9], columns = torch.nan, 0, columns * 1e6
    bias = torch.randn(66)
    asked = {"limit": 65504.0, "residual": torch.zeros(40, 66, dtype=torch.float16)}
    out = op.w8a8_linear(values, scales, weight, columns, bias, torch.float16, **asked)
    assert bool(out[7].isnan().all()) and bool(torch.cat([out[:7], out[8:]]).isfinite().all())
    assert torch.equal(out[9], bias.half()) and float(out[8].abs().max()) == 65504
    expected = reference.w8a8_linear(values, scales, weight, columns, bias, torch.float16, **asked)
    assert torch.equal(out.nan_to_num(1), expected.nan_to_num(1))


def test_empty(op: ModuleType) -> None:
    assert op.w8a8_linear(*operands(0, N=5, K=16)).shape == (0, 5)
    assert op.w8a8_linear(*operands(2, 3, N=0, K=16)).shape == (2, 3, 0)
    assert torch.equal(op.w8a8_linear(*operands(3, N=4, K=0)), torch.zeros(3, 4))


def test_refusals(op: ModuleType) -> None:
    values, scales, weight, columns = operands(2, 4, N=8, K=16)

    def refused(match: str, *inputs: Tensor, **asked: Any) -> None:
        with pytest.raises(InvalidInput, match=match) as caught:
            op.w8a8_linear(*inputs, **asked)
        assert caught.value.hint

    refused("values of w8a8_linear is torch.float32", values.float(), scales, weight, columns)
    refused("scales of w8a8_linear is torch.float64", values, scales.double(), weight, columns)
    refused("no product", values, scales, weight[:, :8].contiguous(), columns)
    refused("weight of w8a8_linear is .* not contiguous", values, scales, weight.T.contiguous().T, columns)
    refused("values of w8a8_linear is .* not contiguous", values.mT.contiguous().mT, scales, weight, columns)
    refused(r"scales of w8a8_linear is torch.float32 \(4,\)", values, scales[0].clone(), weight, columns)
    refused("weight_scales of .* is", values, scales, weight, columns[:4].clone())
    refused("bias of .* is", values, scales, weight, columns, bias=columns[:1].clone())
    refused("gate of .* is", values, scales, weight, columns, gate=torch.zeros(4, 1, 8))
    refused("residual of .* is", values, scales, weight, columns, residual=torch.zeros(8, 8))
    refused("constant of .* is", values, scales, weight, columns, constant=torch.zeros(4, 1, 8))
    refused("out of .* is", values, scales, weight, columns, out=torch.zeros(2, 4, 8).half())
    refused("cannot give torch.int8", values, scales, weight, columns, dtype=torch.int8)
    refused("weight of .* on meta", values, scales, weight.to("meta"), columns)
    refused("overflow int32", *operands(1, N=1, K=131072))


def test_tables(tiles: ModuleType) -> None:
    for capability, (shared, *_, candidates) in tiles.TABLES.items():
        for tile in candidates:
            stages = tile.stages - (capability != 90)
            assert stages * (tile.m + tile.n) * tile.k <= shared << 10
            assert tile.m * tile.n <= 128 * 32 * tile.warps
            # the sums go through shared memory on their way out, 16 bits each
            assert 2 * tile.m * tile.n <= shared << 10
    # 76 SMs of a 4090 Laptop: 72 of 256 × 128 for two pictures of 1024 px, 72 of 128 × 128 for one
    assert tiles.pick_tile(2048, 1152, 1152, 89, 76)[:2] == (256, 128)
    assert tiles.pick_tile(1024, 1152, 1152, 89, 76)[:2] == (128, 128)
    assert tiles.pick_tile(2048, 1152, 1153, 89, 76)[:2] == (64, 64)
    assert tiles.table(100) is tiles.TABLES[90] and tiles.table(121) is tiles.TABLES[120]
    with pytest.raises(UnsupportedDevice, match=r"has 7\.5"):
        tiles.table(75)
    with pytest.raises(UnsupportedDevice, match="not on cpu"):
        tiles.device_of(torch.device("cpu"), False)


NOTHING = dict.fromkeys(("p_gate", "p_residual", "p_constant"))
EPILOGUES: dict[str, dict[str, object]] = {
    "plain": {**NOTHING, "SILU": False, "LIMIT": None, "RELU": 0},
    "silu": {**NOTHING, "SILU": True, "LIMIT": None, "RELU": 0},
    "relu": {**NOTHING, "SILU": False, "LIMIT": None, "RELU": 1152},
    "residual": {"p_constant": None, "SILU": False, "LIMIT": 65504.0, "RELU": 0},
    "constant": {"SILU": False, "LIMIT": None, "RELU": 0},
}


# bytes of a thread that may wait on the stack where gate, residual and constant meet: found 32 to 56,
# and 576 with the layout of 9.0's sums
STACKS = {"constant": 576}


def compile_tile(compiled: Compiled, tile: Any, epilogue: dict[str, object], **asked: Any) -> dict[str, str]:
    pointers = {"p_values": "*i8", "p_scales": "*fp32", "p_weight": "*i8", "p_columns": "*fp32"}
    pointers |= dict.fromkeys(("p_bias", "p_gate", "p_constant"), "*fp32")
    pointers |= dict.fromkeys(("p_residual", "p_out"), "*bf16")
    sizes = dict.fromkeys(("M", "N", "K", "tokens", "stride_gate", "stride_constant"), "i32")
    constexprs = {"PER_ROW": True, "EVEN_K": False, "GROUP": 8, "PER_TOKEN": False, **epilogue}
    constexprs |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, **asked}
    return compiled(
        "w8a8_linear.w8a8_linear_kernel",
        {name: kind for name, kind in {**pointers, **sizes}.items() if name not in constexprs},
        constexprs,
        multiples=[name for name in sizes if name not in constexprs],
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
    )


def check(code: dict[str, str], stack: int = 0) -> None:
    # on tensor cores, in integers; sm_90 has instructions of its own
    assert re.search(r"mma\S*\.s32\.s8\.s8", code["ptx"])
    assert re.search(r"\bI(G)?MMA\.\S*S8\.S8", code["sass"])
    # each operation of the epilogue is rounded
    assert "fma.rn.f32" not in code["ptx"] and "FFMA" not in code["sass"]
    # 16 bytes at a time, past the registers, and stored so
    assert re.search(r"LDGSTS\S*\.128", code["sass"]) and re.search(r"STG\S*\.128", code["sass"])
    # no registers on the stack
    found = re.search(r"STACK:(\d+)", code["usage"])
    assert found and int(found[1]) <= stack, code["usage"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EPILOGUES)
def test_compiles(compiled: Compiled, request: pytest.FixtureRequest, tiles: ModuleType, name: str) -> None:
    capability = request.node.callspec.params["compiled"]
    check(compile_tile(compiled, tiles.table(capability).tiles[0], EPILOGUES[name]), STACKS.get(name, 0))


@pytest.mark.slow
def test_compiles_all_tiles(compiled: Compiled, request: pytest.FixtureRequest, tiles: ModuleType) -> None:
    capability = request.node.callspec.params["compiled"]
    for tile in tiles.table(capability).tiles[1:]:
        for name, epilogue in EPILOGUES.items():
            check(compile_tile(compiled, tile, epilogue, EVEN_K=True), STACKS.get(name, 0))
    # sizes of 1 are constants to Triton, and odd ones loaded byte by byte
    odd = dict.fromkeys(("M", "N", "K", "tokens", "stride_gate", "stride_constant"), 1)
    code = compile_tile(
        compiled, tiles.table(capability).tiles[-1], EPILOGUES["residual"], **odd, PER_TOKEN=True
    )
    assert re.search(r"mma\S*\.s32\.s8\.s8", code["ptx"])
