"""Tables of what was measured: aligned for a terminal, or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Table:
    """Titles, rows of as many cells, and lines of text below; named: columns of words, before the numbers."""

    titles: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    notes: Iterable[str] = ()
    named: int = 1

    def add(self, *cells: object) -> None:
        """A row; cells that are left out at its end are empty."""
        self.rows.append([*cells, *[""] * (len(self.titles) - len(cells))])

    def text(self) -> str:
        """Words to the left and numbers to the right; titles take several lines to keep columns narrow."""
        cells = [[str(cell) for cell in row] for row in self.rows]
        columns = [[row[i] for row in cells] for i in range(len(self.titles))]
        heads, widths = [], []
        for title, column in zip(self.titles, columns, strict=True):
            width = max(map(len, [*title.split(), *column]), default=0)
            heads.append(textwrap.wrap(title, max(width, 1)))
            widths.append(max(map(len, [*heads[-1], *column]), default=0))
        above = max(map(len, heads))
        # the last lines of all titles stand side by side
        rows = list(zip(*([*[""] * (above - len(lines)), *lines] for lines in heads), strict=True))
        return "\n".join([*(self._line(row, widths) for row in (*rows, *cells)), *self.notes])

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = enumerate(zip(row, widths, strict=True))
        padded = (f"{cell:<{w}}" if i < self.named else f"{cell:>{w}}" for i, (cell, w) in cells)
        return "  ".join(padded).rstrip()

    def markdown(self) -> str:
        """The notes are lines of one paragraph."""
        rows = [self.titles, ["---"] * len(self.titles), *self.rows]
        lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        notes = [f"{note}  " for note in self.notes]
        return "\n".join([*lines, *(["", *notes] if notes else [])])


def circumstances(data: Mapping[str, Any]) -> str:
    """Command, machine, commit and date on one line."""
    machine = data["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    commit = (data["commit"]["hash"] or "unknown")[:10]
    return f"`{data['command']}` at commit {commit}, {where}, {data['date'][:10]}."


def interval(score: Mapping[str, Any]) -> str:
    """A score's interval in words."""
    low, high = score["interval_95"]
    return f"{low:.3f} to {high:.3f}"


def decibels(value: float | None) -> str:
    """A PSNR; None is that of equal pictures."""
    return "equal" if value is None else f"{value:.1f}"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def gigabytes(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value / 1e9:.{digits}f} GB"


def median(row: Mapping[str, Any] | None) -> str:
    """A row's median time, if there is the row."""
    return "" if row is None else seconds(row["median"])


def most(row: Mapping[str, Any]) -> float | None:
    """Bytes at most; None where they were not measured."""
    return (row.get("memory") or {}).get("most")
