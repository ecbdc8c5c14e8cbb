"""The printed tables of `quality_engines.py`, of what stands in its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paired import NEAR

Numbers = Mapping[str, Any]


def score_table(models: Mapping[str, Numbers], compared: Mapping[str, Numbers]) -> str:
    """One row for each model: its score and how it differs from the first, torch; then the categories."""
    titles = ("score", "95 % interval", "points", "95 % interval", "only torch", "only it", "p")
    widths = (7, 16, 8, 15, 12, 9, 8)
    lines = [_line("", titles, widths)]
    for name, numbers in models.items():
        score = numbers["overall"]
        cells = [f"{score['score']:.3f}", "{:.3f} to {:.3f}".format(*score["interval_95"])]
        if name in compared:
            c = compared[name]
            low, high = (100 * end for end in c["interval_95"])
            cells += [f"{100 * c['difference']:+.1f}", f"{low:+.1f} to {high:+.1f}"]
            cells += [c["only_torch"], c["only_engine"], f"{c['mcnemar_p']:.2g}"]
        lines.append(_line(name, cells, widths))
    categories = list(next(iter(models.values()))["categories"])
    wide = [len(category) + 1 for category in categories]
    lines += ["", _line("score", categories, wide)]
    for name, numbers in models.items():
        scores = [f"{numbers['categories'][category]['score']:.3f}" for category in categories]
        lines.append(_line(name, scores, wide))
    return "\n".join(lines)


def likeness_table(data: Numbers) -> str:
    """One row for each pair: PSNR in dB, the share of pictures that are near, SSIM; then the yardstick."""
    titles = ("mean", "median", "5 % below", "worst", f">= {NEAR:.0f} dB", "SSIM")
    widths = (8, 8, 11, 8, 11, 9)
    lines = [_line("PSNR of pictures, dB", titles, widths)]
    for part in (data["likeness"], data["yardstick"]["likeness"]):
        for like in part:
            psnr = [decibels(like["psnr"][word]) for word in ("mean", "median", "p5", "worst")]
            cells = [*psnr, f"{100 * like['near']:.1f} %", f"{like['ssim']['mean']:.4f}"]
            lines.append(_line(f"{like['pictures']} to {like['to']}", cells, widths))
        lines.append("")
    lines[-1] = f"The last rows are the yardstick, of {data['yardstick']['prompts']} prompts."
    return "\n".join(lines)


def _line(name: str, cells: Sequence[object], widths: Sequence[int]) -> str:
    return f"{name:34}" + "".join(str(cell).rjust(w) for cell, w in zip(cells, widths, strict=False))


def decibels(value: float | None) -> str:
    """A PSNR; None is that of equal pictures."""
    return "equal" if value is None else f"{value:.1f}"
