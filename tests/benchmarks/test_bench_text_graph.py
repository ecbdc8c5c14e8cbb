"""The benchmark of the text encoder's graph: equal work, what it refuses, its table and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import bench_text_graph
from harness import engine_tables
from sana_edge.errors import SanaError
from works.engines import ENGINES

SHAPES = bench_text_graph.SHAPES["tiny"]


@pytest.mark.slow
def test_it_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "text.json"
    options = ["--shapes", "tiny", "--layers", "2", "--tokens", "5", "--repeat", "1", "--threads", "1"]
    assert bench_text_graph.main([*options, "--output", str(output)]) == 0, capsys.readouterr().err
    data = json.loads(output.read_text())
    assert [work["instruction"] for work in data["works"]] == [bench_text_graph.INSTRUCTION, 0]
    assert data["layers"] == 2 and data["commit"] and data["command"].endswith(output.name)
    for work in data["works"]:
        names = [row["name"] for row in work["rows"]]
        assert names[:3] == [bench_text_graph.BASELINE_TEXT, bench_text_graph.HALF, bench_text_graph.OURS]
        assert {*names[3:], *data["left_out"]} == set(ENGINES)
        apart = {row["name"]: row["difference"] for row in work["rows"]}
        assert apart[bench_text_graph.BASELINE_TEXT] == 0 and 1e-4 < apart[bench_text_graph.OURS] < 0.02
        # fp32 as for parity; weights in 8 bits are off by some thousandths
        assert apart["onnxruntime"] < 1e-5 and apart["openvino"] < 1e-5
        assert 1e-4 < apart["onnxruntime int8"] < 0.02 and 1e-4 < apart["openvino int8"] < 0.02
    assert "behind 246" in capsys.readouterr().out


@torch.inference_mode()
def test_tokens_behind_others_are_those_of_all_at_once() -> None:
    model = bench_text_graph.gemma(SHAPES, 2)
    ids = torch.randint(0, 1000, (1, 30))
    whole, _ = bench_text_graph.read(model, ids, [])
    _, past = bench_text_graph.read(model, ids[:, :20], [])
    # sums in another order: some tens of roundings of 2^-24
    torch.testing.assert_close(
        bench_text_graph.read(model, ids[:, 20:], past)[0], whole[:, 20:], rtol=1e-4, atol=1e-4
    )


def test_unequal_work_is_refused() -> None:
    model = bench_text_graph.gemma(SHAPES, 1)
    other = bench_text_graph.gemma(SHAPES, 1)
    other.norm.weight.add_(1)
    models = {bench_text_graph.BASELINE_TEXT: model, bench_text_graph.OURS.replace("INT8", "own"): other}
    with pytest.raises(SanaError, match=r"is off by .* is expected"):
        bench_text_graph.measured(models, {}, 3, 0, 1)


def test_table() -> None:
    machine = {"gpu": None, "cores": 2, "cpu": "a CPU"}
    data: dict[str, Any] = {"machine": machine, "commit": {"hash": None}, "date": "2026-11-29"}
    data |= {"command": "python x", "layers": 4, "all_layers": 26, "shapes": "gemma-2-2b", "threads": 2}
    row = {"name": "transformers", "seconds": 0.5, "ratio": 1.0, "difference": 0.0}
    rows = [row, {"name": "openvino int8", "seconds": 0.25, "ratio": 0.5, "difference": 0.01}]
    works = [{"tokens": 30, "instruction": behind, "rows": rows} for behind in (246, 0)]
    data |= {"works": works, "load_before": 0.1, "left_out": {"openvino bf16": "this CPU has no bf16"}}
    text = engine_tables.text_graph(data).markdown()
    assert "| openvino int8 | 0.25 s | 0.50 | 1.0e-02 | 0.25 s | 0.50 | 1.0e-02 |" in text
    assert "openvino bf16: this CPU has no bf16." in text and "4 of the 26 layers" in text
