"""The tables of exported graphs: whether they are right, how fast engines are, how good their pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from harness.results import FASTEST, REFERENCES
from sana_edge.bench.table import Table, circumstances, decibels, gigabytes, interval, median, most, seconds

Numbers = Mapping[str, Any]

GRAPHS = {
    "text_encoder": "text encoder",
    "text_projection": "text keys and values",
    "denoiser": "denoiser step",
    "denoiser_folded": "guided step",
    "decoder": "decoder",
}


def verification(data: Numbers) -> Table:
    """Exported graphs beside the torch modules: of each the relative error in L2, with its limit."""
    titles = ("decoder's parts, at most", "picture's PSNR", "size")
    table = Table(("export", *GRAPHS.values(), *titles))
    for export in data["exports"]:
        if export["failure"] is not None:
            table.add(export["name"], export["failure"])
            continue
        found = export["verification"]
        picture = f"{found['picture']['psnr']:.1f} dB ({found['picture']['limit']:.0f})"
        size = f"{sum(export['bytes'].values()) / 1e6:.0f} MB"
        table.add(export["name"], *_errors(found["graphs"]), picture, size)
        if "unrounded" in found:
            table.add(f"{export['name']}, activations not rounded", *_errors(found["unrounded"]))
    text = "Relative error in L2 of what graphs in onnxruntime give beside the torch modules in fp32, and in "
    text += "brackets what is allowed; of pictures of a few steps, the PSNR."
    notes = [f"{e['name']}: {e['note']}." for e in data["exports"] if e.get("note")]
    table.notes = [text, *notes, circumstances(data)]
    return table


def _errors(graphs: Numbers) -> list[str]:
    parts = [found for name, found in graphs.items() if name.startswith("decoder_")]
    worst = max(parts, key=lambda found: float(found["error"]), default=None)
    cells = [*(graphs.get(name) for name in GRAPHS), worst]
    return ["" if cell is None else f"{cell['error']:.1e} ({cell['limit']:.1e})" for cell in cells]


def engines_speed(found: Sequence[Numbers]) -> Table:
    """One row for each contender; of each work the seconds, and the peak memory of the process."""
    works = [work for data in found for work in data["works"]]
    table = Table(["", *(title for work in works for title in (work["title"], "peak memory"))])
    for name in dict.fromkeys(row["name"] for work in works for row in work["rows"]):
        rows = [next((row for row in work["rows"] if row["name"] == name), None) for work in works]
        table.add(name, *(cell for r in rows for cell in (median(r), gigabytes(most(r)) if r else "")))
    said = [text for work in works for text in _times_as_fast(work)]
    table.notes = [*said, *dict.fromkeys(circumstances(data) for data in found)]
    return table


def _times_as_fast(work: Numbers) -> list[str]:
    """How many times as fast the fastest engine is as the references, medians over turns."""
    taken = {row["name"]: row["seconds"] for row in work["rows"]}
    said = []
    for name in (name for name in REFERENCES if name in taken and FASTEST in taken):
        times = statistics.median(a / b for a, b in zip(taken[name], taken[FASTEST], strict=True))
        said.append(f"{times:.2f} times as fast as {name}")
    return [f"{work['title']}: {FASTEST} is {', '.join(said)}."] if said else []


def pictures(data: Numbers) -> Table:
    """Whole pictures of a Sprint model, each contender in a process of its own."""
    found = data["picture"]
    titles = ("whole picture", "loading", "first picture", "second", "its text", "steps", "decoding")
    near = next((row["reference"] for row in found["rows"] if row["reference"]), "the first")
    table = Table((*titles, "peak memory", f"PSNR to {near}"))
    for row in found["rows"]:
        times = row["median"]
        if times is None:
            table.add(row["name"], row["failure"])
            continue
        columns = ("load", "first", "second", "second text", "second denoise", "second decode")
        peak = gigabytes(max(run["peak"] for run in row["runs"]), 1)
        psnr = "" if row["reference"] is None else f"{decibels(row['psnr'])} dB"
        table.add(row["name"], *(seconds(times[column]) for column in columns), peak, psnr)
    size = f"{found['size']}x{found['size']} pixels in {found['steps']} Sprint steps"
    note = f"{found['shapes']} shapes with their text encoder, random weights, {size}; the first picture "
    faster = _pictures_as_fast({row["name"]: row["runs"] for row in found["rows"] if row["runs"]})
    table.notes = [f"{note}counts from the start of the process.", *faster, circumstances(data)]
    return table


def _pictures_as_fast(runs: Mapping[str, Sequence[Numbers]]) -> list[str]:
    """How many times as fast engines draw a second picture as the references, medians over turns."""
    engines = {name: of for name, of in runs.items() if name.split()[0] in ("openvino", "onnxruntime")}
    said = []
    for base in (name for name in REFERENCES if name in runs):
        times = []
        for name, of in engines.items():
            shares = [b["second"] / a["second"] for a, b in zip(of, runs[base], strict=False)]
            times.append(f"{name} {statistics.median(shares):.2f}")
        said += [f"Times as fast as {base}, second pictures: {', '.join(times)}."] if times else []
    return said


def cold(data: Numbers) -> Table:
    """From the start of a process to the PNG, with and without torch."""
    found = data["cold"]
    table = Table((found["model"], "process start to PNG", "peak memory", "PSNR to torch"))
    for row in found["rows"]:
        near = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        table.add(row["name"], f"{row['median']:.2f} s", f"{row['peak'] / 1e6:.0f} MB", near)
    note = "fp32 and int8 are what the folders hold: OpenVINO computes floats in bf16 where the CPU can."
    table.notes = [note, circumstances(data)]
    return table


def engines_quality(data: Numbers) -> Table:
    """Scores beside the torch INT8 path, and how near pictures are to its."""
    # numpy's, which the report does without
    from sana_edge.image_metrics import NEAR

    titles = ("INT8", "score", "95 % interval", "points to torch", "right only in torch", "only in it")
    table = Table((*titles, "PSNR to torch: median", "5 % are below", f"at least {NEAR:.0f} dB"))
    near = {like["pictures"]: like for like in data["likeness"] if like["to"] == "torch"}
    for name, numbers in data["models"].items():
        cells = [name, f"{numbers['overall']['score']:.3f}", interval(numbers["overall"])]
        compared, like = data["to_torch"].get(name), near.get(name)
        if compared is not None and like is not None:
            cells += [f"{100 * compared['difference']:+.1f}", compared["only_torch"], compared["only_engine"]]
            cells += [f"{decibels(like['psnr'][word])} dB" for word in ("median", "p5")]
            cells.append(f"{100 * like['near']:.0f} %")
        table.add(*cells)
    bf16 = next(like for like in data["yardstick"]["likeness"] if like["to"] == "torch")["psnr"]
    note = "torch static: torch with the scales of the graphs. "
    note += "Rounding alone, torch INT8 with the rest in bf16 beside itself with the rest in fp32: median "
    note += f"{decibels(bf16['median'])} dB, 5 % below {decibels(bf16['p5'])} dB"
    table.notes = [f"{note}, of {data['yardstick']['prompts']} prompts.", circumstances(data)]
    return table


def products(data: Numbers) -> Table:
    """INT8 products of a graph, those in the same place of a layer together, beside the measured peak."""
    work = data["work"]
    titles = ("product", "output", "of them", "operations", "time", "a second", "of the peak")
    table = Table(titles)
    for row in work["rows"]:
        sides = "" if row["shape"] is None else "x".join(map(str, row["shape"]))
        name = row["name"] if row is not work["rows"][-1] else f"**{row['name']}**"
        rate, share = f"{row['rate'] / 1e9:.0f} G", f"{row['share']:.0%}"
        operations = f"{row['operations'] / 1e9:.3g} G"
        table.add(name, sides, row["products"], operations, seconds(row["seconds"]), rate, share)
    peaks = ", ".join(f"{rate / 1e9:.0f} G by {name}" for name, rate in work["peaks"].items())
    side, part = data["side"], work["rows"][-1]["seconds"] / work["seconds"]
    said = f"{work['title']}, {data['by']}: these are {part:.0%} of {seconds(work['seconds'])}."
    peak = f"Peak, a product of two {side}x{side} matrices of INT8: {peaks} operations a second; the larger"
    table.notes = [said, f"{peak} one of each turn counts.", circumstances(data)]
    return table


def text_graph(data: Numbers) -> Table:
    """One row for each contender; of each work its seconds, and their ratio to transformers in fp32."""
    behind = [
        f"behind {work['instruction']} that were read" if work["instruction"] else "alone"
        for work in data["works"]
    ]
    table = Table(["", *(title for work in behind for title in (work, "to the first", "off by"))])
    names = dict.fromkeys(row["name"] for work in data["works"] for row in work["rows"])
    for name in names:
        rows = [next(row for row in work["rows"] if row["name"] == name) for work in data["works"]]
        cells = ((seconds(r["seconds"]), f"{r['ratio']:.2f}", f"{r['difference']:.1e}") for r in rows)
        table.add(name, *(cell for row in cells for cell in row))
    tokens = data["works"][0]["tokens"]
    layers = f"{data['layers']} of the {data['all_layers']} layers of {data['shapes']}"
    said = f"{tokens} tokens, {layers} with random weights, {data['threads']} threads; ratios are medians"
    said += f" over turns. {data['load_before']} processes were running before."
    reasons = [f"{name}: {reason}." for name, reason in data["left_out"].items()]
    table.notes = [said, *reasons, circumstances(data)]
    return table
