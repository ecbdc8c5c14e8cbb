"""The one figure of a step that matters, from what it wrote or from its log."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def own(figures: Mapping[str, Any], log: str) -> str:
    """Of scripts that say it themselves."""
    return str(figures.get("figure", "")) or _last(log)


def doctor(figures: Mapping[str, Any], log: str) -> str:
    """Whether the CUDA kernels can run."""
    found = [line.strip() for line in log.splitlines() if "cuda kernels:" in line]
    return found[0][:100] if found else _last(log)


def tests(figures: Mapping[str, Any], log: str) -> str:
    """ "407 passed, 40 skipped", of several runs of pytest one after the other."""
    found = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", log, re.MULTILINE)
    return "; ".join(text.strip() for text in found) or _last(log)


def kernels(figures: Mapping[str, Any], log: str) -> str:
    """What all kernels of a step take together."""
    rows = figures.get("kernels", [])
    if not rows:
        return _last(log)
    total = sum(row["seconds"] * row["calls_per_step"] for row in rows)
    peak = figures["peaks"]["int8_tops"]
    best = max((row["share_of_int8_peak"] or 0 for row in rows), default=0)
    return f"{len(rows)} kernels, {total * 1e3:.3g} ms a step, best {best:.0%} of {peak:.0f} INT8 TOPS"


def loop(figures: Mapping[str, Any], log: str) -> str:
    return _rows(figures, "loop") or _last(log)


def picture(figures: Mapping[str, Any], log: str) -> str:
    return _rows(figures, "picture") or _last(log)


def _rows(figures: Mapping[str, Any], stage: str) -> str:
    """The medians of a stage."""
    rows = [row for work in figures.get("works", []) for row in work["rows"] if row["stage"] == stage]
    return ", ".join(f"{row['name']} {row['median']:.3g} s" for row in rows)


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "E  "))]
    return (errors or lines or [""])[-1][:160]
