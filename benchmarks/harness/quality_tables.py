"""Tables of what INT8 costs in quality."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from sana_edge.bench.table import Table, circumstances, interval

Numbers = Mapping[str, Any]


def quality(data: Numbers) -> Table:
    """One row for each category, of both models where two ran; with the judge's ceiling and the control."""
    name, *_ = data["models"]
    compared, best = data.get("paired"), data["ceiling"]
    controls = (*(("judge's ceiling",) if best else ()), "shuffled prompts")
    if compared:
        models = [data["models"][compared[key]] for key in ("float", "int8")]
        titles = ("prompts", "float", "95 % interval", "INT8", "95 % interval")
        table = Table(("category", *titles, "right only as float", "only as INT8", *controls))
    else:
        models = list(data["models"].values())
        table = Table(("category", "prompts", "score", "95 % interval", *controls))
    for (title, first), *others in zip(*map(_with_overall, models), strict=True):
        scores = [
            cell for c in (first, *(o for _, o in others)) for cell in (f"{c['score']:.3f}", interval(c))
        ]
        counts = compared["categories"].get(title, compared) if compared else {}
        only = [counts["only_float"], counts["only_int8"]] if compared else []
        top = [f"{best['categories'].get(title, best['overall']):.3f}"] if best else []
        table.add(title, first["n"], *scores, *only, *top, f"{first['shuffled']:.3f}")
    settings = data["settings"]
    note = f"{name}, {settings['steps']} steps, guidance {settings['guidance']}. {circumstances(data)}"
    table.notes = [*(_verdict(compared) if compared else []), note]
    return table


def _with_overall(numbers: Numbers) -> list[tuple[str, dict[str, Any]]]:
    """A model's categories, and the overall score with the mean of their controls."""
    control = statistics.fmean(c["shuffled"] for c in numbers["categories"].values())
    return [*numbers["categories"].items(), ("**overall**", {**numbers["overall"], "shuffled": control})]


def _verdict(compared: Numbers) -> list[str]:
    """How the scores of two models differ, and how near their pictures are."""
    points, *ends = (100 * share for share in (compared["difference"], *compared["interval_95"]))
    psnr, ssim = compared["psnr"], compared["ssim"]
    return [
        f"INT8 less float: {points:+.1f} points, 95 % interval {ends[0]:+.1f} to {ends[1]:+.1f}.",
        f"{compared['only_float']} prompts right only as float, {compared['only_int8']} only as INT8: "
        f"p {compared['mcnemar_p']:.2g} (exact McNemar test).",
        f"PSNR of INT8 to float pictures: {_spread(psnr, ' dB')}.",
        f'The worst of them: "{psnr["worst_prompt"]}".',
        f"SSIM of INT8 to float pictures: {_spread(ssim, '')}.",
    ]


def _spread(spread: Numbers, unit: str) -> str:
    values = {word: spread[word] for word in ("mean", "median", "worst")}
    return ", ".join(
        f"{w} {'infinite' if value is None else f'{value}{unit}'}" for w, value in values.items()
    )
