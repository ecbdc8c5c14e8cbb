"""The tables of results files, and that Markdown files have those of the project's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import report
from harness import RESULTS, ROOT, engine_tables, sections
from sana_edge.bench.table import Table

RUN: dict[str, Any] = {
    "command": "python benchmarks/x.py",
    "machine": {"gpu": None, "cores": 2, "cpu": "a CPU"},
    "commit": {"hash": "0123456789abcdef"},
    "date": "2026-11-21T12:00:00",
}
WHERE = "`python benchmarks/x.py` at commit 0123456789, 2 cores of a CPU, 2026-11-21."


def test_speed() -> None:
    base = {"name": "diffusers", "median": 61.2, "seconds": [60.0, 61.2, 66.0]}
    ours = {"name": "openvino int8 bf16", "median": 12.3, "seconds": [12.0, 12.3, 11.0], "memory": None}
    rows = [{**base, "memory": {"most": 5_100_000_000, "before": 1}}, ours]
    works = [{"title": "a step", "rows": [ours]}, {"title": "a decoder", "rows": rows}]
    text = engine_tables.engines_speed([{**RUN, "works": works}]).markdown().splitlines()
    assert text[0] == "|  | a step | peak memory | a decoder | peak memory |"
    assert text[2:4] == [
        "| openvino int8 bf16 | 12.3 s |  | 12.3 s |  |",
        "| diffusers |  |  | 61.2 s | 5.10 GB |",
    ]
    assert text[5].strip() == "a decoder: openvino int8 bf16 is 5.00 times as fast as diffusers."
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
    text = "\n".join(dict(sections.sections(tmp_path))[name] for name in ("pictures", "cold"))
    assert "| diffusers | 0 s | 1 s | 2 s | 3 s | 4 s | 5 s | 6.0 GB |  |" in text
    assert "| onnxruntime int8 | was killed |  |  |  |  |  |  |  |" in text
    assert "| onnxruntime int8 | 1.23 s | 200 MB | 41.3 dB |" in text
    assert text.count(WHERE) == 2


def test_verification(tmp_path: Path) -> None:
    def graphs(error: float) -> dict[str, Any]:
        names = ("text_projection", "denoiser", "denoiser_folded", "decoder")
        parts = {f"decoder_{name}": share * error for name, share in (("head", 1), ("tail_0", 3))}
        errors = {**dict.fromkeys(names, error), **parts}
        return {name: {"error": found, "max": 1.0, "limit": 0.1} for name, found in errors.items()}

    done = {"failure": None, "bytes": {"a.onnx": 1e6, "a.data": 2e6}, "seconds": {"denoiser": 1.2, "b": 3}}
    text = {"text_encoder": {"error": 2e-4, "max": 1.0, "limit": 5.1e-3}}
    verified = {"graphs": {**text, **graphs(1e-2)}, "picture": {"psnr": 41.26, "limit": 35.0}}
    exports = [
        {"name": "bf16", **done, "note": "compared in fp32", "verification": verified},
        {"name": "int8", **done, "verification": {**verified, "unrounded": graphs(1e-6)}},
        {"name": "fp16", "failure": "no room"},
    ]
    (tmp_path / "verify_export.json").write_text(json.dumps({**RUN, "exports": exports}), encoding="utf-8")
    lines = dict(sections.sections(tmp_path))["verification"].splitlines()
    errors = ["2.0e-04 (5.1e-03)", *["1.0e-02 (1.0e-01)"] * 4, "3.0e-02 (1.0e-01)"]
    row = [*errors, "41.3 dB (35)", "3 MB"]
    assert lines[0].count("|") == lines[1].count("|") == len(row) + 2
    assert lines[2:4] == [f"| {' | '.join([name, *row])} |" for name in ("bf16", "int8")]
    unrounded = ["", *["1.0e-06 (1.0e-01)"] * 4, "3.0e-06 (1.0e-01)", *[""] * 2]
    assert lines[4] == f"| {' | '.join(['int8, activations not rounded', *unrounded])} |"
    assert lines[5] == f"| {' | '.join(['fp16', 'no room', *[''] * 7])} |"
    assert lines[-2:] == ["bf16: compared in fp32.  ", f"{WHERE}  "]


@pytest.mark.parametrize("name", report.FILES)
def test_files_have_the_tables_of_the_results(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    assert "<!-- /" in text
    assert report.rewritten(path, dict(sections.sections(RESULTS))) == text, "run benchmarks/report.py"


def test_every_table_of_the_results_stands_somewhere() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in report.FILES)
    assert all(f"<!-- {name} -->" in text for name, _ in sections.sections(RESULTS))


def test_a_section_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file stays as it is."""
    path = tmp_path / "a.md"
    path.write_text("<!-- nothing -->\nold\n<!-- /nothing -->\n")
    assert report.main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "a.md: no results for the section nothing" in said and "hint:" in said
    assert "old" in path.read_text()


def test_a_table_is_aligned_and_markdown() -> None:
    table = Table(("by", "a long s"), [("torch", 1.5)], ["a note."])
    table.add("it")
    assert table.text() == "          a\n       long\nby        s\ntorch   1.5\nit\na note."
    assert table.markdown() == "| by | a long s |\n| --- | --- |\n| torch | 1.5 |\n| it |  |\n\na note.  "
