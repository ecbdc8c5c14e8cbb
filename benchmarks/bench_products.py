"""How near the INT8 products of a graph come to this CPU's peak, timed one by one by OpenVINO.

    python benchmarks/bench_products.py --stage step --shapes 0.6b --layers 4 --threads 2
    python benchmarks/bench_products.py --stage decode --shapes 0.6b --size 1024 --threads 2

The peak is measured in the same turns: products of square INT8 matrices by torch and by OpenVINO, the fastest
of which counts. A product has two operations for each multiply-add. Networks have random weights; a step is
that of a guided prediction; --by "openvino int8" has its floats in fp32, for CPUs that multiply no bf16.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "onnx", "openvino")

import torch

from harness.engine_tables import products as shown
from harness.results import ended, output_for, positive, say
from sana_edge.bench.machine import versions
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS
from works.decoder import DecoderWork
from works.denoiser import DenoiserWork
from works.engines import EngineWork, engine_stage
from works.products import INT8, Product, Timer, openvino_peak, products, profiled, request_of, torch_peak

SIDE = 4096
TOKENS = 30
CONTENDERS = ("openvino int8 bf16", "openvino int8")
PACKAGES = ("torch", "openvino")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    torch.set_num_threads(options.threads)
    work = _work(options)
    layers = f"-{options.layers}layers" if options.layers and options.stage == "step" else ""
    output = output_for(options, f"bench_products-{options.stage}-{options.shapes}{layers}-{options.size}px")
    data = {
        **header("benchmarks/bench_products.py", given),
        "packages": {name: found for name, found in versions(*PACKAGES).items() if found},
        "load_before": load(),
        "threads": options.threads,
        "by": options.by,
    }
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        common = {"dtype": "fp32", "device": "cpu", "threads": options.threads}
        wrapped = EngineWork(work=work, folder=f"{folder}/graphs", **common)
        say(wrapped.title, "making its graph")
        wrapped.prepare([options.by])
        engine, call = engine_stage(wrapped, options.by)
        timed = profiled(engine)
        call()
        found, timer = products(timed), Timer()
        timer.last(request_of(timed))
        peaks = {"torch": torch_peak(options.side), "openvino": openvino_peak(options.side, options.threads)}
        turns = []
        for turn in range(options.repeat + 1):
            rates = {}
            for name, peak in peaks.items():
                rates[name] = 2 * options.side**3 / peak()
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            each = timer.last(request_of(timed))
            # the first turn makes workspaces
            if turn:
                turns.append({"peaks": rates, "whole": whole, "seconds": each})
                say(wrapped.title, f"{turn}/{options.repeat}, {whole:.3g} s")
    data |= {"side": options.side, "work": {"title": wrapped.title, **wrapped.facts, **summed(found, turns)}}
    write_json(output, data)
    print(shown(data).text(), output, sep="\n\n")


def summed(found: Sequence[Product], turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates in operations a second, and shares of the turn's peak, by place in a layer and of all.

    Medians over turns. "share": of the peak.
    """
    peaks = [max(turn["peaks"].values()) for turn in turns]
    groups: dict[str, list[Product]] = {}
    for product in found:
        if product.precision in INT8:
            groups.setdefault(place(product.name), []).append(product)
    rows = []
    for name, members in {**groups, "all": [p for group in groups.values() for p in group]}.items():
        operations = sum(product.operations for product in members)
        taken = [sum(turn["seconds"][product.name] for product in members) for turn in turns]
        rates = [operations / spent for spent in taken]
        rows.append(
            {
                "name": name,
                # of one size, or of many
                "shape": members[0].shape if len({product.shape for product in members}) == 1 else None,
                "products": len(members),
                "operations": operations,
                "seconds": statistics.median(taken),
                "rate": statistics.median(rates),
                "share": statistics.median(rate / peak for rate, peak in zip(rates, peaks, strict=True)),
            }
        )
    whole = statistics.median(turn["whole"] for turn in turns)
    other = sum(product.operations for product in found if product.precision not in INT8)
    by = {name: statistics.median(turn["peaks"][name] for turn in turns) for name in turns[0]["peaks"]}
    return {"rows": rows, "peaks": by, "seconds": whole, "operations_in_float": other}


def place(name: str) -> str:
    """A product's name without the number of its layer, and without what was fused into it."""
    return re.sub(r"\.\d+", "", name.partition("/MatMul")[0].partition("/Conv")[0])


def _work(options: argparse.Namespace) -> DenoiserWork | DecoderWork:
    common: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "threads": options.threads}
    common |= {"shapes": options.shapes, "size": options.size}
    if options.stage == "decode":
        return DecoderWork(tiled=False, **common)
    layers = options.layers or DENOISERS[options.shapes].num_layers
    return DenoiserWork(layers=layers, tokens=TOKENS, steps=20, **common)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_products.py", description="INT8 products beside this CPU's peak.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--stage", choices=("step", "decode"), default="step", help="(default: %(default)s)")
    add("--shapes", choices=sorted(DENOISERS), default="0.6b", help="(default: %(default)s)")
    add("--by", choices=CONTENDERS, default=CONTENDERS[0], help="(default: %(default)s)")
    add("--layers", type=positive, metavar="N", help="of the denoiser's (default: all)")
    add("--size", type=positive, default=1024, metavar="PX", help="side of pictures (default: %(default)s)")
    add(
        "--side",
        type=positive,
        default=SIDE,
        metavar="N",
        help="of the peak's (default: %(default)s)",
    )
    add("--repeat", type=positive, default=7, metavar="N", help="turns (default: %(default)s)")
    add("--threads", type=positive, default=torch.get_num_threads(), metavar="N")
    add("--scratch", type=Path, metavar="DIR", help="where the graph lies meanwhile (default: the system's)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_products-*.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
