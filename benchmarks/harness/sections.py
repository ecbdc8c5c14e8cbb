"""The sections of Markdown files that results fill: `report.py` writes them, by the name in their comment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness.engine_tables import (
    cold,
    engines_quality,
    engines_speed,
    pictures,
    products,
    text_graph,
    verification,
)
from harness.float_tables import speed, summary
from harness.gpu_tables import ROOFLINE, tile_choices
from harness.quality_tables import quality
from harness.results import files
from harness.run_tables import growth, plans, quantize, series, serving, sidecar
from harness.study_tables import launches, peers, savings, solver, text_features, tokens
from sana_edge.bench.table import Table


def sections(results: Path) -> Iterator[tuple[str, str]]:
    """The name and the Markdown of every section whose files are there."""
    engines = ("bench_engines-step-*", "bench_engines-decode-*")
    made: dict[str, tuple[Callable[..., Table], list[Any]]] = {
        "summary": (summary, [results]),
        "quality": (quality, files(results, "quality")),
        "speed": (speed, [files(results, "bench_image-*")]),
        "growth": (growth, files(results, "bench_growth-*")),
        "series": (series, [found] if (found := files(results, "bench_series-*")) else []),
        "quantize": (quantize, files(results, "bench_quantize")),
        "plan": (plans, files(results, "bench_plan")),
        "verification": (verification, files(results, "verify_export")),
        "engines": (engines_speed, [files(results, *engines)]),
        "pictures": (pictures, files(results, "bench_engines-picture-*")),
        "roofline": (
            lambda made: made[0](made[1]),
            [(table, data) for data in files(results, "roofline") for table in ROOFLINE],
        ),
        "tiles": (tile_choices, files(results, "tiles")),
        "cold": (cold, files(results, "bench_engines-cold")),
        "products": (products, files(results, "bench_products-*")),
        "text-graph": (text_graph, files(results, "bench_text_graph")),
        "engines-quality": (engines_quality, files(results, "quality_engines")),
        "peers": (peers, files(results, "bench_peers-*")),
        "solver": (solver, files(results, "bench_solver")),
        "tokens": (tokens, files(results, "bench_tokens-*")),
        "savings": (savings, files(results, "bench_tokens-*")),
        "launches": (launches, files(results, "bench_launches")),
        "text": (text_features, files(results, "bench_text")),
        "sidecar": (sidecar, files(results, "bench_sidecar")),
        "serving": (serving, files(results, "bench_serve")),
    }
    for name, (table, found) in made.items():
        tables = [made for made in map(table, found) if made.rows]
        if tables:
            yield name, "\n\n".join(table.markdown() for table in tables)
