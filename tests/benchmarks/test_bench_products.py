"""INT8 products by place: what is counted, what is refused, the table and the file."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

for package in ("onnx", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import bench_products
from harness import engine_tables
from sana_edge.bench.shapes import DENOISERS
from sana_edge.engines.openvino.backend import sums_are_exact
from works.products import Product, Timer

SIDE, TOKENS = 64, 2 * 2


def test_a_step_is_measured_where_products_run_in_int8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "products.json"
    options = ["--shapes", "tiny", "--layers", "2", "--size", str(SIDE), "--side", "128", "--repeat", "1"]
    options += ["--threads", "1", "--by", "openvino int8", "--output", str(output)]
    code = bench_products.main(options)
    said = capsys.readouterr()
    if not sums_are_exact():
        assert code == 1 and "no product of this graph runs in INT8 here" in said.err and not output.exists()
        return
    assert code == 0, said.err
    data = json.loads(output.read_text())
    *rows, whole = data["work"]["rows"]
    config = DENOISERS["tiny"]
    found = {row["name"]: row for row in rows}
    # of two layers, and the prompt's rows alone up to the first cross-attention
    queries = found["blocks/attention/qkv"]
    assert queries["products"] == 2 and queries["operations"] % (TOKENS * 3 * config.dim**2) == 0
    assert whole["operations"] == sum(row["operations"] for row in rows) > 0
    assert min(whole["seconds"], data["work"]["seconds"]) > 0
    assert set(data["work"]["peaks"]) == {"torch", "openvino"}
    assert data["commit"] and "blocks/ffn/project" in said.out


def test_openvino_tells_means_of_all_runs() -> None:
    """Of runs of 10, 20 and 60 us, 10, 15 and 30."""
    timer = Timer()
    for mean, taken in ((10, 10e-6), (15, 20e-6), (30, 60e-6)):
        info = SimpleNamespace(node_name="a", real_time=timedelta(microseconds=mean))
        assert timer.last(SimpleNamespace(profiling_info=[info])) == {"a": pytest.approx(taken)}


def test_rates_are_medians_of_turns() -> None:
    """A product's operations, by its time; its share is of the peak of the same turn."""
    products = [
        Product("blocks.0/ffn/value/MatMul/Dequantize", "FullyConnected", "i8", (1, 4, 8), 500),
        Product("blocks.1/ffn/value/MatMul/Dequantize", "FullyConnected", "i8", (1, 4, 8), 500),
        Product("patch/Add", "FullyConnected", "bf16", (1, 4, 8), 300),
    ]
    turns = [
        {"peaks": {"torch": 900.0, "openvino": peak}, "whole": 4.0, "seconds": dict.fromkeys(names, spent)}
        for names in [[product.name for product in products]]
        for spent, peak in ((1.0, 1000.0), (0.5, 4000.0), (2.0, 1000.0))
    ]
    found = bench_products.summed(products, turns)
    value, whole = found["rows"]
    assert value["name"] == "blocks/ffn/value" and value["products"] == 2 and value["operations"] == 2000
    assert value["rate"] == 1000 and value["share"] == 0.5 and found["operations_in_float"] == 600
    assert whole["name"] == "all" and found["peaks"] == {"torch": 900.0, "openvino": 1000.0}


def test_the_table_has_what_the_file_has() -> None:
    row = {"name": "blocks/ffn/value", "shape": [2, 4, 8], "products": 3, "operations": 5e9}
    row |= {"seconds": 0.01, "rate": 5e11, "share": 0.756}
    work = {"title": "a step", "seconds": 0.02, "peaks": {"torch": 6.6e11}, "rows": [row]}
    work["rows"] = [row, {**row, "name": "all", "shape": None}]
    facts = {"command": "python x.py", "commit": {"hash": "0123456789", "dirty": False}, "date": "2026-11-30"}
    data = {
        **facts,
        "machine": {"cpu": "a CPU", "cores": 2, "gpu": None},
        "side": 64,
        "by": "openvino int8",
        "work": work,
    }
    text = engine_tables.products(data).markdown()
    assert "| blocks/ffn/value | 2x4x8 | 3 | 5 G |" in text and "| 76% |" in text and "**all**" in text
    assert "these are 50% of 0.02 s" in text and "660 G by torch" in text
