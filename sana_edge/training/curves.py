"""Step 5: the loss curves of the model card. `python -m sana_edge.training.curves`"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from sana_edge.errors import CheckpointError
from sana_edge.system.atomic import new_file
from sana_edge.system.json_values import Reader, parse
from sana_edge.system.regular import open_regular

TRAININGS = {
    "text": "text encoder",
    "vae": "autoencoder",
    "vae-decoder": "its decoder alone",
    "dit-first": "denoiser, features as they are",
    "dit": "denoiser, features whitened",
    "dit-further": "denoiser, further",
}


@dataclass(frozen=True)
class _Record:
    """What every line has, beside the figures of its training."""

    step: int
    minutes: float
    loss: float


def read_log(folder: Path) -> list[dict[str, float]]:
    """The records of `log.jsonl`; where a training went back to a checkpoint, the later ones count.

    A line that a killed process cut, or that is none, is left out.
    """
    records: dict[int, dict[str, float]] = {}
    with open_regular(folder / "log.jsonl") as file:
        lines = file.read().decode(errors="replace").split("\n")
    for line in lines:
        try:
            record = parse(line)
            Reader("").convert(record, _Record)
        except (ValueError, CheckpointError):
            continue
        records = {step: kept for step, kept in records.items() if step < record["step"]}
        records[record["step"]] = record
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description="draw loss curves, and keep their numbers beside them")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("runs/model"))
    args = parser.parse_args()

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {
        name: read_log(args.runs / name) for name in TRAININGS if (args.runs / name / "log.jsonl").exists()
    }
    if not logs:
        parser.error(f"no log.jsonl in the training folders of {args.runs}")
    figure, grid = pyplot.subplots(
        1, len(logs), figsize=(3.2 * len(logs), 2.8), layout="constrained", squeeze=False
    )
    for axis, (name, records) in zip(grid[0], logs.items(), strict=True):
        axis.plot([r["minutes"] for r in records], [r["loss"] for r in records], color="#3f7fdb")
        axis.set(title=TRAININGS[name], xlabel="minutes", yscale="log")
        axis.grid(alpha=0.3, which="both")
    grid[0][0].set_ylabel("loss (mean of about 50 steps)")
    with new_file(args.output / "curves.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    with new_file(args.output / "curves.json") as partial:
        partial.write_text(json.dumps(logs) + "\n")


if __name__ == "__main__":
    main()
