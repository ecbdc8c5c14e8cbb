"""The tables of what was looked into: solvers, tokens, savings, text in INT8, and other projects' INT8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.results import BASELINE, REFERENCES
from sana_edge.bench.table import Table, circumstances, decibels, gigabytes, seconds

Numbers = Mapping[str, Any]


def _near(psnr: float | None) -> str:
    """In dB; None is the PSNR of equal pictures."""
    return decibels(psnr) if psnr is None else f"{decibels(psnr)} dB"


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
        near = [_near(value) for value in (dpm["psnr"], euler["psnr"], euler["own"])]
        table.add(steps, *near, *(f"{row['right']} of {data['prompts']}" for row in (dpm, euler)))
    apart, best = rows["flow-euler", solution], rows["flow-dpm", solution]
    text = f"The two solvers in {solution} steps: PSNR of their pictures {_near(apart['psnr'])}, "
    text += f"{best['right']} and {apart['right']} of {data['prompts']} prompts right."
    table.notes = [text, circumstances(data)]
    return table


def peers(data: Numbers) -> Table:
    """One row for each contender, those that did not draw with their reason."""
    drawn = {row["name"]: row["median"] for row in data["rows"] if row["median"] is not None}
    first = next((name for name in REFERENCES if name in drawn), BASELINE)
    base = drawn.get(first)
    titles = ("", "step", "decode", "picture", f"to {first}", "peak memory", "PSNR to diffusers")
    table = Table(titles)
    reasons = []
    for row in data["rows"]:
        median = row["median"]
        if row["failure"] is not None:
            # of a traceback its last words
            reason = row["failure"].rpartition("Error: ")[2].rstrip(".")
            reasons.append(f"{row['name']}: {reason}.")
        if median is None:
            table.add(row["name"], "not measured" if row["failure"] is None else "does not run here")
            continue
        times = [seconds(median[column]) for column in ("step", "decode", "picture")]
        ratio = f"{median['picture'] / base['picture']:.2f}" if base else ""
        near = _near(row["psnr"]) if row["reference"] else ""
        table.add(row["name"], *times, ratio, gigabytes(row["peak"]), near)
    layers = f", cut to {data['layers']} layers" if data["layers"] else ""
    size = f"{data['size']}x{data['size']} pixels in {data['steps']} steps"
    busy = f"{data['load_before']} processes were running before"
    known = {name: found for row in data["rows"] for name, found in (row["versions"] or {}).items()}
    told = ", ".join(f"{name} {found}" for name, found in known.items())
    text = f"{data['model']}{layers}, {size}, threads: {data['threads']}; {busy}. {told}."
    table.notes = [text, *reasons, circumstances(data)]
    return table


def tokens(data: Numbers) -> Table:
    """One row for each latent and attention, at equal pixels."""
    titles = ("latent", "attention", "tokens", "multiply-adds of a prediction", "one layer", "to the first")
    table = Table(titles, named=2)
    first, *_ = data["tokens"]
    for row in data["tokens"]:
        ratio = f"{row['seconds'] / first['seconds']:.2f}"
        work = f"{row['macs'] / 1e12:.3f} T"
        table.add(row["latent"], row["attention"], f"{row['tokens']:,}", work, seconds(row["seconds"]), ratio)
    shapes = f"{data['shapes']} shapes at {data['size']}x{data['size']}, fp32, random weights"
    text = f"{shapes}; {data['load_before']} processes were running before."
    table.notes = [text, circumstances(data)]
    return table


def savings(data: Numbers) -> Table:
    """What takes how long with each saving switched off."""
    table = Table(("", "seconds", "to the first", "output off by"))
    for work in data["savings"]:
        for number, row in enumerate(work["rows"]):
            name = f"{work['title']}: as it is" if number == 0 else f"- {row['name']}"
            apart = "" if number == 0 else f"{row['difference']:.1e}"
            table.add(name, seconds(row["seconds"]), f"{row['ratio']:.2f}", apart)
    text = "fp32; weights are random but for sana-tiny's. Ratios are medians over turns; every row computes "
    text += f"the same but for rounding. {data['load_before']} processes were running before."
    table.notes = [text, circumstances(data)]
    return table


def launches(data: Numbers) -> Table:
    """One row for each network and way to quantize it, at the largest size; before and now."""
    earlier = {_decoder(row): row for row in data.get("before", {}).get("rows", [])}
    table = Table(("network", "scales", "launches before", "launches", "of the library", "of torch"), named=2)
    for row in data["rows"]:
        if row["size"] != max(each["size"] for each in data["rows"]):
            continue
        ours = sum(count for name, count in row["by_name"].items() if name.startswith("sana_edge"))
        before = earlier.get(_decoder(row))
        scales = "calibrated" if row["calibrated"] else "found for each picture"
        was = before["launches"] if before else ""
        table.add(row["decoder"], scales, was, row["launches"], ours, row["launches"] - ours)
    text = f"Of a picture at {row['size']}x{row['size']}, INT8, counted on torch's meta device."
    table.notes = [text, *_fused_errors(data), circumstances(data)]
    return table


def _fused_errors(data: Numbers) -> list[str]:
    """How far fused decoders are from float ones, before and now."""
    was = {
        (r["decoder"], r["calibrated"]): r["psnr"]["fused"] for r in data.get("before", {}).get("errors", [])
    }
    found = []
    for row in data.get("errors", []):
        before = was.get((row["decoder"], row["calibrated"]))
        how = "" if row["calibrated"] else ", not calibrated"
        near = f"{row['psnr']['fused']:.2f} dB"
        text = f"{row['decoder']}{how}: PSNR of fused INT8 to float {near}"
        found.append(text + (f", before {before:.2f} dB." if before else "."))
    return found


def _decoder(row: Numbers) -> tuple[Any, ...]:
    return row["decoder"], row["size"], row["calibrated"]


def text_features(data: Numbers) -> Table:
    """How far the features of each way to multiply are off, and the pictures from them."""
    table = Table(
        ("text encoder", "computed in", "features off by", "the worst prompt", "pictures, PSNR"), named=2
    )
    near = {row["way"]: [value for value in row["psnr"] if value is not None] for row in data["pictures"]}
    for row in data["features"]:
        values = near[row["way"]] if row["encoder"] == "sana-tiny" else []
        seen = f"{min(values):.1f} to {max(values):.1f} dB" if values else ""
        table.add(row["encoder"], row["way"], f"{row['error']:.2%}", f"{row['worst']:.2%}", seen)
    drawn = f"{data['prompts']} prompts, pictures in {data['steps']} steps"
    table.notes = [f"To the float model in fp32; {drawn}, all else fp32.", circumstances(data)]
    return table
