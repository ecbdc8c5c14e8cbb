"""Tables of our networks in float and INT8 beside diffusers: of each stage, and in short."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.results import BASELINE, FASTEST, HALF, INT8, OURS, files
from sana_edge.bench.table import Table, circumstances, gigabytes, median, most

Numbers = Mapping[str, Any]

STAGES = {
    "text": "text",
    "context": "text keys and values, once per picture",
    "step": "denoising step",
    "step+context/20": "denoising step with its share of that",
    "decode": "decode",
    "picture": "whole picture, 20 steps",
}


def summary(results: Path) -> Table:
    """Float and INT8 of each backend, at most six rows: a step in full size, and pictures of sana-tiny."""
    titles = ("model and work", "backend", "float", "INT8", "memory", "quality of INT8")
    table = Table(titles, named=2)
    notes: list[str] = []
    for data in files(results, "bench_engines-step-0.6b-1024px"):
        rows = {row["name"]: row for row in data["works"][0]["rows"]}
        pairs = {
            "torch": (HALF, "diffusers in bf16", INT8),
            "onnxruntime": ("onnxruntime", "fp32", "onnxruntime int8"),
            "OpenVINO": ("openvino bf16", "bf16", FASTEST),
        }
        for backend, (large, kind, small) in pairs.items():
            a, b = rows.get(large), rows.get(small)
            if a is None or b is None:
                continue
            cells = [f"{median(a)}, {kind}", median(b), f"{most(a) / 1e9:.2f} / {gigabytes(most(b))}"]
            table.add(
                "0.6B, a step at 1024x1024", backend, *cells, f"velocity off by {100 * b['difference']:.1f} %"
            )
        notes.append(circumstances(data))
    scores = [data["models"] for data in files(results, "quality") if "paired" in data]
    overall = [model["overall"] for model in (scores[0].values() if scores else ())]
    right = " and ".join(f"{score['score']:.3f}" for score in overall)
    asked = overall[0]["n"] if overall else 0
    for data in files(results, "bench_image-sana-tiny-*"):
        work = next(work for work in data["works"] if work["dtype"] == "bf16")
        rows = {row["name"]: row for row in work["rows"] if row["stage"] == "picture"}
        a, b = rows[OURS], rows[INT8]
        cells = [f"{median(a)}, bf16", median(b), f"{most(a) / 1e9:.2f} / {gigabytes(most(b))}"]
        table.add("sana-tiny, a picture", "torch", *cells, f"{right} of {asked} prompts right")
        notes.append(circumstances(data))
    judged = [data["models"] for data in files(results, "quality_engines")]
    for data in files(results, "bench_engines-cold"):
        rows = {row["name"]: row for row in data["cold"]["rows"]}
        for backend, name in (("onnxruntime", "onnxruntime"), ("OpenVINO", "openvino")):
            a, b = rows.get(f"{name} fp32"), rows.get(f"{name} int8")
            if a is None or b is None:
                continue
            cells = [median(a), median(b), f"{a['peak'] / 1e9:.2f} / {gigabytes(b['peak'])}"]
            best = judged[0][name]["overall"] if judged else {}
            score = f"{best['score']:.3f} of {best['n']} prompts right" if best else ""
            table.add("sana-tiny, process start to PNG", backend, *cells, score)
        notes.append(circumstances(data))
    table.notes = notes
    return table


def speed(found: Sequence[Numbers]) -> Table:
    """One row for each stage that was measured side by side, of all files of `bench_image.py`."""
    works = [work for data in found for work in data["works"]]
    int8 = any(row["name"] == INT8 for work in works for row in work["rows"])
    columns = ("INT8", "to diffusers", "to our float", "INT8's weights") if int8 else ()
    titles = ("work", "stage", "diffusers", "sana-edge", "ratio", *columns, "peak memory of each")
    rows: list[Sequence[object]] = [row for work in works for row in _speed_rows(work, int8)]
    return Table(titles, rows, dict.fromkeys(circumstances(data) for data in found), 2)


def _speed_rows(work: Numbers, int8: bool) -> Iterator[list[str]]:
    """Of stages that more than one implementation has, and diffusers where it took part."""
    by_stage: dict[str, dict[str, Any]] = {}
    for row in work["rows"]:
        by_stage.setdefault(row["stage"], {})[row["name"]] = row
    against = any(BASELINE in names for names in by_stage.values())
    for stage, names in by_stage.items():
        theirs, ours, small = (names.get(name) for name in (BASELINE, OURS, INT8))
        if stage not in STAGES or len(names) < 2 or (against and theirs is None):
            continue
        cells = [work["title"], STAGES[stage], median(theirs), median(ours), _share(ours, "ratio")]
        if int8:
            cells += [median(small), _share(small, "ratio"), _share(small, "ratio_to_float")]
            cells.append(_weights(small, ours))
        used = [most(row) for row in (theirs, ours, small) if row is not None]
        memory = "" if None in used else " / ".join(f"{value / 1e9:.2f}" for value in used if value) + " GB"
        yield [*cells, memory]


def _share(row: Numbers | None, name: str) -> str:
    return "" if row is None or row.get(name) is None else f"{row[name]:.2f}"


def _weights(row: Numbers | None, whole: Numbers | None) -> str:
    """The size of the weights in memory, and as a share of the float ones."""
    if row is None or row.get("weights") is None:
        return ""
    part = f" ({row['weights'] / whole['weights']:.2f})" if whole and whole.get("weights") else ""
    return f"{row['weights'] / 1e6:.3g} MB{part}"
