"""README's tables of engines, and that README's tables are those of the results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers", reason="benchmarks compare with diffusers")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import engine_report  # noqa: E402
import report  # noqa: E402

RUN: dict[str, Any] = {
    "command": "python benchmarks/x.py",
    "machine": {"gpu": None, "cores": 2, "cpu": "a CPU"},
    "commit": {"hash": "0123456789abcdef"},
    "date": "2026-11-21T12:00:00",
}
WHERE = "`python benchmarks/x.py` at commit 0123456789, 2 cores of a CPU, 2026-11-21."


def test_speed() -> None:
    rows = [
        {"name": "diffusers", "median": 61.2, "memory": {"most": 5_100_000_000, "before": 1}},
        {"name": "openvino int8 bf16", "median": 12.3, "memory": None},
    ]
    ratios = {"diffusers": {"openvino int8 bf16": {"median": 0.2, "least": 0.1, "most": 0.3}}}
    step = {"title": "a step", "rows": rows[1:], "ratios": {"diffusers": {}}}
    works = [step, {"title": "a decoder", "rows": rows, "ratios": ratios}]
    text = engine_report.speed_table([{**RUN, "works": works}]).splitlines()
    assert text[0] == "|  | a step | peak memory | a decoder | peak memory |"
    assert text[2:4] == [
        "| openvino int8 bf16 | 12.3 s |  | 12.3 s |  |",
        "| diffusers |  |  | 61.2 s | 5.10 GB |",
    ]
    assert text[5].strip() == "a decoder: openvino int8 bf16 has the speed 5.00 of diffusers."
    assert text[6].strip() == WHERE


def test_pictures_and_cold_starts(tmp_path: Path) -> None:
    names = ("load", "first", "second", "second text", "second denoise", "second decode")
    median = {name: float(i) for i, name in enumerate(names)}
    drawn = {"name": "diffusers", "median": median, "failure": None, "runs": [{"peak": 5e9}, {"peak": 6e9}]}
    drawn |= {"reference": None, "psnr": None}
    killed = {"name": "onnxruntime int8", "median": None, "failure": "was killed", "runs": []}
    killed |= {"reference": None, "psnr": None}
    picture = {"shapes": "0.6b", "size": 1024, "steps": 2, "rows": [drawn, killed]}
    cold = {
        "model": "sana-tiny",
        "rows": [{"name": "onnxruntime int8", "median": 1.234, "peak": 2e8, "psnr": 41.26}],
    }
    for name, found in (("picture-0.6b", {"picture": picture}), ("cold", {"cold": cold})):
        path = tmp_path / f"bench_engines-{name}.json"
        path.write_text(json.dumps({**RUN, **found}), encoding="utf-8")
    text = engine_report.engine_tables(tmp_path)
    assert "| diffusers | 0 s | 1 s | 2 s | 3 s | 4 s | 5 s | 6.0 GB |  |" in text
    assert "| onnxruntime int8 | was killed |  |  |  |  |  |  |  |" in text
    assert "| onnxruntime int8 | 1.23 s | 200 MB | 41.3 dB |" in text
    assert text.count(WHERE) == 2


def test_readme_has_the_tables_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = {
        "quality": report.quality_table(report.RESULTS / "quality.json"),
        "speed": report.speed_tables(),
        "engines": engine_report.engine_tables(report.RESULTS),
        "quantize": report.quantize_table(report.RESULTS / "bench_quantize.json"),
    }
    for name, content in sections.items():
        inside = text.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]
        assert inside == content, f"run benchmarks/report.py: {name}"
