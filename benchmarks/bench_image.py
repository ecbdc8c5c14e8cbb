"""Time and memory of each stage of a picture, beside diffusers with the same weights, dtype and threads.

    python benchmarks/bench_image.py --model sana-tiny
    python benchmarks/bench_image.py --shapes 0.6b --layers 4 --threads 2
    python benchmarks/bench_image.py --shapes 0.6b --stage step --contenders "sana-edge,sana-edge int8"

measures a whole model from its folder, or the networks of the public models in full size with random weights:
here in float and in INT8, and in diffusers. The implementations take turns, and what they return is compared.
Prints a table and writes JSON with every sample.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers")

import torch

from harness.measure import Row, measure, table, with_context
from harness.results import BASELINE, COMPILED, INT8, OURS, ended, output_for, positive, say, sizes, words
from harness.work import Work
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.errors import InvalidInput
from sana_edge.fused import backends
from sana_edge.int8 import matmul
from sana_edge.prompt import MAX_TOKENS
from sana_edge.request.request import Request
from sana_edge.system.atomic import write_bytes
from sana_edge.torch_runtime.device import DTYPES, check_dtype, choose_device
from works.decoder import DecoderWork
from works.denoiser import DenoiserWork
from works.model import ModelWork

CONTENDERS = (OURS, INT8, BASELINE, COMPILED)
NATIVE_SIZE = 1024
TOKENS = 30
# takes as long as a picture: only where it is asked for
ASKED_FOR = ("loop",)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    works = choose(options)
    if {BASELINE, COMPILED} & {*options.contenders}:
        needs("diffusers")
    if options.chart:
        needs("matplotlib")
    output = output_for(options, f"bench_image-{_name(options, works)}")
    data = {
        **header("benchmarks/bench_image.py", given),
        "load_before": load(),
        "repeat": options.repeat,
        # a fallback would be measured too
        "int8_products": matmul.describe(choose_device(options.device).type)[1],
        "int8_backends": {
            dtype: backends.choose("auto", choose_device(options.device), dtype, True).name
            for dtype in options.dtype
        },
    }
    results: dict[str, list[Row]] = {}
    for work, stages in works.items():

        def written(rows: list[Row], work: Work = work) -> None:
            results[work.title] = rows
            write_json(
                output, {**data, "works": [_facts(work, results) for work in works if work.title in results]}
            )

        memory = not options.no_memory
        rows = measure(
            work, stages, options.repeat, partial(say, work.title), options.contenders, written, memory
        )
        rows += with_context(rows, options.steps)
        written(rows)
        layers = work.layers if isinstance(work, DenoiserWork) else None
        print(work.title, table(rows, layers), "", sep="\n", flush=True)
    if options.chart:
        write_bytes(output.with_suffix(".png"), chart(results))


def _facts(work: Work, results: dict[str, list[Row]]) -> dict[str, Any]:
    """What was measured of a work, so far."""
    return {"title": work.title, **work.facts, "rows": [row.facts() for row in results[work.title]]}


def choose(options: argparse.Namespace) -> dict[Work, tuple[str, ...]]:
    """The works and their stages that the options ask for.

    Raises: SanaError for options that cannot be served, before anything heavy is loaded.
    """
    device = choose_device(options.device)
    # compiling takes a CPU minutes
    options.contenders = options.contenders or [
        name for name in CONTENDERS if name != COMPILED or device.type == "cuda"
    ]
    for name in options.contenders:
        if name not in CONTENDERS:
            raise InvalidInput(f"unknown contender {name!r}", f"choose from {', '.join(CONTENDERS)}")
    if options.chart and BASELINE not in options.contenders:
        raise InvalidInput(f"--chart shows ratios to {BASELINE}", "leave it among the contenders")
    works: list[Work] = []
    for dtype in options.dtype:
        if dtype not in DTYPES:
            raise InvalidInput(f"unknown dtype {dtype!r}", f"choose {', '.join(DTYPES)}")
        check_dtype(dtype, device)
        common = {"dtype": dtype, "device": device.type, "threads": options.threads}
        works += [_model_work(options, common)] if options.model else _shapes_works(options, common)
    known = tuple(dict.fromkeys(stage for work in works for stage in work.stages))
    wanted = options.stage or tuple(stage for stage in known if stage not in ASKED_FOR)
    for stage in wanted:
        if stage not in known:
            raise InvalidInput(f"unknown stage {stage!r}", f"choose from {', '.join(known)}")
    chosen = {work: tuple(stage for stage in work.stages if stage in wanted) for work in works}
    return {work: stages for work, stages in chosen.items() if stages}


def _model_work(options: argparse.Namespace, common: dict[str, Any]) -> Work:
    for name in ("layers", "decode_size", "tokens", "tiled"):
        if getattr(options, name):
            raise InvalidInput(f"--{name.replace('_', '-')} does not go with --model", "it is for --shapes")
    work = ModelWork(
        model=options.model, prompt=options.prompt, size=options.size, steps=options.steps, **common
    )
    work.plan()
    return work


def _shapes_works(options: argparse.Namespace, common: dict[str, Any]) -> list[Work]:
    layers, size = options.layers or DENOISERS[options.shapes].num_layers, options.size or NATIVE_SIZE
    tokens = options.tokens or TOKENS
    decoded = options.decode_size or [size]
    if layers > DENOISERS[options.shapes].num_layers:
        most = DENOISERS[options.shapes].num_layers
        raise InvalidInput(f"{layers} layers are more than {options.shapes} has", f"choose up to {most}")
    if tokens > MAX_TOKENS:
        raise InvalidInput(f"{tokens} tokens are more than a prompt has", f"choose up to {MAX_TOKENS}")
    for side in (size, *decoded):
        Request("a size that is checked", size=(side, side), exact_size=True, steps=options.steps)
    shapes = {"shapes": options.shapes, **common}
    denoiser = DenoiserWork(layers=layers, size=size, tokens=tokens, steps=options.steps, **shapes)
    return [denoiser, *(DecoderWork(size=side, tiled=options.tiled, **shapes) for side in decoded)]


def _name(options: argparse.Namespace, works: Iterable[Work]) -> str:
    """What was measured, for the name of the file."""
    names = [work.name for work in works if isinstance(work, ModelWork)]
    parts = names[:1] or [options.shapes]
    parts += [f"{options.layers}layers"] if options.layers else []
    parts += [f"{options.size}px"] if options.size else []
    parts += options.stage or []
    if set(options.contenders) | {COMPILED} != set(CONTENDERS):
        parts += [name.replace(" ", "-") for name in options.contenders]
    parts += ["cuda" for work in works if work.device == "cuda"][:1]
    return "-".join(parts)


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


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_image.py", description="Time a picture's stages.", allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="a bundled name, or a folder in diffusers layout")
    what.add_argument("--shapes", choices=DENOISERS, help="full-size networks with random weights")
    add = parser.add_argument
    add("--dtype", type=words, default=["fp32", "bf16"], metavar="A,B", help="(default: fp32,bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    threads = torch.get_num_threads()
    add(
        "--contenders",
        type=words,
        metavar="A,B",
        help=f"only these (default: {','.join(CONTENDERS)}, the last on a GPU only)",
    )
    add("--threads", type=positive, default=threads, metavar="N", help="of torch (default: %(default)s)")
    add(
        "--repeat",
        type=positive,
        default=5,
        metavar="N",
        help="samples of each stage (default: %(default)s)",
    )
    add(
        "--stage",
        type=words,
        metavar="A,B",
        help="only these: text-first, text, context, step, decode, picture",
    )
    add("--size", type=positive, metavar="PX", help="side of the picture (default: the model's own, or 1024)")
    add("--steps", type=positive, default=20, metavar="N", help="of the schedule (default: %(default)s)")
    add("--prompt", default="a red house left of a yellow star", metavar="TEXT", help="for --model")
    add("--layers", type=positive, metavar="N", help="of the denoiser's, for --shapes (default: all)")
    add("--tokens", type=positive, metavar="N", help=f"of the prompt, for --shapes (default: {TOKENS})")
    add("--decode-size", type=sizes, metavar="PX,PX", help="for --shapes, where it is not --size")
    add("--tiled", action="store_true", help="let diffusers decode in its tiles, for --shapes")
    add("--no-memory", action="store_true", help="only times: memory takes loading everything again")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_image-*.json)")
    add("--chart", action="store_true", help="write a PNG beside it")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
