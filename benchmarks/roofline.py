"""What laptops would take, projected from what the kernels reached on a GPU that was at hand.

    python benchmarks/roofline.py benchmarks/results/nvidia-h200-2026-11-21.json

Each kernel of a step takes the longer of two times, its INT8 operations at the laptop's peak and its bytes at
the laptop's bandwidth, divided by the share of its bound that it reached where it was measured. A projection:
nothing was measured on these laptops.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import ended


@dataclass(frozen=True)
class Laptop:
    """Dense INT8 operations per second at a sustained clock, and bytes per second."""

    name: str
    operations: float
    bandwidth: float


LAPTOPS = (
    Laptop("RTX 4060 Laptop, 110 W", 113e12, 256e9),
    Laptop("RTX 4090 Laptop, 80 W", 226e12, 576e9),
    Laptop("RTX 4090 Laptop, 150 W", 317e12, 576e9),
    Laptop("RTX 5090 Laptop, 140 W", 337e12, 896e9),
)
# below this a kernel is bound by starting it, and says nothing of larger GPUs' shares
SHORTEST = 5e-6


def measured(path: Path) -> Any:
    """What bench_kernels.py wrote: the file, or the last step "kernels" in a file of gpu_check.py."""
    data = json.loads(path.read_text(encoding="utf-8"))
    steps = [step for call in data.get("calls", []) for step in call["steps"] if step["name"] == "kernels"]
    found = [step["figures"] for step in steps if step["figures"]]
    if "calls" in data and not found:
        raise SystemExit(f"error: {path.name} has no step named kernels that measured anything")
    return found[-1] if found else data


def projected(laptop: Laptop, data: Mapping[str, Any], side: int) -> float:
    """Seconds of a step for one picture of ``side`` pixels."""
    peak, bandwidth = data["peaks"]["int8_tops"] * 1e12, data["peaks"]["copy_gb_per_s"] * 1e9
    rows = [row for row in data["kernels"] if row["side"] == side and row["pictures"] == 1]
    if not rows:
        raise SystemExit(f"error: the file has no kernels at {side} px")
    total = 0.0
    for row in rows:
        # what it moved and computed, back from its shares
        operations = (row["share_of_int8_peak"] or 0) * peak * row["seconds"]
        moved = row["share_of_bandwidth"] * bandwidth * row["seconds"]
        computing, moving = operations / laptop.operations, moved / laptop.bandwidth
        # the kernel's efficiency is that of what bound it where it was measured
        bound = max(operations / peak, moved / bandwidth)
        total += row["calls_per_step"] * max(computing, moving, SHORTEST) * row["seconds"] / bound
    return total


def table(data: Mapping[str, Any], side: int, steps: int) -> str:
    """A Markdown table of all laptops."""
    lines = [f"| GPU | step | loop of {steps} steps |", "| --- | --- | --- |"]
    for laptop in LAPTOPS:
        step = projected(laptop, data, side)
        lines.append(f"| {laptop.name} (projection) | {step * 1e3:.1f} ms | {step * steps:.2f} s |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table: 0, 1 for an error, 2 for usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="what gpu_check.py or bench_kernels.py wrote")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)
    return ended(lambda: print(table(measured(options.file), options.size, options.steps)))


if __name__ == "__main__":
    sys.exit(main())
