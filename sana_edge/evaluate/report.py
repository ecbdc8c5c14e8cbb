"""What an evaluation says: its table, the paper's beside it, a sentence, and the sheet of the worst pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sana_edge.evaluate.measured import Alike, Measured, Score, Verdicts
from sana_edge.evaluate.metrics import Drawn
from sana_edge.evaluate.pictures import Source
from sana_edge.evaluate.sheet import AMPLIFIED, Pair, PairRow, pair_sheet
from sana_edge.init_image import read_image
from sana_edge.store.known_models import KNOWN

PAPER = "arXiv 2410.10629, Table 5"
TABLE_5 = {"clip": (28.5, 28.3), "imagereward": (1.03, 0.96)}
"""Float and W8A8 on a laptop's GPU: of MJHQ-30K's prompts, ImageReward of the first 1,000."""
WORST = 3
"""Pairs of each metric on the sheet."""


@dataclass(frozen=True)
class Report:
    """The results of one run.

    Attributes:
        sources: one or two; the second is compared with the first.
        prompts: what the prompt set is called.
        numbers: of the prompts that all sources have drawn.
        measured: by metric, in the order of the table.
        left_out: why metrics were not measured.
        failed: why prompts have no picture, by source and number.
    """

    sources: Sequence[Source]
    prompts: str
    numbers: Sequence[int]
    drawn: Drawn
    measured: Mapping[str, Measured]
    left_out: Mapping[str, str]
    failed: Mapping[str, Mapping[int, str]]

    @property
    def names(self) -> list[str]:
        return [source.label for source in self.sources]

    @property
    def count(self) -> str:
        """How many prompts, in words."""
        return f"{len(self.numbers)} prompt{'s' * (len(self.numbers) != 1)}"

    def text(self) -> str:
        """All that is printed: tables and, last, the sentence."""
        parts = [self.table()]
        if len(self.sources) == 2 and any(name in TABLE_5 for name in self.measured):
            parts.append(self.table_5())
        missing = [f"{name}: not measured, {reason}" for name, reason in self.left_out.items()]
        missing += [
            f"{label}: {len(of)} prompts have no picture and are left out, such as {next(iter(of))}: "
            f"{next(iter(of.values()))}"
            for label, of in self.failed.items()
            if of
        ]
        return "\n\n".join([*parts, *(["\n".join(missing)] if missing else []), self.sentence()])

    def table(self) -> str:
        """A row a metric."""
        rows = [row for measured in self.measured.values() for row in measured.rows()]
        heads = [self.count, *self.names]
        pair = len(self.sources) == 2
        heads += ["difference", "95 % interval", "p"] if pair else ["95 % interval"]
        cells = [
            [row.title, *row.values, *([row.difference, row.interval, row.p] if pair else [row.interval])]
            for row in rows
        ]
        return _columns([heads, *cells])

    def table_5(self) -> str:
        """The paper's numbers and these, where the same metric ran."""
        rows = [["", "paper fp16", "paper INT8", "difference", *self.names, "difference"]]
        for name, (before, after) in TABLE_5.items():
            score = self.measured.get(name)
            if isinstance(score, Score) and score.difference is not None:
                paper = [f"{before}", f"{after}", f"{after - before:+.2f}"]
                row = score.row()
                rows.append([score.title, *paper, *row.values, row.difference])
        return f"{PAPER}\n{_columns(rows)}\n{self.caveat()}"

    def caveat(self) -> str:
        """Why the paper's numbers and these are not of one measurement."""
        known = all(source.model.lower() in KNOWN for source in self.sources)
        weights = "" if known else f"other weights ({' and '.join(self.names)}), "
        return (
            f"The paper's are of {weights}other prompts (MJHQ-30K, 1,000 of them for ImageReward; here "
            f"{len(self.numbers)} of {self.prompts}) and maybe another CLIP: compare differences, not levels."
        )

    def sentence(self) -> str:
        """What INT8, or the second model, cost, in plain words."""
        words = "; ".join(measured.words() for measured in self.measured.values())
        if len(self.sources) == 1:
            return f"{self.names[0]} over {self.count}: {words}."
        first, second = self.sources
        what = "INT8" if second.int8 else f"{second.label} in place of {first.label}"
        return f"What {what} cost, over {self.count}: {words}."

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "sources": [
                {"label": source.label, "model": source.model, "int8": source.int8} for source in self.sources
            ],
            "prompts": {"name": self.prompts, "numbers": list(self.numbers), "texts": list(self.drawn.texts)},
            "metrics": {name: measured.facts() for name, measured in self.measured.items()},
            "not_measured": dict(self.left_out),
            "failed": {label: {str(i): why for i, why in of.items()} for label, of in self.failed.items()},
            "paper": {"source": PAPER, "caveat": self.caveat(), **{k: list(v) for k, v in TABLE_5.items()}},
            "sentence": self.sentence(),
        }

    def sheet(self) -> bytes | None:
        """A PNG of the worst pairs by each metric; None where no pair differs."""
        rows = []
        for measured in self.measured.values():
            places = measured.worst_first[:WORST]
            if places:
                remark = f"{len(measured.worst_first)} of {len(self.numbers)} pairs are {_worse(measured)}"
                pairs = [self._pair(measured, place) for place in places]
                rows.append(PairRow(f"worst by {measured.title}", remark, pairs))
        if not rows:
            return None
        title = f"{' and '.join(self.names)}, and the difference x {AMPLIFIED}"
        return pair_sheet(title, f"{self.count} of {self.prompts}, same seeds", rows)

    def _pair(self, measured: Measured, place: int) -> Pair:
        first, second = (read_image(paths[place]) for paths in self.drawn.paths)
        faults: tuple[str | None, str | None] = (None, None)
        verdicts = self.measured.get("judge")
        if isinstance(verdicts, Verdicts):
            faults = (verdicts.outcomes[0][place].fault, verdicts.outcomes[1][place].fault)
        return Pair(self.drawn.texts[place], (first, second), measured.remark(place), faults)


def _worse(measured: Measured) -> str:
    if isinstance(measured, Alike):
        return "not equal"
    return "right, then wrong" if isinstance(measured, Verdicts) else "lower"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Aligned: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
