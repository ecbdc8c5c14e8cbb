"""Tables of what runs take: by size and batch, while serving and quantizing, beside what was planned."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sana_edge.bench.table import Table, circumstances, gigabytes

Numbers = Mapping[str, Any]

ATTENTIONS = ("linear", "softmax")
PARTS = {
    "transformer": "denoiser",
    "vae": "decoder",
    "text_encoder": "text encoder, its embedding table on disk only",
}


def growth(data: Mapping[str, Any]) -> Table:
    """Seconds of a layer at each size, by its attention."""
    found = Table(["size", "tokens", "linear attention", "softmax attention", "ratio"])
    for row in data["rows"]:
        seconds = [f"{row[kind]:.3g} s" for kind in ATTENTIONS]
        found.add(
            f"{row['size']} px", f"{row['tokens']:,}", *seconds, f"{row['softmax'] / row['linear']:.2f}"
        )
    shown = ", ".join(f"{kind} {value:.2f}" for kind, value in data["exponents"].items())
    found.notes = [f"Exponents of growth: {shown}.", circumstances(data)]
    return found


def series(runs: Sequence[Numbers]) -> Table:
    """Seconds of a picture, or a step, by the size of its batch."""
    sizes = sorted({row["batch"] for data in runs for row in data["rows"]})
    titles = ["work", "one by one", *(f"batch of {size}" for size in sizes[1:]), "values apart by at most"]
    table = Table(titles)
    for data in runs:
        rows = {row["batch"]: row for row in data["rows"]}
        ratios = [f"{rows[size]['ratio']:.2f}" if size in rows else "" for size in sizes[1:]]
        apart = max(row["apart"] for row in data["rows"])
        table.add(data["title"], f"{rows[sizes[0]]['median']:.3g} s", *ratios, f"{apart:.2g}")
    table.notes = [circumstances(data) for data in runs]
    return table


def plans(data: Numbers) -> Table:
    """What `plan` said of each combination, and what happened."""
    titles = (
        "picture",
        "networks",
        "memory as planned",
        "found",
        "ratio",
        "seconds as planned",
        "found",
        "ratio",
    )
    table = Table(titles, named=2)
    for row in data["rows"]:
        memory, spent = row["memory"], row["time"]
        sizes = [f"{memory[key] / 1e9:.2f} GB" for key in ("said", "found")]
        seconds = [f"{spent[key]:.3g} s" for key in ("said", "found")]
        ratios = [f"{numbers['ratio']:.2f}" for numbers in (memory, spent)]
        table.add(row["name"], row["way"], *sizes, ratios[0], *seconds, ratios[1])
    counts = {
        key: sum(abs(row[key]["ratio"] - 1) <= bound for row in data["rows"])
        for key, bound in data["bounds"].items()
    }
    loads = [row["load"] for row in data["rows"] if row["load"] is not None]
    busy = f" Processes that ran beside it: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
    all_ = len(data["rows"])
    table.notes = [
        f"Memory within {100 * data['bounds']['memory']:.0f} % in {counts['memory']} of {all_}, time within"
        f" {100 * data['bounds']['time']:.0f} % in {counts['time']} of {all_}.{busy}",
        f"INT8 products: {data['int8_products']}.",
        circumstances(data),
    ]
    return table


def sidecar(data: Numbers) -> Table:
    """The first picture of the command and of the sidecar, from the start of their processes."""
    taken = data["seconds"]
    used = zip(taken["sidecar's processor"], taken["command's processor"], strict=True)
    rows = {
        "the command, process start to PNG": taken["command"],
        "the sidecar, the same": taken["sidecar"],
        "sidecar less command, of each turn": taken["difference"],
        "the same of processor time": [sidecar - command for sidecar, command in used],
        "processor time of the command": taken["command's processor"],
        "the sidecar's second picture": taken["second"],
    }
    found = Table((f"{data['model']}, {data['steps']} steps", "median", "from", "to"))
    for name, seconds in rows.items():
        found.add(
            name, *(f"{value:.2f} s" for value in (statistics.median(seconds), min(seconds), max(seconds)))
        )
    busy = f"{data['load_before']} processes were running before"
    found.notes = [f"{len(taken['command'])} turns; {busy}.", circumstances(data)]
    return found


def serving(data: Mapping[str, Any]) -> Table:
    """Pictures per minute of each contender."""
    drawn = data["pictures"]
    table = Table(["256x256", "pictures per minute", "least", "most", "to the loop"])
    for name, rates in drawn["rates"].items():
        numbers = (statistics.median(rates), min(rates), max(rates))
        table.add(name, *(f"{number:.1f}" for number in numbers), f"{drawn['ratios'][name]:.2f}")
    spent = data["overhead"]["milliseconds"]
    beyond, png = spent["beyond computed"], spent["png computed"]
    table.notes = [
        f"A request computes {beyond['median']:.1f} ms beyond its picture (nine of ten {beyond['low']:.1f} "
        f"to {beyond['high']:.1f} ms), the PNG of 256x256 itself {png['median']:.1f} ms. "
        f"Processes that were running besides, on average: {data['load_before']}.",
        f"{data['model']} in fp32, {drawn['steps']} steps. {circumstances(data)}",
    ]
    return table


def quantize(data: Numbers) -> Table:
    """What a model weighs before and after, and what quantizing it took."""
    table = Table(("weights", "fp32", "as stored", "INT8 package", "of fp32"))
    for name, before in data["bytes"]["float"].items():
        after = data["bytes"]["int8"][name]["stored"]
        sizes = (f"{size / 1e6:,.0f} MB" for size in (before["fp32"], before["stored"], after))
        table.add(PARTS[name], *sizes, f"{after / before['fp32']:.3f}")
    took, made = data["quantize"], data.get("generate")
    text = f"Quantizing took {took['seconds']:.0f} s and at most {gigabytes(took['peak_memory'], 1)}"
    if made:
        text += f"; loading the package and making a picture in one step {made['seconds']:.0f} s and "
        text += gigabytes(made["peak_memory"], 1)
    table.notes = [f"{text}.", circumstances(data)]
    return table
