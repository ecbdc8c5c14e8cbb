"""The benchmark of solvers: a batch is what single pictures are, and rows say how near and how right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench_solver
from harness import study_tables
from judge.evaluation import world
from sana_edge import Sana
from sana_edge.store import hub
from sana_edge.torch_runtime.runtime import TorchRuntime


def test_a_batch_draws_what_single_pictures_are() -> None:
    model = hub.resolve("sana-tiny", offline=True)
    runtime = TorchRuntime.load(model, device=torch.device("cpu"), dtype="fp32", int8=False, backend="auto")
    texts = ["a red house", "two blue birds left of a yellow star"]
    drawn = bench_solver.draw(runtime, texts, [3, 4], "flow-euler", 3, 4.5)
    sana = Sana(runtime)
    for text, seed, pixels in zip(texts, (3, 4), drawn, strict=True):
        alone = sana.generate(text, seed=seed, steps=3, sampler="flow-euler").pixels
        # rounding of sums in another order, on either side of a half
        assert np.abs(pixels.astype(int) - alone.astype(int)).max() <= 1


def test_rows() -> None:
    place = world("shapes")
    chosen = dict([*place.choose(1).items()][:1])
    rows = []
    for number, prompt in chosen.items():
        true, _ = place.truth(number, prompt)
        off = np.where(true < 255, true + 1, true).astype(np.uint8)
        blank = np.zeros_like(true)
        kinds = {"flow-dpm 2": off, "flow-dpm 9": true, "flow-euler 2": blank, "flow-euler 9": true}
        rows.append({"number": number, **bench_solver.compared(kinds, prompt, place.judge)})
    data = {**bench_solver.found(rows, chosen), "steps": [2], "solution": 9, "prompts": len(chosen)}
    dpm, solution, euler, other = data["rows"]
    # most pixels are one of 255 off
    assert 48 < dpm["psnr"] < 52 and dpm["right"] == len(chosen) and dpm["score"] == 1
    assert solution["psnr"] is None and other["psnr_pictures"] == [None] * len(chosen)
    assert euler["psnr"] < 20 and euler["right"] == 0 and euler["own"] == euler["psnr"]
    data |= {"machine": {"gpu": None, "cores": 2, "cpu": "a CPU"}, "commit": {"hash": None}}
    data |= {"date": "2026-11-29", "command": "python benchmarks/bench_solver.py"}
    text = study_tables.solver(data).markdown()
    assert "| 1 of 1 | 0 of 1 |" in text and "equal dB" not in text
    assert bench_solver.plot(data)[:4] == b"\x89PNG"


def test_batches_have_one_prompt_of_each_category() -> None:
    chosen = world("shapes").choose(2)
    first, second = bench_solver.batches(chosen, ())
    assert len(first) == len(second) == 6
    assert first == list(world("shapes").choose(1))
    assert bench_solver.batches(chosen, first) == [second]


def test_the_solution_has_the_most_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_solver._options(["--steps", "8,20", "--solution", "20"])
    assert "--solution 20 must be more" in capsys.readouterr().err


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "solver.json"
    options = ["--limit", "1", "--steps", "2,3", "--solution", "4", "--output", str(output)]
    assert bench_solver.main(options) == 0
    data = json.loads(output.read_text())
    assert len(data["rows"]) == 6 and data["prompts"] == 6
    with Image.open(tmp_path / "solver.png") as picture:
        assert min(picture.size) > 300
    assert "flow-euler" in capsys.readouterr().out and not list(tmp_path.glob("*.partial"))
