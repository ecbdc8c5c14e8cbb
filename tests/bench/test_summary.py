"""Statistics, the sentence at the end, and the table, of runs that are made up."""

from __future__ import annotations

from typing import Any

import pytest
from bench_runs import MACHINE, data, row, work

from sana_edge.bench import summary
from sana_edge.bench.measure import spread
from sana_edge.bench.summary import sentence

FLOAT = row("openvino", "float", [110.0, 112.0, 108.0], peak=10e9)
SMALL = row("openvino", "int8", [41.0, 40.0, 42.0], peak=4e9)
TORCH = row("torch", "int8", [50.0])


def test_spread() -> None:
    runs = [
        {
            "seconds": dict.fromkeys(summary.TITLES, float(value)),
            "peak": value,
            "device_peak": None,
            "joules": {},
        }
        for value in (5, 1, 2)
    ]
    found = spread(runs)
    assert found["median"]["picture"] == 2 and found["least"]["step"] == 1 and found["most"]["load"] == 5
    assert found["peak"] == 5 and found["device_peak"] is None and found["joules"] is None
    runs[0]["joules"], runs[1]["joules"] = {"cpu": 3.0, "gpu": 1.0}, {"cpu": 2.0}
    assert spread(runs)["joules"] == 3.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (0.0123, "0.012 s"),
        (0.497, "0.50 s"),
        (0.994, "0.99 s"),
        (0.996, "1.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
    ],
)
def test_seconds(value: float | None, shown: str) -> None:
    assert summary.seconds(value) == shown


def test_ratios_are_of_the_same_turns() -> None:
    """The second turn was slower for both; INT8 ended before its third."""
    a, b = row("openvino", "int8", [10.0, 20.0]), row("torch", "float", [20.0, 40.0, 99.0])
    assert summary.ratios(a, b) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [FLOAT, SMALL],
            "INT8 on openvino draws a 1024x1024 picture in 20 steps in 41 s here, 2.7 times as fast as bf16, "
            "with 60 % less memory.",
        ),
        # the fastest float, also where it runs on another backend
        (
            [
                row("torch", "float", [60.0, 60.0], dtype="fp32"),
                row("openvino", "int8", [40.0, 40.0], peak=5e9),
            ],
            "in 40 s here, 1.50 times as fast as fp32 on torch, with 25 % more memory.",
        ),
        (
            [
                row("diffusers", "float", [200.0]),
                row("torch", "float", [100.0]),
                row("torch", "int8", [50.0]),
            ],
            "2.0 times as fast as bf16, with as much memory; 4.0 times as fast as diffusers in bf16.",
        ),
        # turns that disagree
        (
            [row("torch", "float", [10.0, 9.0]), row("torch", "int8", [9.0, 10.0])],
            "about as fast as bf16, with as much memory.",
        ),
        (
            [row("torch", "float", [10.0]), row("torch", "int8", [9.9])],
            "in 9.9 s here, about as fast as bf16",
        ),
        (
            [row("torch", "int8", [5.0])],
            "in 5.0 s here; float did not draw: there is no float model.",
        ),
        # interrupted
        ([row("torch", "float", [5.0]), row("torch", "int8")], "INT8 did not draw: it was not reached."),
        (
            [row("torch", "float", failure="not enough memory"), row("torch", "int8", [5.0])],
            "float did not draw: torch bf16: not enough memory.",
        ),
        (
            [row("torch", "float", [5.0]), row("torch", "int8", failure="killed by SIGKILL")],
            "bf16 on torch draws a 1024x1024 picture in 20 steps in 5.0 s here; INT8 did not draw: "
            "torch int8: killed by SIGKILL.",
        ),
        (
            [row("torch", "float", failure="a"), row("torch", "int8", failure="b")],
            "No 1024x1024 picture in 20 steps was drawn: torch bf16: a; torch int8: b.",
        ),
        ([row("torch", "float"), row("torch", "int8")], "was drawn: nothing ran."),
    ],
)
def test_sentence(rows: list[dict[str, Any]], words: str) -> None:
    found = sentence(work(*rows), MACHINE)
    assert words in found and found.endswith(".") and "\n" not in found


@pytest.mark.parametrize(
    ("peak", "machine", "known", "why"),
    [
        (4e9, ["avx2"], None, "this CPU has no instructions for INT8 products (VNNI or AMX on x86"),
        # what torch told in its process counts before what the system said
        (4e8, ["avx2"], ["avx2", "avx_vnni"], "in so small a model rounding activations takes longer"),
        (4e9, None, None, "it lost in text and loop and decode"),
    ],
)
def test_int8_that_is_slower_says_why(
    peak: float, machine: list[str] | None, known: list[str] | None, why: str
) -> None:
    rows = [
        row("torch", "float", [10.0], peak=peak),
        row("torch", "int8", [20.0], peak=peak, instructions=known),
    ]
    found = sentence(work(*rows), {**MACHINE, "instructions": machine})
    assert f"in 20 s here, slower than bf16 (10 s), as {why}" in found
    assert found.endswith(", with as much memory.")


def test_random_weights_are_said_everywhere() -> None:
    random = work(FLOAT, SMALL, random_weights=True)
    assert "in 41 s here (random weights), 2.7 times" in sentence(random, MACHINE)
    assert any("Random weights" in line for line in summary.notes(data(random)))
    assert "random" not in " ".join(summary.notes(data(work(FLOAT, SMALL)))).lower()


def test_one_step_and_a_gpu() -> None:
    rows = [row("torch", "float", [2.0], device_peak=4e9), row("torch", "int8", [1.0], device_peak=1e9)]
    found = sentence(work(*rows, steps=1), MACHINE)
    assert "picture in 1 step in 1.0 s here" in found and "with 75 % less memory of the GPU" in found


def test_notes() -> None:
    failed = row("torch", "int8", failure="not enough memory for torch", joules_missing=["cpu: no RAPL"])
    failed["notes"] = ["tiny does not know: dog", "openvino computes the INT8 products in fp32"]
    skipped = [{"backend": "tensorrt", "reason": "not installed"}]
    found = data(work(FLOAT, failed), skipped=skipped, partial=True, done=3, total=18, load_before=3.2)
    lines = summary.notes({**found, "notes": ["diffusers is not measured: pip install diffusers"]})
    assert lines == [
        "Partial: interrupted after 3 of 18 runs.",
        "tensorrt is skipped: not installed.",
        "diffusers is not measured: pip install diffusers",
        "torch int8 failed: not enough memory for torch.",
        "openvino computes the INT8 products in fp32.",
        "No energy of the cpu: no RAPL.",
        "The machine was busy: 3.2 processes ran in the minute before, on average.",
    ]


def test_system() -> None:
    facts = summary.system(data(work(FLOAT)))
    assert facts["processor"] == "8 cores of A Processor, 16.0 GB"
    assert facts["instructions"] == "avx2, avx512_vnni" and "GPU" not in facts
    assert facts["power"] == "battery at 63 %, CPU limit 28 W, profile balanced"
    assert facts["versions"] == "python 3.12.0, sana-edge 0.1.0"
    power = {"source": None, "charge": None, "limit_w": None, "profile": None}
    gpu = {"gpu": "A GPU", "gpu_driver": "999.1", "gpu_power_limit_w": "80.00"}
    told = {**MACHINE, **gpu, "instructions": None, "power": power}
    facts = summary.system(data(work(FLOAT), machine=told))
    assert facts["instructions"] == "not told" and facts["power"] == "source not told, limit not told"
    assert facts["GPU"] == "A GPU, driver 999.1, limit 80.00 W"


def test_table() -> None:
    """The fastest first; columns that nobody has a value for are left out."""
    near = row("torch", "float", [120.0, 130.0], psnr=41.26, psnr_to="openvino bf16")
    found = summary.table(work(FLOAT, SMALL, near, row("torch", "int8", failure="no")))
    assert [cells[0] for cells in found.rows] == ["openvino int8", "openvino bf16", "torch bf16"]
    assert "energy" not in found.titles and "GPU memory" not in found.titles
    line = dict(zip(found.titles, found.rows[2], strict=True))
    assert line["picture"] == "125 s" and line["least to most"] == "120 to 130 s"
    assert line["peak memory"] == "4.00 GB" and line["PSNR"] == "41.3 dB"
    assert found.notes == ["sana-0.6b-1024, 1024x1024, 20 steps; PSNR to openvino bf16."]
    assert "least to most" not in summary.table(work(TORCH)).titles
    with_energy = summary.table(work(row("torch", "int8", [1.0], joules=12.345, device_peak=2e9)))
    line = dict(zip(with_energy.titles, with_energy.rows[0], strict=True))
    assert line["energy"] == "12.3 J" and line["GPU memory"] == "2.00 GB"
    assert max(map(len, found.text().splitlines())) < 150
