"""Time and memory of engines without torch: a step, the decoder, whole pictures, and one from a cold process.

    python benchmarks/bench_engines.py --stage step --shapes 0.6b --threads 2
    python benchmarks/bench_engines.py --stage decode --sizes 512,1024 --threads 2
    python benchmarks/bench_engines.py --stage picture --scratch sprint --repeat 1 --threads 2
    python benchmarks/bench_engines.py --stage cold --exported onnx-fp32,onnx-int8 --threads 2

Beside ours in onnxruntime and OpenVINO, in float and INT8, stand diffusers in fp32 and bf16, our INT8 in
torch, and the graph that torch's exporter and nncf's post-training quantization make of diffusers. All take
turns; what they return is compared. Networks have the full size and random weights; INT8 has static scales,
from one run. The JSON is written whenever something has been measured: Ctrl-C loses only what is under way.

A whole picture has 2 steps of a Sprint model, text encoder included, and each contender a process of its
own. The model's folders stay in --scratch, 16 GB for the 0.6B, and are made where they are missing, by

    python benchmarks/random_model.py sprint/0.6b/float --shapes 0.6b --sprint
    python benchmarks/random_model.py sprint/0.6b/int8 --package-of sprint/0.6b/float
    sana-edge export sprint/0.6b/int8 --int8 --no-verify --output sprint/0.6b/onnx

each whole or not at all. What a smaller decoder saves of such a picture, the model being the same:

    python benchmarks/bench_engines.py --stage picture --scratch sprint --repeat 3 --threads 2 --contenders \\
        "openvino int8,openvino int8 dc-ae-lite,openvino int8 taesana"
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "onnx")

import torch

from harness import engine_tables
from harness.measure import Row, measure, ratios_to, table
from harness.results import REFERENCES, ended, output_for, positive, say, sizes, words
from sana_edge.bench.machine import versions
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.engines.tiles import DEFAULT_TILE
from sana_edge.errors import InvalidInput
from works.decoder import DecoderWork
from works.denoiser import DenoiserWork
from works.engines import CONTENDERS, NAIVES, EngineWork, check_installed
from works.pictures import WAYS, measure_cold, measure_pictures

STAGES = ("step", "decode", "picture", "cold")
# what the naive decoder needs beyond is not to be had: 42 GB in one piece for 1024 px
NAIVE_SIDE = 512
PACKAGES = ("onnx", "onnxruntime", "openvino", "nncf", "onnxscript", "diffusers", "torch")
TOKENS = 30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    known = tuple(WAYS) if options.stage == "picture" else CONTENDERS
    options.contenders = options.contenders or tuple(
        name for name in known if name not in WAYS or not WAYS[name].decoder
    )
    for name in options.contenders:
        if name not in known:
            raise InvalidInput(f"unknown contender {name!r}", f"choose from {', '.join(known)}")
    if options.stage == "cold" and not options.exported:
        raise InvalidInput("no exported folders", "give --exported; `sana-edge export` makes them")
    if options.stage == "picture" and options.scratch is None:
        raise InvalidInput("no folder for whole models", "give --scratch, with room for them")
    asked = _works(options) if options.stage in ("step", "decode") else []
    if options.stage != "cold":
        check_installed(options.contenders)
    output = output_for(options, f"bench_engines-{_name(options)}")
    data = {
        **header("benchmarks/bench_engines.py", given),
        "packages": {name: found for name, found in versions(*PACKAGES).items() if found},
        "load_before": load(),
        "repeat": options.repeat,
        "threads": options.threads,
    }

    def keep(found: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**data, **found}
        write_json(output, whole)
        return whole

    if options.stage == "cold":
        print(engine_tables.cold(keep({"cold": measure_cold(options, partial(say, "cold"))})).text())
    elif options.stage == "picture":
        found = measure_pictures(options, partial(say, "picture"), lambda found: keep({"picture": found}))
        print(engine_tables.pictures({**data, "picture": found}).text())
    else:
        works: list[dict[str, Any]] = []
        for work in asked:
            works.append(_measured(work, options, lambda facts: keep({"works": [*works, facts]})))


def _works(options: argparse.Namespace) -> list[DenoiserWork | DecoderWork]:
    common = {"dtype": "fp32", "device": "cpu", "threads": options.threads, "shapes": options.shapes}
    most = DENOISERS[options.shapes].num_layers
    layers = options.layers or most
    if layers > most:
        raise InvalidInput(f"{layers} layers are more than {options.shapes} has", f"choose up to {most}")
    if options.stage == "decode":
        largest = max(options.sizes)
        if largest > DEFAULT_TILE:
            raise InvalidInput(
                f"size {largest} is decoded in strips, not by the graph that is timed here",
                f"choose sizes up to {DEFAULT_TILE}",
            )
        return [DecoderWork(size=size, tiled=False, **common) for size in options.sizes]
    return [
        DenoiserWork(layers=layers, size=size, tokens=TOKENS, steps=20, **common) for size in options.sizes
    ]


def _measured(
    work: DenoiserWork | DecoderWork, options: argparse.Namespace, keep: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """The JSON of a work. ``keep`` is given it twice: before and after memory is measured."""
    names = list(options.contenders)
    if isinstance(work, DecoderWork) and work.size > NAIVE_SIDE:
        names = [name for name in names if name not in NAIVES]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        wrapped = EngineWork(
            dtype="fp32", device="cpu", threads=options.threads, work=work, folder=f"{folder}/graphs"
        )
        told = partial(say, wrapped.title)
        told("making graphs")
        wrapped.prepare(names)
        rows = measure(
            wrapped, wrapped.stages, options.repeat, told, names, lambda rows: keep(_facts(wrapped, rows))
        )
    facts = _facts(wrapped, rows)
    keep(facts)
    print(wrapped.title, table(rows), "", sep="\n", flush=True)
    for reference, found in facts["ratios"].items():
        if found:
            shown = ", ".join(f"{name} {value['median']:.3f}" for name, value in found.items())
            print(f"times of {reference}: {shown}", flush=True)
    return facts


def _facts(work: EngineWork, rows: Sequence[Row]) -> dict[str, Any]:
    ratios = {reference: ratios_to(rows, reference) for reference in REFERENCES}
    return {"title": work.title, **work.facts, "rows": [row.facts() for row in rows], "ratios": ratios}


def _name(options: argparse.Namespace) -> str:
    if options.stage == "cold":
        return "cold"
    parts = [options.stage, options.shapes]
    parts += [f"{options.layers}layers"] if options.layers else []
    # beside the file of all contenders
    decoders = any(WAYS[name].decoder for name in options.contenders if name in WAYS)
    parts += ["decoders"] if options.stage == "picture" and decoders else []
    return "-".join([*parts, *(f"{size}px" for size in options.sizes)])


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_engines.py", description="Time engines without torch.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--shapes", choices=DENOISERS, default="0.6b", help="(default: %(default)s)")
    add("--sizes", type=sizes, default=[1024], metavar="PX,PX", help="sides of pictures (default: 1024)")
    add("--layers", type=positive, metavar="N", help="of the denoiser's (default: all)")
    add(
        "--contenders",
        type=words,
        metavar="A,B",
        help=f"only these (default: {','.join(CONTENDERS)}; of pictures {','.join(WAYS)})",
    )
    threads = torch.get_num_threads()
    add("--threads", type=positive, default=threads, metavar="N", help="(default: %(default)s)")
    add("--repeat", type=positive, default=5, metavar="N", help="samples (default: %(default)s)")
    add("--exported", type=words, metavar="A,B", help="folders, for --stage cold")
    add("--model", default="sana-tiny", help="beside them in torch, for cold (default: %(default)s)")
    add("--steps", type=positive, default=20, metavar="N", help="for cold (default: %(default)s)")
    add("--scratch", type=Path, metavar="DIR", help="for graphs (default: the system's), and models")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_engines-*.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
