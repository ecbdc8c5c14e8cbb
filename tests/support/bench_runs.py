"""What `sana-edge bench` found, made up: works, rows and runs as `sana_edge.bench.measure` fills them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sana_edge.bench.measure import spread

MACHINE: dict[str, Any] = {
    "cpu": "A Processor",
    "cores": 8,
    "memory_gb": 16.0,
    "os": "Linux 6.1 x86_64",
    "gpu": None,
    "gpu_driver": None,
    "gpu_power_limit_w": None,
    "instructions": ["avx2", "avx512_vnni"],
    "power": {"source": "battery", "charge": 63, "limit_w": 28.0, "profile": "balanced"},
}


def run(picture: float, peak: float = 4e9, **others: Any) -> dict[str, Any]:
    """A run whose picture takes so many seconds, in fixed shares."""
    shares = {"text": 0.1, "step": 0.03, "loop": 0.6, "decode": 0.25, "save": 0.02}
    seconds = {name: share * picture for name, share in shares.items()}
    seconds |= {"load": 2.0, "first": 2.0 + 1.2 * picture, "picture": picture}
    return {"seconds": seconds, "peak": int(peak), "device_peak": None, "joules": {}, **others}


def row(
    by: str,
    kind: str,
    pictures: Sequence[float] = (),
    *,
    dtype: str = "bf16",
    peak: float = 4e9,
    **others: Any,
) -> dict[str, Any]:
    """A contender with one run for each of ``pictures``, in seconds."""
    runs = [run(picture, peak) for picture in pictures]
    name = f"{by} {dtype if kind == 'float' else 'int8'}"
    facts: dict[str, Any] = {"name": name, "by": by, "kind": kind, "dtype": dtype, "runs": runs}
    facts |= {"psnr": None, "psnr_to": None, "failure": None, "instructions": None, "joules_missing": []}
    facts |= spread(runs) if runs else {"median": None, "device_peak": None, "peak": None, "joules": None}
    return {**facts, **others}


def work(*rows: dict[str, Any], **others: Any) -> dict[str, Any]:
    facts = {
        "model": "sana-0.6b-1024",
        "size": [1024, 1024],
        "steps": 20,
        "random_weights": False,
        "notes": [],
    }
    return {**facts, "rows": list(rows), **others}


def data(*works: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A whole session."""
    runs = sum(len(row["runs"]) for work in works for row in work["rows"])
    facts: dict[str, Any] = {
        "date": "2026-11-29T18:00:00+00:00",
        "command": "sana-edge bench sana-0.6b-1024",
        "commit": {"hash": None, "dirty": None},
        "machine": MACHINE,
        "versions": {"python": "3.12.0", "sana-edge": "0.1.0", "torch": None},
        "load_before": 0.1,
        "repeat": 2,
        "partial": False,
        "done": runs,
        "total": runs,
        "skipped": [],
        "notes": [],
        "works": list(works),
    }
    return {**facts, **others}
