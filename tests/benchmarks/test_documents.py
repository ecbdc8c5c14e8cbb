"""Numbers in the documents' prose: of a results file that its paragraph links, or no measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import report
from harness import ROOT

FILES = ("README.md", "benchmarks/README.md", "docs/benchmarks.md")
NUMBER = re.compile(r"(?<![\w.-])(\d[\d,]*(?:\.\d+)?) ?(times|seconds|ms|s|GB|MB|dB|%|points)(?![\w-])")
LINK = re.compile(r"\(([^()\s]*results/[\w.-]+\.json)\)")
# what a number of the files is multiplied with to be in its unit
SCALES = {"%": (100.0, 1.0), "points": (100.0,), "ms": (1000.0, 1.0), "GB": (1e-9, 1.0), "MB": (1e-6, 1.0)}
NO_MEASUREMENT = {
    ("README.md", "0.7 %"): "the file is linked where benchmarks/README.md has the number",
    ("docs/benchmarks.md", "24 GB"): "computed from the shapes of public weights",
    ("docs/benchmarks.md", "32 GB"): "computed from the shapes of public weights",
}


def paragraphs(text: str) -> Iterator[str]:
    """Prose without tables that `report.py` writes, and without code."""
    for pattern in (report.SECTION, re.compile(r"```.*?```", re.DOTALL), re.compile(r"`[^`\n]*`")):
        text = pattern.sub("", text)
    for block in re.split(r"\n\s*\n|\n(?=- )|\n(?=\|)", text):
        yield " ".join(block.split())


def numbers(value: Any) -> Iterator[float]:
    """All numbers in JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def unfounded(name: str, text: str, folder: Path) -> list[str]:
    """Numbers with units that stand in no results file that their paragraph links, and in no list."""
    wrong = []
    for paragraph in paragraphs(text):
        linked = [folder / link for link in LINK.findall(paragraph)]
        known = [n for path in linked for n in numbers(json.loads(path.read_text(encoding="utf-8")))]
        for number, unit in NUMBER.findall(paragraph):
            digits = len(number.partition(".")[2])
            asked = float(number.replace(",", ""))
            scales = SCALES.get(unit, (1.0,))
            there = any(round(n * scale, digits) == asked for n in known for scale in scales)
            if not there and (name, f"{number} {unit}") not in NO_MEASUREMENT:
                wrong.append(f"{number} {unit}: {paragraph[:100]}")
    return wrong


@pytest.mark.parametrize("name", FILES)
def test_numbers_have_files(name: str) -> None:
    path = ROOT / name
    assert unfounded(name, path.read_text(encoding="utf-8"), path.parent) == []


def test_a_number_without_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text('{"rows": [{"ratio": 2.4951, "share": 0.125, "peak": 3e9}]}')
    text = "It is 2.50 times as fast, with 12.5 % and 3.00 GB ([file](results/a.json)).\n\nIt takes 7 s.\n"
    text += "`5 s` is code\n\n<!-- speed -->\n9 s\n<!-- /speed -->\n- 2.51 times ([file](results/a.json))"
    found = unfounded("x.md", text, tmp_path)
    assert [line.partition(":")[0] for line in found] == ["7 s", "2.51 times"]


def test_the_list_has_no_old_entries() -> None:
    texts = {name: " ".join(paragraphs((ROOT / name).read_text(encoding="utf-8"))) for name in FILES}
    for name, number in NO_MEASUREMENT:
        assert number in texts[name]
