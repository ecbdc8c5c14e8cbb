"""Measurements for people: an aligned table, and a chart of the ratios."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence

from contenders import BASELINE, OURS
from measuring import Row

COLUMNS = (
    *("stage", "by", "median s", "min s", "max s", f"/ {BASELINE}", "min", "max"),
    *(f"/ {OURS}", "min", "max", "weights MB", "peak MB", "of it new", "difference"),
)


def table(title: str, rows: Sequence[Row], layers: int | None = None) -> str:
    """One line for each stage and implementation; layers: adds the time of each where the network was cut."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [title]
    for line in cells:
        named = [text.ljust(width) for text, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [text.rjust(width) for text, width in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join(named + numbers).rstrip())
    if layers:
        shares = (f"{row.name} {row.median / layers:.4g} s" for row in rows if row.stage == "step")
        lines.append(f"step per layer: {', '.join(shares)}")
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    ratios = [
        f"{ratio:.3f}" if ratio else ""
        for found in (row.ratios, row.ratios_to_float)
        for ratio in ((statistics.median(found), min(found), max(found)) if found else [None] * 3)
    ]
    weights = "" if row.weights is None else f"{row.weights / 1e6:.1f}"
    memory, difference = ["", ""], ""
    if row.memory is not None:
        most, before = row.memory.most, row.memory.before
        memory[0] = f"{most / 1e6:.0f}" if most is not None else ""
        memory[1] = f"{(most - before) / 1e6:.0f}" if most is not None and before is not None else ""
    if row.difference is not None:
        difference = f"{row.difference:.1e}" + (f", {row.levels}/255" if row.levels is not None else "")
    times = [f"{seconds:.4g}" for seconds in (row.median, min(row.seconds), max(row.seconds))]
    return (row.stage, row.name, *times, *ratios, weights, *memory, difference)


def chart(results: Mapping[str, Sequence[Row]]) -> bytes:
    """A PNG of each stage's time as a share of the baseline's, the works by title one below the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counted = {title: [row for row in rows if row.ratio is not None] for title, rows in results.items()}
    heights = [len(rows) + 1.2 for rows in counted.values()]
    figure, axes = pyplot.subplots(
        len(counted), figsize=(9, 0.4 * sum(heights) + 0.6), height_ratios=heights, squeeze=False, sharex=True
    )
    for panel, (title, rows) in zip(axes[:, 0], counted.items(), strict=True):
        shares = [row.ratio or 0.0 for row in rows]
        reach = [
            [share - min(row.ratios) for share, row in zip(shares, rows, strict=True)],
            [max(row.ratios) - share for share, row in zip(shares, rows, strict=True)],
        ]
        panel.barh(
            [f"{row.stage}, {row.name}" for row in rows], shares, xerr=reach, color="#4c8c6b", ecolor="#888"
        )
        for position, (share, row) in enumerate(zip(shares, rows, strict=True)):
            panel.text(0.01, position, f"{share:.2f}  ({row.median:.3g} s)", va="center", color="white")
        panel.axvline(1, color="#444", linestyle=":")
        panel.invert_yaxis()
        panel.set_title(title, fontsize=10, loc="left")
        panel.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"time, {BASELINE} = 1")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()
