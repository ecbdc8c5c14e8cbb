"""Mutated inputs and kills: what the tests that fuzz every parser and kill every command count.

    python benchmarks/hardening.py fuzz --count 100000
    python benchmarks/hardening.py crash --count 50

runs `tests/test_fuzz.py` with so many inputs, or `tests/test_crash.py` with so many kills of each command,
and writes the figures of each parser or command, and their sums, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS
from harness.results import ended, positive
from sana_edge.bench.results import header, write_json
from sana_edge.errors import SanaError

ROOT = Path(__file__).parents[1]
# the tests of each kind, and the variable that counts
KINDS = {
    "fuzz": ("tests/test_fuzz.py", "test_many", "SANA_EDGE_FUZZ"),
    "crash": ("tests/test_crash.py", "", "SANA_EDGE_KILLS"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tests: 0, 1 where one fails, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    return ended(lambda: _run(_options(given), given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    rows, code = measure(options.kind, options.count, options.only)
    sums = {key: sum(row[key] for row in rows) for key, value in rows[0].items() if type(value) is int}
    # a largest one has no sum
    if "most_mb" in sums:
        sums["most_mb"] = max(row["most_mb"] for row in rows)
    output = options.output or RESULTS / f"{options.kind}.json"
    write_json(output, {**header("benchmarks/hardening.py", given), "sum": sums, "rows": rows})
    print(json.dumps(sums))
    if code:
        raise SanaError(f"a test of {options.kind} failed", "its output is above")


def measure(kind: str, count: int, only: str) -> tuple[list[dict[str, Any]], int]:
    """The figures that the tests record, and pytest's exit code.

    Raises:
        SanaError: there are none.
    """
    file, test, variable = KINDS[kind]
    chosen = " and ".join(filter(None, (test, only)))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "figures.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", file]
        command += ["-k", chosen] if chosen else []
        told = {**os.environ, variable: str(count), "SANA_EDGE_FIGURES": str(report)}
        code = subprocess.run(command, cwd=ROOT, env=told).returncode
        rows = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    if not rows:
        raise SanaError("no test was run", "look at what pytest says")
    return rows, code


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hardening.py", description="Count mutated inputs, or kills.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=positive, required=True, metavar="N", help="inputs of all, or kills")
    parser.add_argument("--only", default="", metavar="TEXT", help="parsers or commands with this in a name")
    parser.add_argument("--output", type=Path, metavar="FILE", help="(default: results/KIND.json)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
