"""What a run found, in words: one sentence for each work, the system's line, and the tables for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sana_edge.bench.table import Table, gigabytes
from sana_edge.system.instructions import INT8_PRODUCTS

Facts = Mapping[str, Any]

# ratios nearer to 1 than this are as fast as
_EQUAL = 0.03
# memory that differs by less is as much
_AS_MUCH = 0.015
# bytes at most of float weights and libraries whose products are too small to gain from INT8
_SMALL_PEAK = 1.5e9
TITLES = {
    "load": "load",
    "first": "first picture",
    "picture": "picture",
    "text": "text",
    "step": "step",
    "loop": "loop",
    "decode": "decode",
    "save": "save",
}


def seconds(value: float | None) -> str:
    """Two digits, whole seconds from 10 on: "0.31 s", "4.2 s", "41 s"."""
    if value is None:
        return ""
    if value >= 0.995:
        return f"{value:.0f} s" if value >= 9.95 else f"{value:.1f} s"
    return f"{value:.2f} s" if value >= 0.0995 else f"{value:.2g} s"


def drawn(work: Facts, kind: str | None = None, ours: bool = True) -> list[Facts]:
    """Rows that have drawn, the fastest first, of a kind, without diffusers where they are ``ours``."""
    rows = [row for row in work["rows"] if row["median"] and kind in (None, row["kind"])]
    rows = [row for row in rows if not ours or row["by"] != "diffusers"]
    return sorted(rows, key=lambda row: float(row["median"]["picture"]))


def ratios(row: Facts, other: Facts) -> list[float]:
    """How many times as fast as another's pictures, of each turn that both have: what slows the machine
    meets both."""
    pairs = zip(other["runs"], row["runs"], strict=False)
    return [theirs["seconds"]["picture"] / ours["seconds"]["picture"] for theirs, ours in pairs]


def sentence(work: Facts, machine: Facts) -> str:
    """What INT8 is worth here, also where that is nothing, and why."""
    size, steps = "x".join(map(str, work["size"])), work["steps"]
    what = f"{size} picture in {steps} step{'s' * (steps != 1)}"
    weights = " (random weights)" if work["random_weights"] else ""
    small, large = drawn(work, "int8"), drawn(work, "float")
    if not small and not large:
        return f"No {what} was drawn{weights}: {_failures(work) or 'nothing ran'}."
    if not small:
        best = large[0]
        took = f"{best['dtype']} on {best['by']} draws a {what} in {seconds(best['median']['picture'])} here"
        return f"{took}{weights}; INT8 did not draw: {_failures(work, 'int8') or _absent(work, 'int8')}."
    best = small[0]
    took = f"INT8 on {best['by']} draws a {what} in {seconds(best['median']['picture'])} here{weights}"
    if not large:
        return f"{took}; float did not draw: {_failures(work, 'float') or _absent(work, 'float')}."
    return f"{_compared(took, best, large[0], machine)}{_beside(work, best)}."


def _compared(took: str, best: Facts, other: Facts, machine: Facts) -> str:
    found = ratios(best, other)
    times = statistics.median(found)
    dtype = other["dtype"] if best["by"] == other["by"] else f"{other['dtype']} on {other['by']}"
    memory = _memory(best, other)
    even = min(found) < 1 < max(found) or abs(times - 1) < _EQUAL
    if even:
        return f"{took}, about as fast as {dtype}{memory}"
    if times > 1:
        return f"{took}, {_times(times)} times as fast as {dtype}{memory}"
    slower = f"slower than {dtype} ({seconds(other['median']['picture'])})"
    return f"{took}, {slower}, as {_why(best, other, machine)}{memory}"


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 20 else f"{value:.0f}"


def _memory(best: Facts, other: Facts) -> str:
    """Of a GPU where both used one."""
    key = "device_peak" if best["device_peak"] and other["device_peak"] else "peak"
    if not best[key] or not other[key]:
        return ""
    share = 1 - best[key] / other[key]
    of = " of the GPU" if key == "device_peak" else ""
    if abs(share) < _AS_MUCH:
        return f", with as much memory{of}"
    return f", with {abs(share):.0%} {'less' if share > 0 else 'more'} memory{of}".replace("%", " %")


def _why(best: Facts, other: Facts, machine: Facts) -> str:
    """Why INT8 is slower, as far as that is known."""
    known = best.get("instructions") or machine.get("instructions")
    if not best["device_peak"] and known is not None and not set(known) & set(INT8_PRODUCTS):
        return "this CPU has no instructions for INT8 products (VNNI or AMX on x86, dot products on ARM)"
    if (other["peak"] or _SMALL_PEAK) < _SMALL_PEAK:
        return "in so small a model rounding activations takes longer than its products save"
    stages = [name for name in ("text", "loop", "decode") if best["median"][name] > other["median"][name]]
    return f"it lost in {' and '.join(stages)}" if stages else "it lost between the stages"


def _beside(work: Facts, best: Facts) -> str:
    theirs = [row for row in drawn(work, ours=False) if row["by"] == "diffusers"]
    if not theirs:
        return ""
    times = statistics.median(ratios(best, theirs[0]))
    return f"; {_times(times)} times as fast as diffusers in {theirs[0]['dtype']}"


def _absent(work: Facts, kind: str) -> str:
    """Why nothing of a kind was drawn where nothing failed."""
    reached = any(row["kind"] == kind and row["by"] != "diffusers" for row in work["rows"])
    return "it was not reached" if reached else f"there is no {'INT8' if kind == 'int8' else kind} model"


def _failures(work: Facts, kind: str | None = None) -> str:
    rows = [row for row in work["rows"] if row["failure"] and kind in (None, row["kind"])]
    return "; ".join(f"{row['name']}: {row['failure']}" for row in rows)


def system(data: Facts) -> dict[str, str]:
    """Processor, instructions, memory, GPU, power, system and versions of what ran."""
    machine, power = data["machine"], data["machine"]["power"]
    found = machine["instructions"]
    processor = f"{machine['cores']} cores of {machine['cpu']}"
    shown = {"processor": f"{processor}, {machine['memory_gb']} GB" if machine["memory_gb"] else processor}
    shown["instructions"] = "not told" if found is None else ", ".join(found) or "none for INT8"
    if machine["gpu"]:
        driver = f", driver {machine['gpu_driver']}" if machine["gpu_driver"] else ""
        limit = f", limit {machine['gpu_power_limit_w']} W" if machine["gpu_power_limit_w"] else ""
        shown["GPU"] = f"{machine['gpu']}{driver}{limit}"
    charge = f" at {power['charge']} %" if power["source"] and power["charge"] is not None else ""
    words = [f"{power['source'] or 'source not told'}{charge}"]
    words.append(f"CPU limit {power['limit_w']:.0f} W" if power["limit_w"] else "limit not told")
    words += [f"profile {power['profile']}"] if power["profile"] else []
    versions = (f"{name} {version}" for name, version in data["versions"].items() if version)
    return {**shown, "power": ", ".join(words), "system": machine["os"], "versions": ", ".join(versions)}


def notes(data: Facts) -> list[str]:
    """What a reader must know of a run, and what was not measured."""
    lines = []
    if data["partial"]:
        lines.append(f"Partial: interrupted after {data['done']} of {data['total']} runs.")
    if any(work["random_weights"] for work in data["works"]):
        lines.append("Random weights: times and memory are those of the real ones, pictures are noise.")
    lines += [f"{skip['backend']} is skipped: {skip['reason']}." for skip in data["skipped"]]
    lines += list(data["notes"])
    rows = [row for work in data["works"] for row in work["rows"]]
    lines += [f"{row['name']} failed: {row['failure']}." for row in rows if row["failure"]]
    # not which words of the prompt a small model does not know
    said = (note for row in rows for note in row.get("notes", ()) if "does not know" not in note)
    lines += [f"{note}." for note in dict.fromkeys(said)]
    missing = dict.fromkeys(text for row in rows for text in row.get("joules_missing") or ())
    lines += [f"No energy of the {text}." for text in missing]
    busy = data["load_before"]
    if busy is not None and busy > 0.5:
        lines.append(f"The machine was busy: {busy:.1f} processes ran in the minute before, on average.")
    return lines


def table(work: Facts) -> Table:
    """One row for each contender: medians in seconds, the picture's spread, memory, energy."""
    rows = drawn(work, ours=False)
    titles = ["", *TITLES.values(), "peak memory"]
    several = any(len(row["runs"]) > 1 for row in rows)
    titles[4:4] = ["least to most"] * several
    device, joules = (any(row[key] for row in rows) for key in ("device_peak", "joules"))
    titles += ["GPU memory"] * device + ["energy"] * joules + ["PSNR"]
    found = Table(titles)
    for row in rows:
        cells = [row["name"], *(seconds(row["median"][stage]) for stage in TITLES), gigabytes(row["peak"])]
        least, most = row["least"]["picture"], row["most"]["picture"]
        cells[4:4] = [f"{least:.3g} to {most:.3g} s"] * several
        cells += [gigabytes(row["device_peak"])] * device
        cells += ["" if row["joules"] is None else f"{row['joules']:.3g} J"] * joules
        cells.append(likeness(row))
        found.add(*cells)
    size = "x".join(map(str, work["size"]))
    first = next((row["psnr_to"] for row in rows if row["psnr_to"]), None)
    like = f"; PSNR to {first}" if first else ""
    found.notes = [f"{work['model']}, {size}, {work['steps']} steps{like}.", *work["notes"]]
    return found


def likeness(row: Facts) -> str:
    """PSNR to the first row that drew; what is equal is said so."""
    if row["psnr_to"] is None:
        return ""
    return "equal" if row["psnr"] is None else f"{row['psnr']:.1f} dB"


def text(data: Facts, sentences: Sequence[str]) -> str:
    """All for a terminal; the sentences last."""
    tables = [table(work).text() for work in data["works"] if drawn(work, ours=False)]
    facts = [f"{name + ':':<14}{value}" for name, value in system(data).items()]
    said = [f"- {line}" for line in notes(data)]
    blocks = [*tables, "\n".join(facts), "\n".join(said), "\n".join(sentences)]
    return "\n\n".join(block for block in blocks if block)
