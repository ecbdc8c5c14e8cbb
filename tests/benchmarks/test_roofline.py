"""The model of the time: schedules recorded from the code, limits by hand, files that regenerate."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import roofline
from harness import RESULTS, gpu_tables
from sana_edge.kernels.cuda.library import Library
from works import limits, machine_code, schedules, stages, tile_choices
from works.gpus import DRAM, GPUS, GRAPH, HOST, LATENCY, SYNCHRONISATION, Gpu
from works.machine_code import Code
from works.prediction import Predictor, Schedule, picture
from works.schedules import Launch

LAPTOP = next(gpu for gpu in GPUS if gpu.name == "RTX 4090 Laptop")


@pytest.fixture(scope="module")
def library(emulated_library: Path) -> Library:
    return Library(emulated_library)


@pytest.fixture(scope="module")
def layer() -> list[Launch]:
    return stages.step("0.6b", 1024, layers=1)[0]


def test_a_step_is_what_its_code_starts(layer: list[Launch]) -> None:
    """As tests/fused/test_denoiser.py counts on the emulator: nine launches a layer, and both ends."""
    two, around = stages.step("0.6b", 1024, layers=2)
    each = sum(launch.kernels for launch in two) - sum(launch.kernels for launch in layer)
    assert each == 9
    # its row of the sampler's numbers and of the tables; the clean latent, for who looks at it
    assert [launch.kernel for launch in around] == ["torch.copy_", "torch.copy_", "torch.div"]
    assert {launch.kernel for launch in layer if not launch.recordable} <= {"torch.mul"}
    (expand,) = (one for one in layer if one.kernel == "w8a8_linear" and one.numbers["columns"] == 5760)
    assert (expand.numbers["rows"], expand.numbers["depth"], expand.numbers["silu"]) == (2048, 1152, 1)
    assert expand.given == {"bias"}
    # weight, its scales and bias are there before; the tokens with their scales, and the result, are made
    assert expand.weights == 5760 * (1152 + 4 + 4)
    assert expand.maps == 2048 * (1152 + 4) + 2048 * 5760 * 2


def test_torch_is_recorded_too() -> None:
    import torch

    weight = torch.empty(8, 4, device="meta", dtype=torch.bfloat16)
    x = torch.empty(16, 4, device="meta", dtype=torch.bfloat16)
    first, second = schedules.recorded(lambda: torch.relu(x @ weight.t()))
    assert (first.kernel, first.multiplications, first.kind) == ("torch.mm", 16 * 4 * 8, "half")
    assert (first.weights, first.maps) == ((8 + 16) * 4 * 2, 16 * 8 * 2)
    assert (second.kernel, second.weights, second.maps) == ("torch.relu", 0, 2 * 16 * 8 * 2)


def launch(kernel: str, weights: int, maps: int, **numbers: Any) -> Launch:
    return Launch(kernel, numbers, frozenset(), weights, maps)


def test_dram_by_hand() -> None:
    """Half of 64 MB holds the maps of 40 MB but for 8; weights come each time."""
    gpu = LAPTOP
    assert gpu.l2 == 64 and gpu.bandwidth == 576
    found = limits.dram_seconds(launch("x", 1_000_000, 40_000_000), gpu)
    assert found == pytest.approx((1e6 + 8e6) / (DRAM * 576e9))
    assert limits.dram_seconds(launch("x", 0, 32_000_000), gpu) == 0


def test_a_kernel_of_bytes_alone(library: Library) -> None:
    """7.6 MB from L2 at 16 bytes for each of 76 SMs, and what every kernel waits for."""
    found = limits.price(launch("new_operation", 0, 7_600_000), LAPTOP, {}, library)
    l2 = 7_600_000 / (16 * 76) / 2.04e9
    assert found.limits["L2"] == pytest.approx(l2)
    assert found.total == pytest.approx(l2 + LATENCY / 2.04e9 + 1.2e-6)
    assert found.bound == "L2"


def test_issue_slots_by_hand(library: Library) -> None:
    """2048 rows, a warp each, 8 in a block: 256 blocks, so 4 on an SM; 32 warps of 1,000 instructions."""
    code = {"norm_modulate_quantize_kernelI8BFloat16Li1EEv": Code(1000, 0)}
    rows = launch("norm_modulate_quantize", 0, 0, rows=2048, columns=1152)
    found = limits.price(rows, LAPTOP, code, library)
    # 8 warps for each scheduler issue in 8 of 9 clocks
    assert found.limits["issue slots"] == pytest.approx(4 * 8 * 1000 / 4 * 9 / 8 / 2.04e9)
    assert found.bound == "issue slots"


def test_products_are_timed_where_tiles_are_chosen(library: Library, layer: list[Launch]) -> None:
    (expand,) = (one for one in layer if one.kernel == "w8a8_linear" and one.numbers["columns"] == 5760)
    found = limits.price(expand, LAPTOP, {}, library)
    assert found.tile is not None
    (choice,) = (
        row
        for row in tile_choices.choices(library, [LAPTOP], [1024])
        if (row["shapes"], row["product"]) == ("0.6b", "expand")
    )
    assert choice["us"][choice["tile"]] == round(found.tile.total / 2.04e3, 2)
    assert found.total == pytest.approx(
        limits.four_norm(found.tile.total / 2.04e9, limits.dram_seconds(expand, LAPTOP)) + 1.2e-6
    )


def test_a_picture_by_hand(library: Library) -> None:
    """Two passes that the host is slower for, and 20 recorded steps."""
    predictor = Predictor(LAPTOP, {}, library)
    small, large = launch("torch.add", 0, 100), launch("new_operation", 0, 7_600_000)
    found = picture(
        predictor,
        {
            "text": Schedule([small] * 10, times=2),
            "step": Schedule([large] * 6, [small], graph=True, queued=True, times=20),
            "decode": Schedule([large], graph=True),
        },
    )
    slow, fast = (limits.price(one, LAPTOP, {}, library).total for one in (large, small))
    assert found["text"] == pytest.approx(2 * 10 * HOST)
    assert found["step"] == pytest.approx(20 * (6 * slow + fast))
    assert found["decode"] == pytest.approx(max(slow, GRAPH))
    assert found["waits"] == pytest.approx(3 * SYNCHRONISATION)
    assert found["picture"] == pytest.approx(sum(found[name] for name in ("text", "step", "decode", "waits")))
    assert found["again"] == pytest.approx(found["picture"] - found["text"])


SASS = """
		Function : _Z5firstv
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x0 */
        /*0010*/              @!P0 BRA 0x80 ;
        /*0020*/                   IMMA.16832.S8.S8 R4, R2, R3, R4 ;
        /*0030*/                   IADD3 R5, R5, 0x1, RZ ;
        /*0040*/                   MUFU.EX2 R6, R6 ;
        /*0050*/              @P1  BRA 0x20 ;
        /*0060*/                   MUFU.RCP R6, R6 ;
        /*0070*/                   NOP ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
        /*00a0*/                   NOP;
		Function : _Z6secondv
        /*0000*/                   FADD R1, R1, R1 ;
        /*0010*/                   FADD R1, R1, R1 ;
        /*0020*/              @P1  BRA 0x10 ;
        /*0030*/                   FADD R1, R1, R1 ;
        /*0040*/                   FADD R1, R1, R1 ;
        /*0050*/              @P1  BRA 0x30 ;
        /*0060*/                   EXIT ;
"""


def test_machine_code_is_understood() -> None:
    found = {name: machine_code.code_of(text) for name, text in machine_code.functions(SASS)}
    assert found["_Z5firstv"] == Code(outside=4, loop=4, products=1, special_outside=1, special_loop=1)
    # the larger of two loops
    assert found["_Z6secondv"] == Code(outside=4, loop=3)
    assert found["_Z6secondv"].issued(10) == 34
    # half of what is outside
    assert found["_Z6secondv"].issued(10, 0.5) == 32
    # 4 + 4 trips x 4, against 1 + 4 special ones of 8 clocks each
    assert found["_Z5firstv"].issued(4) == 40


def test_the_tables_are_those_of_the_code(library: Library) -> None:
    """One command makes both files again: choices, and counts of launches, are what the code says now."""
    kept = json.loads((RESULTS / "tiles.json").read_text(encoding="utf-8"))
    assert kept["choices"] == roofline.tile_file(library)["choices"]
    data = json.loads((RESULTS / "roofline.json").read_text(encoding="utf-8"))
    stored = data["stages"]["0.6b"]
    counted = Counter(launch.kernel for launch in stages.step("0.6b", 1024)[0])
    assert stored["step"]["operations"] == counted
    once = stages.context("0.6b", data["pictures"][0]["steps"])
    assert stored["context"]["operations"] == Counter(launch.kernel for launch in once)
    # keys and values of all 28 layers are one product and one packing
    assert sum(launch.kernels for launch in once) <= 60


def test_all_five_gpus_at_all_sizes(library: Library) -> None:
    rows = list(tile_choices.choices(library, GPUS))
    assert len(rows) == 5 * len(tile_choices.SHAPES) * len(tile_choices.SIDES) * len(GPUS) == 200
    for row in rows:
        assert row["us"][row["tile"]] == min(row["us"].values())
        assert row["before"] in row["us"]


def test_a_measurement_stands_beside_its_prediction(tmp_path: Path) -> None:
    figures = {
        "kernels": [
            {"kernel": "w8a8_linear out", "size": "2048x1152x1152", "shapes": "0.6b", "side": 1024}
            | {"pictures": 1, "seconds": 40e-6}
        ]
    }
    call = {"steps": [{"name": "kernels", "figures": figures}, {"name": "smoke", "figures": None}]}
    found = {"machine": {"gpu": "NVIDIA H200"}, "calls": [call]}
    (tmp_path / "nvidia-h200.json").write_text(json.dumps(found))
    rows = list(roofline.measured(tmp_path))
    data = json.loads((RESULTS / "roofline.json").read_text(encoding="utf-8"))
    predicted = {"gpu": "H200", "kernel": "w8a8_linear", "size": "2048x1152x1152", "us": 30.0}
    table = gpu_tables.compared({**data, "measured": rows, "kernels": [predicted]})
    assert table.rows == [["H200", "w8a8_linear out", "2048x1152x1152", "40.0", "30.0", "0.75"]]


def test_gpus_are_described() -> None:
    for gpu in GPUS:
        assert isinstance(gpu, Gpu) and gpu.device.shared_memory == gpu.shared << 10
        assert gpu.device.processors == gpu.processors
