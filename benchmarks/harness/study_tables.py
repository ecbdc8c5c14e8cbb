"""The tables of what was looked into: solvers, latents and tokens, savings, and other projects' INT8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sana_edge.bench.table import Table, circumstances, decibels

Numbers = Mapping[str, Any]


def solver(data: Numbers) -> Table:
    """One row for each number of steps: both solvers' nearness to the solution, and their scores."""
    solution = data["solution"]
    table = Table(
        (
            "steps",
            f"flow-dpm, PSNR to its {solution} steps",
            "flow-euler, the same",
            f"flow-euler, PSNR to its own {solution}",
            "flow-dpm, prompts right",
            "flow-euler",
        )
    )
    rows = {(row["solver"], row["steps"]): row for row in data["rows"]}
    for steps in data["steps"]:
        dpm, euler = (rows[kind, steps] for kind in ("flow-dpm", "flow-euler"))
        near = [f"{decibels(value)} dB" for value in (dpm["psnr"], euler["psnr"], euler["own"])]
        table.add(steps, *near, *(f"{row['right']} of {data['prompts']}" for row in (dpm, euler)))
    apart, best = rows["flow-euler", solution], rows["flow-dpm", solution]
    text = f"The two solvers in {solution} steps: {decibels(apart['psnr'])} dB apart, "
    text += f"{best['right']} and {apart['right']} of {data['prompts']} prompts right."
    table.notes = [text, circumstances(data)]
    return table
