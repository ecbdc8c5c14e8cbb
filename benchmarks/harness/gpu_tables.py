"""The tables of GPUs: predicted times of pictures and kernels, tiles, and measurements beside predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sana_edge.bench.table import Table, circumstances

Numbers = Mapping[str, Any]

# columns of a kernel, in microseconds
LIMITS = ("tensor cores", "L2", "DRAM", "issue slots", "launch")
# the GPU whose kernels are shown one by one
SHOWN = "RTX 4090 Laptop"
# the costliest kernels of each stage that are shown
ROWS = 12


def predicted_pictures(data: Numbers) -> Table:
    """One row for each GPU and model: seconds of each stage."""
    stages = [key for key in data["pictures"][0]["seconds"] if key not in ("picture", "again")]
    table = Table(("predicted", "model", *stages, "picture", "of a prompt read before"), named=2)
    for row in data["pictures"]:
        found = row["seconds"]
        parts = (f"{found[stage] * 1e3:.1f} ms" for stage in stages)
        table.add(
            row["gpu"],
            row["shapes"].upper(),
            *parts,
            *(f"{found[key]:.3f} s" for key in ("picture", "again")),
        )
    first = data["pictures"][0]
    counts = [
        f"{shapes.upper()}: " + ", ".join(f"{name} {one['kernels']}" for name, one in found.items())
        for shapes, found in data["stages"].items()
    ]
    table.notes = [
        f"{first['side']} px, {first['steps']} steps with guidance. Nothing was measured.",
        f"Launches, of one step: {'; '.join(counts)}.",
        circumstances(data),
    ]
    return table


def predicted_kernels(data: Numbers) -> Table:
    """The costliest kernels of each stage on one GPU, the time of each limit alone and of all."""
    table = Table(("stage", "kernel", "size", "times", *LIMITS, "predicted us", "bound by"), named=3)
    for stage in dict.fromkeys(row["stage"] for row in data["kernels"]):
        rows = [r for r in data["kernels"] if (r["stage"], r["gpu"], r["shapes"]) == (stage, SHOWN, "0.6b")]
        for row in rows[:ROWS]:
            tile = f", {row['tile']} tiles" if row["tile"] else ""
            cells = (f"{row[name]:.1f}" for name in LIMITS)
            table.add(
                *(stage, row["kernel"], f"{row['size']}{tile}", row["count"], *cells),
                *(f"{row['us']:.1f}", row["bound"]),
            )
    table.notes = [f"0.6B on {SHOWN}, microseconds of one launch.", circumstances(data)]
    return table


def tile_choices(data: Numbers) -> Table:
    """For each product and size the tile of each GPU with its predicted time, and which it was before."""
    gpus = [gpu["name"] for gpu in data["gpus"]]
    table = Table(("model", "px", "product", "rows x columns x depth", *gpus), named=4)
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in data["choices"]:
        key = (row["shapes"].upper(), row["side"], row["product"], row["size"])
        us = row["us"]
        changed = (
            "" if row["before"] == row["tile"] else f" (before: {row['before']} {us[row['before']]:.0f})"
        )
        rows.setdefault(key, {})[row["gpu"]] = f"{row['tile']} {us[row['tile']]:.0f}{changed}"
    for key, cells in rows.items():
        table.add(*key, *(cells[gpu] for gpu in gpus))
    changes = sum(row["before"] != row["tile"] for row in data["choices"])
    table.notes = [
        "Predicted microseconds. Before: chosen by rounds, products and bytes alone, where that is another; "
        f"{changes} of {len(data['choices'])} are.",
        circumstances(data),
    ]
    return table


def compared(data: Numbers) -> Table:
    """Kernels that were measured on a GPU of the table, beside what was predicted."""
    table = Table(("GPU", "kernel", "size", "measured us", "predicted us", "ratio"), named=3)
    predicted = {(row["gpu"], row["kernel"], row["size"]): row["us"] for row in data["kernels"]}
    for row in data["measured"]:
        gpu = next((g["name"] for g in data["gpus"] if g["name"] in (row["gpu"] or "")), None)
        us = predicted.get((gpu, row["kernel"].partition(" ")[0], row["size"]))
        if us is not None:
            taken = row["seconds"] * 1e6
            table.add(gpu, row["kernel"], row["size"], f"{taken:.1f}", f"{us:.1f}", f"{us / taken:.2f}")
    table.notes = [circumstances(data)]
    return table


def assumptions(data: Numbers) -> Table:
    """What the predictions take for granted."""
    table = Table(("assumed", "what"), named=2)
    for name, text in data["assumptions"].items():
        table.add(name, text)
    clocks = (f"{gpu['name']} {gpu['clock']:.2f} GHz at {gpu['power']} W" for gpu in data["gpus"])
    table.add("clocks", "; ".join(clocks))
    return table


# of the section roofline, in order
ROOFLINE = (predicted_pictures, predicted_kernels, assumptions, compared)
