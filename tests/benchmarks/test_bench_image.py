"""The benchmark of times and memory: what it measures, what it refuses, and what it writes."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench_image import main
from harness import float_tables, measure, process
from harness.results import BASELINE, INT8, OURS
from harness.work import Loader, Output, Stage, Work
from sana_edge.errors import SanaError
from works.decoder import DecoderWork

SHAPES = ["--shapes", "tiny", "--size", "96", "--dtype", "fp32", "--steps", "4", "--repeat", "2"]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str]]:
    """Run the script and return its JSON and its table; memory is measured here, processes cost seconds."""
    monkeypatch.setattr(measure, "peaks", process._measure)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.001)

    def run(*arguments: str) -> tuple[dict[str, Any], str]:
        output = tmp_path / "new" / "out.json"
        code = main([*arguments, "--output", str(output)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        data: dict[str, Any] = json.loads(output.read_text())
        return data, printed.out

    return run


def rows(work: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["stage"], row["name"]): row for row in work["rows"]}


def test_shapes(run: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path) -> None:
    data, printed = run(*SHAPES, "--layers", "2", "--chart")
    denoiser, decoder = data["works"]
    found = rows(denoiser)
    assert list(found) == [
        *(("context", OURS), ("context", INT8)),
        *(("step", OURS), ("step", INT8), ("step", BASELINE)),
        *(("step+context/4", OURS), ("step+context/4", INT8)),
    ]
    step, small, base = (found["step", name] for name in (OURS, INT8, BASELINE))
    assert len(step["seconds"]) == 2 and min(step["seconds"]) > 0
    assert step["median"] == statistics.median(step["seconds"])
    assert step["ratios"] == [a / b for a, b in zip(step["seconds"], base["seconds"], strict=True)]
    assert 0 < step["difference"] < 1e-5 and base["difference"] is None and base["ratios"] == []
    assert (step["reference"], small["reference"], base["reference"]) == (BASELINE, BASELINE, None)
    assert small["ratios"] == [a / b for a, b in zip(small["seconds"], base["seconds"], strict=True)]
    to_float = [a / b for a, b in zip(small["seconds"], step["seconds"], strict=True)]
    assert small["ratios_to_float"] == to_float and step["ratio_to_float"] is None
    assert small["ratio_to_float"] == statistics.median(to_float)
    assert 1e-3 < small["difference"] < 0.01
    share = found["context", OURS]["median"] / 4
    assert found["step+context/4", OURS]["seconds"][0] == pytest.approx(step["seconds"][0] + share)
    assert step["memory"]["most"] > 0
    assert (denoiser["layers"], denoiser["all_layers"], denoiser["tokens"]) == (2, 3, 30)
    assert list(rows(decoder)) == [("decode", OURS), ("decode", INT8), ("decode", BASELINE)]
    assert 0 < rows(decoder)["decode", OURS]["difference"] < 1e-5
    assert 1e-3 < rows(decoder)["decode", INT8]["difference"] < 0.05
    for work in (denoiser, decoder):
        weights = {name: row["weights"] for (stage, name), row in rows(work).items() if "+" not in stage}
        assert weights[OURS] == weights[BASELINE] > 2 * weights[INT8] > 0
    assert "2 of 3 layers, 96x96" in printed and "step per layer" in printed
    assert denoiser["threads"] == torch.get_num_threads() and data["machine"]["cores"] > 0
    assert data["command"].startswith("python benchmarks/bench_image.py --shapes tiny")
    assert str(tmp_path) not in json.dumps(data)
    assert (tmp_path / "new" / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bf16_and_tiles_of_diffusers(run: Callable[..., tuple[dict[str, Any], str]]) -> None:
    """Tiles change the picture, so that equality is not asked for there."""
    options = ["--dtype", "bf16", "--tiled", "--decode-size", "64,544", "--stage", "step,decode"]
    data, printed = run(*SHAPES, *options)
    denoiser, small, large = data["works"]
    assert 1e-4 < rows(denoiser)["step", OURS]["difference"] < 0.1
    assert rows(small)["decode", OURS]["difference"] < 0.02 < rows(large)["decode", OURS]["difference"]
    assert "context" not in printed and "diffusers in tiles" in printed


@pytest.mark.slow
def test_model(run: Callable[..., tuple[dict[str, Any], str]], tiny_folder: Path) -> None:
    data, printed = run("--model", str(tiny_folder), "--dtype", "fp32,bf16", "--steps", "2", "--repeat", "1")
    exact, half = data["works"]
    stages = {"text-first", "text", "context", "step", "decode", "picture", "step+context/2"}
    for work in (exact, half):
        assert {stage for stage, name in rows(work) if name == OURS} == stages
        assert {stage for stage, name in rows(work) if name == BASELINE} == stages - {
            "context",
            "step+context/2",
        }
    for stage in ("text-first", "text", "step"):
        assert rows(exact)[stage, OURS]["difference"] < 1e-5
        assert rows(half)[stage, OURS]["difference"] < 0.1
    for stage in ("decode", "picture"):
        assert rows(exact)[stage, OURS]["levels"] <= 1
        assert rows(exact)[stage, INT8]["difference"] > 1e-3
    for stage in ("text", "decode", "picture"):
        small, whole, theirs = (rows(exact)[stage, name]["weights"] for name in (INT8, OURS, BASELINE))
        assert small < 0.6 * whole and whole <= theirs
    assert (exact["model"], exact["size"]) == (tiny_folder.name, 128)
    assert str(tiny_folder.parent) not in json.dumps(data)
    assert "tiny, 128x128, 2 steps, fp32 on cpu" in printed


@dataclass(frozen=True, kw_only=True)
class Fake(Work):
    """Work with the given outputs."""

    outputs: dict[str, Output]
    free: bool = False
    allowed: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1

    @property
    def title(self) -> str:
        return "fake"

    @property
    def int8_tolerance(self) -> dict[str, float]:
        return self.allowed

    def limit(self, stage: str, name: str) -> float | None:
        return None if self.free else super().limit(stage, name)

    def loaders(self) -> dict[str, Loader]:
        return {name: lambda name=name: {"work": self._stage(name)} for name in self.outputs}  # type: ignore[misc]

    def _stage(self, name: str) -> Stage:
        def call() -> Output:
            self.calls.append(name)
            time.sleep(0.002)
            return self.outputs[name]

        return Stage(call)


def measured(monkeypatch: pytest.MonkeyPatch, work: Work, repeat: int = 3) -> list[measure.Row]:
    monkeypatch.setattr(measure, "peaks", process._measure)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.001)
    threads = torch.get_num_threads()
    try:
        return measure.measure(work, ("work",), repeat, lambda line: None)
    finally:
        torch.set_num_threads(threads)


def test_they_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once warm, once to see how long it takes, three samples, and once each for the memory."""
    names = [OURS, "another", BASELINE]
    work = Fake(outputs={name: torch.ones(2) for name in names})
    found = measured(monkeypatch, work)
    assert work.calls == names * 6
    assert [row.name for row in found] == names
    assert [len(row.ratios) for row in found] == [3, 3, 0]


@pytest.mark.parametrize(
    "output",
    [torch.tensor([1.0, 1.1]), torch.tensor([1.0, torch.nan]), torch.ones(3), np.full((2,), 3, np.uint8)],
    ids=["values", "nan", "shape", "picture"],
)
def test_unequal_work_is_refused(monkeypatch: pytest.MonkeyPatch, output: Output) -> None:
    expected = np.ones(2, np.uint8) if isinstance(output, np.ndarray) else torch.ones(2)
    outputs: dict[str, Output] = {OURS: output, BASELINE: expected}
    with pytest.raises(SanaError, match="work: the output of sana-edge is not diffusers's"):
        measured(monkeypatch, Fake(outputs=outputs), repeat=1)
    assert len(measured(monkeypatch, Fake(outputs=outputs, free=True), repeat=1)) == 2


def test_int8_may_differ_by_its_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to the one of fp32, 1e-3; the float implementation gets no more than before."""
    off = {OURS: torch.ones(4), INT8: torch.full((4,), 1.02), BASELINE: torch.ones(4)}
    found = measured(monkeypatch, Fake(outputs=off, allowed={"work": 0.0195}), repeat=1)
    assert [row.difference for row in found] == [0.0, pytest.approx(0.02), None]
    assert measured(monkeypatch, Fake(outputs=off), repeat=1)[1].difference == pytest.approx(0.02)
    with pytest.raises(SanaError, match="the output of sana-edge int8 is not diffusers's"):
        measured(monkeypatch, Fake(outputs=off, allowed={"work": 0.0185}), repeat=1)
    with pytest.raises(SanaError, match="the output of sana-edge is not diffusers's"):
        measured(monkeypatch, Fake(outputs={**off, OURS: off[INT8]}, allowed={"work": 0.1}), repeat=1)
    broken = {**off, INT8: torch.full((4,), torch.nan)}
    with pytest.raises(SanaError, match="sana-edge int8"):
        measured(monkeypatch, Fake(outputs=broken), repeat=1)


def test_without_the_baseline(run: Callable[..., tuple[dict[str, Any], str]]) -> None:
    """INT8 is compared with our own float, which alone has nothing to be compared with."""
    data, printed = run(*SHAPES, "--contenders", f"{OURS},{INT8}", "--layers", "1")
    found = rows(data["works"][0])
    assert {name for _, name in found} == {OURS, INT8}
    assert not re.search(rf"^\S+ +{BASELINE}", printed, re.MULTILINE)
    small = found["step", INT8]
    assert (small["reference"], small["ratios"], small["ratio"]) == (OURS, [], None)
    assert len(small["ratios_to_float"]) == 2 and 1e-3 < small["difference"] < 0.01
    assert found["step", OURS]["reference"] is None and found["step", OURS]["difference"] is None
    assert found["step+context/4", INT8]["ratio_to_float"] > 0
    assert float_tables.speed([data]).rows[0][1] == "text keys and values, once per picture"


def test_one_contender(run: Callable[..., tuple[dict[str, Any], str]]) -> None:
    data, _ = run(*SHAPES, "--contenders", INT8, "--stage", "decode")
    (row,) = data["works"][0]["rows"]
    assert (row["ratio"], row["ratio_to_float"], row["difference"]) == (None, None, None)


def test_tables(run: Callable[..., tuple[dict[str, Any], str]]) -> None:
    """A row for each stage that diffusers has too; without INT8's columns where none was measured."""
    data, _ = run(*SHAPES, "--stage", "context,step,decode")
    found = rows(data["works"][0])
    step, _ = float_tables.speed([data]).rows
    medians = [f"{found['step', name]['median']:.3g} s" for name in (BASELINE, OURS)]
    small, whole = found["step", INT8], found["step", OURS]
    assert step[1:5] == ["denoising step", *medians, f"{whole['ratio']:.2f}"]
    assert step[5:8] == [
        f"{small['median']:.3g} s",
        f"{small['ratio']:.2f}",
        f"{small['ratio_to_float']:.2f}",
    ]
    assert str(step[8]).endswith(f"MB ({small['weights'] / whole['weights']:.2f})")
    assert str(step[9]).count("/") == 2
    for work in data["works"]:
        work["rows"] = [row for row in work["rows"] if row["name"] != INT8]
    table = float_tables.speed([data])
    assert {len(table.titles), *map(len, table.rows)} == {6}


def test_pictures_may_differ_by_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs: dict[str, Output] = {OURS: np.full((2,), 2, np.uint8), BASELINE: np.ones(2, np.uint8)}
    ours, _ = measured(monkeypatch, Fake(outputs=outputs), repeat=1)
    assert (ours.levels, ours.difference) == (1, 1.0)


def test_the_peak_is_that_of_the_stage() -> None:
    large = process._peak(lambda: torch.ones(16 << 20), "cpu")
    small = process._peak(lambda: torch.ones(1 << 20), "cpu")
    if large.before is None or small.before is None:
        pytest.skip("this system keeps one peak for the whole process")
    assert large.most is not None and 60e6 < large.most - large.before < 100e6
    assert small.most is not None and small.most - small.before < 30e6


def test_memory_in_a_process_of_its_own() -> None:
    work = DecoderWork(shapes="tiny", size=64, tiled=False, dtype="fp32", device="cpu", threads=1)
    (peak,) = process.peaks(work, OURS, ("decode",)).values()
    assert peak.most is not None and 50e6 < (peak.before or 0) <= peak.most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "FOLDER", "--layers", "2"], "--layers does not go with --model"),
        (["--model", "FOLDER", "--size", "100"], "100x100"),
        (["--model", "SPRINT"], "Sprint"),
        (["--shapes", "tiny", "--layers", "4"], "4 layers"),
        (["--shapes", "tiny", "--size", "100"], "100x100"),
        (["--shapes", "tiny", "--decode-size", "64,65"], "65x65"),
        (["--shapes", "tiny", "--tokens", "301"], "301 tokens"),
        (["--shapes", "tiny", "--steps", "1001"], "1001"),
        (["--shapes", "tiny", "--dtype", "int8"], "int8"),
        (["--shapes", "tiny", "--dtype", "fp16", "--device", "cpu"], "fp16"),
        (["--shapes", "tiny", "--stage", "step,text"], "text"),
        (["--shapes", "tiny", "--contenders", "sana-edge,int8"], "unknown contender 'int8'"),
        (["--shapes", "tiny", "--contenders", "sana-edge", "--chart"], "--chart"),
        (["--model", "PACKAGE"], "marked-int8 is INT8 already"),
        (["--shapes", "tiny", "--output", "FILE/out.json"], "FILE"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tiny_folder: Path,
    tiny_sprint_folder: Path,
    marked_int8: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "FILE").touch()
    places = {"FOLDER": str(tiny_folder), "SPRINT": str(tiny_sprint_folder), "PACKAGE": str(marked_int8)}
    given = [places.get(word, word).replace("FILE/", f"{tmp_path}/FILE/") for word in arguments]
    assert main(given if "--output" in given else [*given, "--output", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and message in printed.err
    assert "hint:  " in printed.err or "FILE" in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FILE", marked_int8.name]


@pytest.mark.parametrize("arguments", [[], ["--shapes", "9b"], ["--shapes", "tiny", "--repeat", "0"]])
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_a_long_call_is_its_own_first_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    class Empty(Work):
        title, stages = "nothing", ("step",)

        def loaders(self) -> dict[str, Any]:
            return {"sana-edge": lambda: {"step": Stage(lambda: made.append(0))}}

    made: list[int] = []
    work = Empty(dtype="fp32", device="cpu", threads=1)
    monkeypatch.setattr(measure, "LONG_SECONDS", 0)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-12)
    (row,) = measure.measure(work, ("step",), 2, lambda line: None, memory=False)
    assert len(row.seconds) == 2
    # one to see how long a sample is, which a call above a second is spared
    assert len(made) == 3
