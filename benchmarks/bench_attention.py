"""How far linear attention's read in CUDA is from exact, in a block of a public model, on the emulator.

    python csrc/compile.py --emulated 890 --output build/emulated/libsana_edge.so
    python benchmarks/bench_attention.py build/emulated/libsana_edge.so --shapes 0.6b --before old.json

q, k and v of a picture's tokens are drawn from N(0, 1). Exact is the read in fp64 of what was rounded; the
kernel's INT8 rows are compared with it, and with the INT8 rows of it rounded to the type. ``--before`` takes
the rows of another run, such as that of an older commit's library, into the file as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS, needs

needs("torch")

import torch

from harness.results import ended, positive
from sana_edge.bench.results import header, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.bench.table import Table
from sana_edge.int8.quant import relative_error
from sana_edge.kernels import reference, reference_fused
from sana_edge.kernels.cuda import launch, library

EPS = 1e-15
TITLES = ("shapes", "tokens", "type", "error", "INT8 alone", "other levels", "before")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    return ended(lambda: _run(_options(given), given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    os.environ[library.VARIABLE] = str(options.library)
    types = (torch.float16, torch.bfloat16)
    rows = [measured(options.shapes, options.tokens, dtype) for dtype in types]
    data = {**header("benchmarks/bench_attention.py", given), "rows": rows}
    if options.before:
        earlier = json.loads(options.before.read_text(encoding="utf-8"))
        data["before"] = {key: earlier[key] for key in ("commit", "rows")}
    write_json(options.output, data)
    print(_table(data).text())


def measured(shapes: str, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """One picture's read: errors relative in L2, and the share of levels that are not the exact ones."""
    generator = torch.Generator().manual_seed(0)
    heads = DENOISERS[shapes].num_attention_heads
    q, k, v = torch.randn(3, 1, tokens, 32 * heads, generator=generator).to(dtype)
    state = reference_fused.linear_attention_state(k, v, heads)
    values, scales = launch.linear_attention_finish(q, state, EPS)
    q64, k64, v64 = (t.double().unflatten(-1, (heads, 32)).transpose(1, 2) for t in (q.relu(), k.relu(), v))
    exact = (q64 @ (k64.mT @ v64)) / (q64 @ k64.sum(2, keepdim=True).mT + EPS)
    exact = exact.transpose(1, 2).flatten(2)
    wanted, wanted_scales = reference.quantize_rows(exact.to(dtype))
    return {
        "shapes": shapes,
        "tokens": tokens,
        "type": str(dtype).removeprefix("torch."),
        "error": relative_error(values * scales.unsqueeze(-1), exact.float()),
        "int8_error": relative_error(wanted * wanted_scales.unsqueeze(-1), exact.float()),
        "other_levels": float((values != wanted).double().mean()),
        "other_scales": float((scales != wanted_scales).double().mean()),
    }


def _table(data: dict[str, Any]) -> Table:
    table = Table(TITLES)
    earlier = {row["type"]: row["other_levels"] for row in data.get("before", {}).get("rows", [])}
    for row in data["rows"]:
        before = earlier.get(row["type"])
        table.rows.append(
            [
                *(row["shapes"], str(row["tokens"]), row["type"]),
                *(f"{row[name]:.4%}" for name in ("error", "int8_error", "other_levels")),
                "" if before is None else f"{before:.4%}",
            ]
        )
    return table


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_attention.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("library", type=Path, help="the emulated library, which csrc/compile.py makes")
    add("--shapes", choices=list(DENOISERS), default="0.6b", help="whose heads (default: %(default)s)")
    add("--tokens", type=positive, default=1024, help="of the picture (default: %(default)s, 1024 px)")
    add("--before", type=Path, metavar="FILE", help="results of another library")
    add("--output", type=Path, default=RESULTS / "bench_attention.json", help="(default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
