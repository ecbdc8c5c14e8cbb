"""Writes the tables of README.md and of sana-tiny's model card from results/*.json.

python benchmarks/report.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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


def main() -> int:
    """Rewrites what stands between `<!-- name -->` and `<!-- /name -->`."""
    quality = quality_table(RESULTS / "quality.json")
    replace(ROOT / "README.md", {"quality": quality, "speed": speed_tables()})
    replace(ROOT / "sana_edge" / "models" / "sana-tiny" / "README.md", {"quality": quality})
    return 0


def quality_table(path: Path) -> str:
    """One row per category, as a Markdown table with the run's circumstances."""
    data = json.loads(path.read_text())
    (name, numbers), best = next(iter(data["models"].items())), data["ceiling"]
    titles = ("category", "score", "prompts", "95 % interval", "judge's ceiling", "shuffled prompts")
    rows = [line(titles), line(["---"] * 6)]
    control = [c["shuffled"] for c in numbers["categories"].values()]
    everything = {**numbers["overall"], "shuffled": sum(control) / len(control)}
    for title, c in [*numbers["categories"].items(), ("**overall**", everything)]:
        low, high = c["interval_95"]
        top = best["categories"].get(title, best["overall"])
        interval = f"{low:.3f} to {high:.3f}"
        rows.append(
            line([title, f"{c['score']:.3f}", c["n"], interval, f"{top:.3f}", f"{c['shuffled']:.3f}"])
        )
    settings = data["settings"]
    note = f"{name}, {settings['steps']} steps, guidance {settings['guidance']}. {circumstances(data)}"
    return "\n".join([*rows, "", note])


def speed_tables() -> str:
    """One row per stage that was measured beside diffusers, from every file of `bench_image.py`."""
    titles = ("work", "stage", "diffusers", "sana-edge", "ratio", "peak memory of each")
    rows = [line(titles), line(["---"] * 6)]
    notes = []
    for path in sorted(RESULTS.glob("bench_image-*.json")):
        data = json.loads(path.read_text())
        rows += [row for work in data["works"] for row in speed_rows(work)]
        notes.append(circumstances(data))
    return "\n".join([*rows, "", *dict.fromkeys(notes)])


def speed_rows(work: dict[str, Any]) -> list[str]:
    """The rows of a work whose stages both implementations have."""
    by_stage: dict[str, dict[str, Any]] = {}
    for row in work["rows"]:
        by_stage.setdefault(row["stage"], {})[row["name"]] = row
    lines = []
    for stage, names in by_stage.items():
        ours = next((row for name, row in names.items() if name != "diffusers"), None)
        if stage not in STAGES or ours is None or "diffusers" not in names:
            continue
        theirs = names["diffusers"]
        times = (f"{row['median']:.3g} s" for row in (theirs, ours))
        lines.append(line([work["title"], STAGES[stage], *times, f"{ours['ratio']:.2f}", peak(theirs, ours)]))
    return lines


def peak(*rows: dict[str, Any]) -> str:
    """The most memory of each process, theirs / ours; empty where it was not measured."""
    most = [(row["memory"] or {}).get("most") for row in rows]
    return "" if None in most else " / ".join(f"{value / 1e9:.2f}" for value in most) + " GB"


def line(cells: Iterable[object]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def circumstances(data: dict[str, Any]) -> str:
    """Command, machine, commit and date on one line."""
    machine = data["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    commit = (data["commit"]["hash"] or "unknown")[:10]
    return f"`{data['command']}` at commit {commit}, {where}, {data['date'][:10]}.  "


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
