"""Writes the tables of README.md and of sana-tiny's model card from results/*.json.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from contenders import BASELINE, INT8, OURS
from engine_report import engine_tables
from markdown_table import circumstances, heading, interval, line
from paired import likeness_text, verdict
from record import write_bytes

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = {
    "text": "text",
    "context": "text keys and values, once per picture",
    "step": "denoising step",
    "step+context/20": "denoising step with its share of that",
    "decode": "decode",
    "picture": "whole picture, 20 steps",
}
PARTS = {
    "transformer": "denoiser",
    "vae": "decoder",
    "text_encoder": "text encoder, its embedding table on disk only",
}


def main() -> int:
    """Rewrites what stands between `<!-- name -->` and `<!-- /name -->`."""
    quality = quality_table(RESULTS / "quality.json")
    sections = {"quality": quality, "speed": speed_tables(), "engines": engine_tables(RESULTS)}
    replace(ROOT / "README.md", {**sections, "quantize": quantize_table(RESULTS / "bench_quantize.json")})
    replace(ROOT / "sana_edge" / "models" / "sana-tiny" / "README.md", {"quality": quality})
    return 0


def quality_table(path: Path) -> str:
    """One row per category, as a Markdown table with the run's circumstances; both models where two ran."""
    data = json.loads(path.read_text())
    name, *_ = data["models"]
    settings = data["settings"]
    table = paired_rows(data) if "paired" in data else single_rows(data)
    note = f"{name}, {settings['steps']} steps, guidance {settings['guidance']}. {circumstances(data)}"
    compared = data.get("paired")
    lines = f"{verdict(compared)}\n{likeness_text(compared)}".splitlines() if compared else []
    return "\n".join([*table, "", *(f"{text}  " for text in lines), note])


def quantize_table(path: Path) -> str:
    """What a model weighs before and after, and what quantizing it took."""
    data = json.loads(path.read_text())
    rows = heading(("weights", "fp32", "as stored", "INT8 package", "of fp32"))
    for name, before in data["bytes"]["float"].items():
        after = data["bytes"]["int8"][name]["stored"]
        sizes = (f"{size / 1e6:,.0f} MB" for size in (before["fp32"], before["stored"], after))
        rows.append(line([PARTS[name], *sizes, f"{after / before['fp32']:.3f}"]))
    took = data["quantize"]
    text = f"Quantizing took {took['seconds']:.0f} s and at most {took['peak_memory'] / 1e9:.1f} GB"
    if "generate" in data:
        made = data["generate"]
        text += f"; loading the package and making a picture in one step {made['seconds']:.0f} s and "
        text += f"{made['peak_memory'] / 1e9:.1f} GB"
    return "\n".join([*rows, "", f"{text}.  ", circumstances(data)])


def single_rows(data: dict[str, Any]) -> list[str]:
    """One model: score, prompts, interval, and the two controls."""
    (numbers,), best = data["models"].values(), data["ceiling"]
    titles = ("category", "score", "prompts", "95 % interval", "judge's ceiling", "shuffled prompts")
    rows = heading(titles)
    for title, c in with_overall(numbers):
        top = best["categories"].get(title, best["overall"])
        cells = [title, f"{c['score']:.3f}", c["n"], interval(c), f"{top:.3f}", f"{c['shuffled']:.3f}"]
        rows.append(line(cells))
    return rows


def paired_rows(data: dict[str, Any]) -> list[str]:
    """A float model and its INT8: both scores, and the prompts that only one of them gets right."""
    compared, best = data["paired"], data["ceiling"]
    first, second = (data["models"][compared[key]] for key in ("float", "int8"))
    titles = (
        *("category", "prompts", "float", "95 % interval", "INT8", "95 % interval"),
        *("right only as float", "only as INT8", "judge's ceiling", "shuffled prompts"),
    )
    rows = heading(titles)
    for (title, a), (_, b) in zip(with_overall(first), with_overall(second), strict=True):
        counts = compared["categories"].get(title, compared)
        top = best["categories"].get(title, best["overall"])
        scores = [f"{a['score']:.3f}", interval(a), f"{b['score']:.3f}", interval(b)]
        controls = [f"{top:.3f}", f"{a['shuffled']:.3f}"]
        rows.append(line([title, a["n"], *scores, counts["only_float"], counts["only_int8"], *controls]))
    return rows


def with_overall(numbers: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A model's categories, and the overall score with the mean of their controls."""
    control = [c["shuffled"] for c in numbers["categories"].values()]
    everything = {**numbers["overall"], "shuffled": sum(control) / len(control)}
    return [*numbers["categories"].items(), ("**overall**", everything)]


def speed_tables() -> str:
    """One row per stage that was measured side by side, from every file of `bench_image.py`."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("bench_image-*.json"))]
    works = [work for data in files for work in data["works"]]
    int8 = any(row["name"] == INT8 for work in works for row in work["rows"])
    titles = (
        *("work", "stage", "diffusers", "sana-edge", "ratio"),
        *(("INT8", "to diffusers", "to our float", "INT8's weights") if int8 else ()),
        "peak memory of each",
    )
    rows = [row for work in works for row in speed_rows(work, int8)]
    notes = dict.fromkeys(circumstances(data) for data in files)
    return "\n".join([*heading(titles), *rows, "", *notes])


def speed_rows(work: dict[str, Any], int8: bool) -> list[str]:
    """The rows of a work for stages of README's that more than one implementation has.

    int8: with INT8's columns. Stages that only our own have are left out where diffusers took part.
    """
    by_stage: dict[str, dict[str, Any]] = {}
    for row in work["rows"]:
        by_stage.setdefault(row["stage"], {})[row["name"]] = row
    against = any(BASELINE in names for names in by_stage.values())
    lines = []
    for stage, names in by_stage.items():
        theirs, ours, small = (names.get(name) for name in (BASELINE, OURS, INT8))
        if stage not in STAGES or len(names) < 2 or (against and theirs is None):
            continue
        cells = [work["title"], STAGES[stage], seconds(theirs), seconds(ours), share(ours, "ratio")]
        if int8:
            cells += [seconds(small), share(small, "ratio"), share(small, "ratio_to_float")]
            cells.append(weights(small, ours))
        lines.append(line([*cells, peak(theirs, ours, small)]))
    return lines


def seconds(row: dict[str, Any] | None) -> str:
    """A stage's median; empty where it was not measured, as the others."""
    return "" if row is None else f"{row['median']:.3g} s"


def share(row: dict[str, Any] | None, name: str) -> str:
    """One of a stage's ratios."""
    return "" if row is None or row.get(name) is None else f"{row[name]:.2f}"


def weights(row: dict[str, Any] | None, whole: dict[str, Any] | None) -> str:
    """The size of the weights in memory, and as a share of the float ones."""
    if row is None or row.get("weights") is None:
        return ""
    part = f" ({row['weights'] / whole['weights']:.2f})" if whole and whole.get("weights") else ""
    return f"{row['weights'] / 1e6:.3g} MB{part}"


def peak(*rows: dict[str, Any] | None) -> str:
    """The most memory of each process in the order of the columns; empty where it was not measured."""
    most = [(row["memory"] or {}).get("most") for row in rows if row is not None]
    return "" if None in most else " / ".join(f"{value / 1e9:.2f}" for value in most) + " GB"


def replace(path: Path, sections: dict[str, str]) -> None:
    """Puts the sections into a Markdown file."""
    text = path.read_text()
    for name, content in sections.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, c=content: f"{m[1]}{c}\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"error: {path.name} has no section {name}")
    write_bytes(path, text.encode())


if __name__ == "__main__":
    sys.exit(main())
