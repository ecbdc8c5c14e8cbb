"""The Markdown tables of README's engines, from what `bench_engines.py` and `quality_engines.py` wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contenders import BASELINE
from engine_tables import decibels
from engine_work import HALF, NAIVE_INT8, NAIVE_INT8_BF16
from markdown_table import circumstances, heading, interval, line
from paired import NEAR

Numbers = Mapping[str, Any]

# what the text after a table says of a contender: its references
FASTEST = "openvino int8 bf16"
REFERENCES = (BASELINE, HALF, NAIVE_INT8, NAIVE_INT8_BF16)
_GRAPHS = {
    "text_encoder": "text encoder",
    "text_projection": "text keys and values",
    "denoiser": "denoiser step",
    "denoiser_folded": "guided step",
    "decoder": "decoder",
}
_COLD = {"seconds": "process start to PNG", "peak": "peak memory", "psnr": "PSNR to torch"}


def engine_tables(results: Path) -> str:
    """Verification, speed, whole pictures, cold starts, and quality, of the files that are there."""
    parts = [verification_table(data) for data in _files(results, "verify_export")]
    parts += [speed_table(_files(results, "bench_engines-step-*", "bench_engines-decode-*"))]
    parts += [picture_table(data) for data in _files(results, "bench_engines-picture-*")]
    parts += [cold_table(data) for data in _files(results, "bench_engines-cold")]
    parts += [quality_table(data) for data in _files(results, "quality_engines")]
    return "\n\n".join(part for part in parts if part)


def _files(results: Path, *patterns: str) -> list[dict[str, Any]]:
    paths = [path for pattern in patterns for path in sorted(results.glob(f"{pattern}.json"))]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def verification_table(data: Numbers) -> str:
    """Exported graphs beside the torch modules: of each the relative error in L2, with its limit."""
    titles = ("decoder's parts, at most", "picture's PSNR", "size")
    rows = heading(["export", *_GRAPHS.values(), *titles])
    for export in data["exports"]:
        if export["failure"] is not None:
            rows.append(line([export["name"], export["failure"], *[""] * (len(_GRAPHS) + len(titles) - 1)]))
            continue
        found = export["verification"]
        picture = f"{found['picture']['psnr']:.1f} dB ({found['picture']['limit']:.0f})"
        size = f"{sum(export['bytes'].values()) / 1e6:.0f} MB"
        rows.append(line([export["name"], *_errors(found["graphs"]), picture, size]))
        if "unrounded" in found:
            name = f"{export['name']}, activations not rounded"
            rows.append(line([name, *_errors(found["unrounded"]), "", ""]))
    text = "Relative error in L2 of what graphs in onnxruntime give beside the torch modules in fp32, and in "
    text += "brackets what is allowed; of pictures of a few steps, the PSNR.  "
    notes = [f"{e['name']}: {e['note']}.  " for e in data["exports"] if e.get("note")]
    return "\n".join([*rows, "", text, *notes, circumstances(data)])


def _errors(graphs: Numbers) -> list[str]:
    parts = [found for name, found in graphs.items() if name.startswith("decoder_")]
    worst = max(parts, key=lambda found: float(found["error"]), default=None)
    cells = [*(graphs.get(name) for name in _GRAPHS), worst]
    return ["" if cell is None else f"{cell['error']:.1e} ({cell['limit']:.1e})" for cell in cells]


def speed_table(files: Sequence[Numbers]) -> str:
    """One row for each contender; of each work the seconds, and the peak memory of the process."""
    works = [work for data in files for work in data["works"]]
    if not works:
        return ""
    titles = [title for work in works for title in (work["title"], "peak memory")]
    names = dict.fromkeys(row["name"] for work in works for row in work["rows"])
    rows = heading(["", *titles])
    for name in names:
        cells: list[str] = []
        for work in works:
            row = next((row for row in work["rows"] if row["name"] == name), None)
            cells += ["", ""] if row is None else [f"{row['median']:.3g} s", _memory(row)]
        rows.append(line([name, *cells]))
    said = [text for work in works for text in _ratios(work)]
    return "\n".join([*rows, "", *said, *dict.fromkeys(circumstances(data) for data in files)])


def _memory(row: Numbers) -> str:
    most = (row.get("memory") or {}).get("most")
    return "" if most is None else f"{most / 1e9:.2f} GB"


def _ratios(work: Numbers) -> list[str]:
    """How many times as fast the fastest engine is as the references, medians over turns."""
    seconds = {row["name"]: row["seconds"] for row in work["rows"]}
    ours = seconds.get(FASTEST)
    if ours is None:
        return []
    said = []
    for name in REFERENCES:
        if name in seconds:
            times = statistics.median(a / b for a, b in zip(seconds[name], ours, strict=True))
            said.append(f"{times:.2f} times as fast as {name}")
    return [f"{work['title']}: {FASTEST} is {', '.join(said)}.  "] if said else []


def picture_table(data: Numbers) -> str:
    """Whole pictures of a Sprint model, each contender in a process of its own."""
    found = data["picture"]
    titles = ("whole picture", "loading", "first picture", "second", "its text", "steps", "decoding")
    near = next((row["reference"] for row in found["rows"] if row["reference"]), "the first")
    rows = heading([*titles, "peak memory", f"PSNR to {near}"])
    for row in found["rows"]:
        median = row["median"]
        if median is None:
            rows.append(line([row["name"], row["failure"], *[""] * 7]))
            continue
        columns = ("load", "first", "second", "second text", "second denoise", "second decode")
        seconds = [f"{median[column]:.3g} s" for column in columns]
        peak = max(run["peak"] for run in row["runs"])
        psnr = "" if row["reference"] is None else f"{decibels(row['psnr'])} dB"
        rows.append(line([row["name"], *seconds, f"{peak / 1e9:.1f} GB", psnr]))
    size = f"{found['size']}x{found['size']} pixels in {found['steps']} Sprint steps"
    note = f"{found['shapes']} shapes with their text encoder, random weights, {size}; the first picture "
    return "\n".join([*rows, "", f"{note}counts from the start of the process.  ", circumstances(data)])


def cold_table(data: Numbers) -> str:
    """From the start of a process to the PNG, with and without torch."""
    found = data["cold"]
    rows = heading([found["model"], *_COLD.values()])
    for row in found["rows"]:
        near = "" if row["psnr"] is None else f"{row['psnr']:.1f} dB"
        rows.append(line([row["name"], f"{row['median']:.2f} s", f"{row['peak'] / 1e6:.0f} MB", near]))
    note = "fp32 and int8 are what the folders hold: OpenVINO computes floats in bf16 where the CPU can.  "
    return "\n".join([*rows, "", note, circumstances(data)])


def quality_table(data: Numbers) -> str:
    """Scores beside the torch INT8 path, and how near pictures are to its."""
    titles = ("INT8", "score", "95 % interval", "points to torch", "right only in torch", "only in it")
    rows = heading([*titles, "PSNR to torch: median", "5 % are below", f"at least {NEAR:.0f} dB"])
    near = {like["pictures"]: like for like in data["likeness"] if like["to"] == "torch"}
    for name, numbers in data["models"].items():
        cells = [name, f"{numbers['overall']['score']:.3f}", interval(numbers["overall"])]
        compared, like = data["to_torch"].get(name), near.get(name)
        if compared is not None and like is not None:
            cells += [f"{100 * compared['difference']:+.1f}", compared["only_torch"], compared["only_engine"]]
            cells += [f"{decibels(like['psnr'][word])} dB" for word in ("median", "p5")]
            cells.append(f"{100 * like['near']:.0f} %")
        else:
            cells += [""] * 6
        rows.append(line(cells))
    bf16 = next(like for like in data["yardstick"]["likeness"] if like["to"] == "torch")["psnr"]
    pairs = "[Pairs](benchmarks/results/quality_engines.png), the worst too"
    note = f"torch static: torch with the scales of the graphs. {pairs}. "
    note += "Rounding alone, torch INT8 with the rest in bf16 beside itself with the rest in fp32: median "
    note += f"{bf16['median']:.1f} dB, 5 % below {bf16['p5']:.1f} dB"
    note += f", of {data['yardstick']['prompts']} prompts.  "
    return "\n".join([*rows, "", note, circumstances(data)])
