"""How near engines come to torch with the same INT8 model: scores and pictures of the held-out prompts.

    sana-edge export sana-tiny --int8 --output onnx-int8
    python benchmarks/quality_engines.py --exported onnx-int8 --engines onnxruntime,openvino,openvino:fp32

draws each prompt of `quality.py` from the same seed in torch and through every engine, prints a table, and
writes all as JSON with every verdict, and a PNG of pairs. Graphs have calibrated scales of whole tensors
where torch has one for each token, but in Mix-FFN's last layer. So torch draws also with the graphs' scales:
an engine's distance from that is its own, and the rest of the way comes from the scales. The yardstick is how
far rounding takes torch from itself: bf16 beside fp32, of the first prompts. Interrupted, the same command
goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import RESULTS, needs

needs("torch", "transformers", "onnx", "onnxruntime", "tqdm")

from harness import engine_tables
from harness.results import Diary, ended, positive, words
from judge.evaluation import (
    PICTURES,
    WORST,
    Outcomes,
    Pair,
    Source,
    add_options,
    asking,
    code,
    evaluate,
    likenesses,
    made,
    making,
    on_sheet,
    pairs_on_sheet,
    recorded,
    world,
    worst,
)
from sana_edge.bench.results import digest, header, write_json
from sana_edge.engines import choose as engines
from sana_edge.engines.engine import Settings
from sana_edge.errors import InvalidInput
from sana_edge.evaluate import paired
from sana_edge.evaluate.judge.scores import summary
from sana_edge.evaluate.sheet import AMPLIFIED, PairRow, pair_sheet
from sana_edge.store import manifest
from sana_edge.system.atomic import write_bytes

if TYPE_CHECKING:
    from sana_edge import Sana
    from sana_edge.store.hub import ResolvedModel

WORLD = world("art")
TORCH, STATIC = "torch", "torch static"
"""INT8 in torch: as it is, with activation scales per token, and with those of the graphs."""
YARDSTICK = "yardstick"
YARDSTICKS: dict[str, dict[str, Any]] = {
    "float": {},
    "float bf16": {"dtype": "bf16"},
    TORCH: {"int8": True},
    f"{TORCH} bf16": {"int8": True, "dtype": "bf16"},
    STATIC: {"int8": True, "static": True},
    f"{STATIC} bf16": {"int8": True, "static": True, "dtype": "bf16"},
}
"""What torch draws for it; in INT8 the dtype is that of the rest."""
PAIRS = 2
"""Pairs in each row of the PNG, before the worst."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given), "interrupted: the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    if any(name.startswith("openvino") for name in options.engines):
        needs("openvino")
    with _threads(options.threads):
        model = _source(options)
        how = {name: getattr(options, name) for name in ("steps", "guidance", "seed")}
        files = [path for folder in (model.path, options.exported) for path in folder.rglob("*")]
        run = {
            "sources": [model.name, *options.engines, digest(files)],
            "benchmark": code(),
            **{name: getattr(options, name) for name in ("limit", "yardstick", "threads")},
            **how,
        }
        engine = {name: partial(_engine, options.exported, name) for name in options.engines}
        torch = {name: partial(_torch, options, **settings) for name, settings in YARDSTICKS.items()}
        with Diary(options.output, run) as diary:
            with _asking({TORCH: torch[TORCH], STATIC: torch[STATIC], **engine}, how) as sources:
                outcomes = evaluate(
                    WORLD, PICTURES, sources, WORLD.choose(options.limit), diary, _pairs(sources)
                )
            few = WORLD.choose(min(options.yardstick, options.limit or options.yardstick))
            with _asking(torch, how) as sources:
                evaluate(WORLD, YARDSTICK, sources, few, diary, _yardstick_pairs())
            report(options, given, diary, outcomes)
            diary.finish()


def report(options: argparse.Namespace, given: Sequence[str], diary: Diary, outcomes: Outcomes) -> None:
    """Prints the tables; writes the JSON and the PNG of pairs."""
    found = {name: list(of.values()) for name, of in outcomes.items()}
    models = {name: {**summary(of), **making(diary, name)} for name, of in found.items()}
    for name in options.engines:
        models[name]["engine"] = _title(options.exported, name)
    for numbers in models.values():
        # those of each prompt stand together in "results"
        del numbers["results"]
    first = made(diary, TORCH)[0]
    settings = {name: first[name] for name in ("model", "size", "steps", "guidance", "sampler")}
    alike = [_alike(diary, pair) for pair in _pairs(outcomes)]
    data = {
        **header("benchmarks/quality_engines.py", given),
        "settings": {**settings, "seed": options.seed, "threads": options.threads},
        "models": models,
        "to_torch": {
            name: paired.facts(found[TORCH], of, ("torch", "engine"))
            for name, of in found.items()
            if name != TORCH
        },
        "likeness": alike,
        "yardstick": {
            "prompts": len(recorded(diary, YARDSTICK)),
            "likeness": [_alike(diary, pair, YARDSTICK) for pair in _yardstick_pairs()],
        },
        "results": _results(diary, outcomes),
    }
    title = f"{settings['model']}: torch, engine, and their difference x {AMPLIFIED}"
    note = f"{len(found[TORCH])} held-out prompts, {settings['steps']} steps, guidance {settings['guidance']}"
    write_bytes(options.sheet, pair_sheet(title, note, _rows(diary, outcomes, alike)))
    write_json(options.output, data)
    print(engine_tables.engines_quality(data).text())


def _pairs(names: Iterable[str]) -> list[Pair]:
    """What is compared: everything with torch as it is, and engines with their own scales in torch."""
    others = [name for name in names if name != TORCH]
    return [(name, TORCH) for name in others] + [(name, STATIC) for name in others if name != STATIC]


def _yardstick_pairs() -> list[Pair]:
    """Each bf16 with its fp32."""
    return [(name, name.removesuffix(" bf16")) for name in YARDSTICKS if name.endswith(" bf16")]


def _alike(diary: Diary, pair: Pair, run: str = PICTURES) -> dict[str, Any]:
    """What the JSON says of a pair of sources."""
    found = {WORLD.prompts()[number].text: like for number, like in likenesses(diary, pair, run).items()}
    return {"pictures": pair[0], "to": pair[1], **paired.likeness_spread(found)}


def _results(diary: Diary, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Each prompt with what is wrong in which picture, and how near the pictures are, in dB."""
    alike = {pair: likenesses(diary, pair) for pair in _pairs(outcomes)}
    return [
        {
            "prompt": outcome.prompt.text,
            "category": outcome.prompt.category,
            "faults": {name: of[number].fault for name, of in outcomes.items() if of[number].fault},
            "psnr": {
                " to ".join(pair): paired.finite(found[number].psnr, 2) for pair, found in alike.items()
            },
        }
        for number, outcome in outcomes[TORCH].items()
    ]


def _rows(diary: Diary, outcomes: Outcomes, alike: Sequence[Mapping[str, Any]]) -> list[PairRow]:
    """The PNG, of torch beside each other source: the same prompts, whatever the verdict, and the worst."""
    rows = []
    chosen = {number: outcome.prompt for number, outcome in outcomes[TORCH].items()}
    same = sorted(on_sheet(chosen, 1))[: 2 * PAIRS : 2]
    for name, spread in ((like["pictures"], like["psnr"]) for like in alike if like["to"] == TORCH):
        found = likenesses(diary, (name, TORCH))
        shown = pairs_on_sheet(diary, outcomes, (name, TORCH), [*same, *worst(found)])
        remark = "median {median} dB, 5 % below {p5} dB".format(**spread)
        rows.append(PairRow(f"{TORCH} and {name}", f"{remark}; the last {WORST} are the worst", shown))
    return rows


def _source(options: argparse.Namespace) -> ResolvedModel:
    """The INT8 package in torch, which the folder has to be an export of."""
    from sana_edge.export.source import describe
    from sana_edge.store import hub

    exported, model = manifest.read(options.exported), hub.resolve(options.model, int8=True)
    if exported.source.checksums != describe(model, int8=True).checksums():
        raise InvalidInput(
            f"{options.exported} was not exported from {model.name}",
            f"`sana-edge export {options.model} --int8 --output DIR` makes a folder that is",
        )
    return model


def _torch(
    options: argparse.Namespace, *, int8: bool = False, static: bool = False, dtype: str = "auto"
) -> Sana:
    """The model in torch; static: with the activation scales that graphs have."""
    import torch

    from sana_edge import Sana
    from sana_edge.nets.quantize import set_graph_activations
    from sana_edge.store import hub
    from sana_edge.torch_runtime.runtime import TorchRuntime

    torch.set_num_threads(options.threads)
    found = hub.resolve(options.model, int8=int8)
    runtime = TorchRuntime.load(found, device=torch.device("cpu"), dtype=dtype, int8=int8)
    if static:
        set_graph_activations(runtime.denoiser)
        runtime = replace(runtime, quantization=manifest.read(options.exported).quantization)
    return Sana(runtime)


def _engine(folder: Path, name: str) -> Sana:
    """An engine by its name, and behind a colon its precision."""
    from sana_edge import Sana

    backend, _, dtype = name.partition(":")
    how = {"backend": backend, "dtype": dtype or "auto", "device": "cpu"}
    return Sana.load(str(folder), int8=True, prompt_cache=False, **how)


def _title(folder: Path, name: str) -> str:
    """What the engine is: its version, device, precision and threads."""
    backend, _, dtype = name.partition(":")
    return engines.choose(backend, "cpu", folder, Settings(precision=dtype or "auto")).title


@contextmanager
def _asking(loads: Mapping[str, Callable[[], Sana]], how: Mapping[str, Any]) -> Iterator[dict[str, Source]]:
    """The sources that ask what is loaded, all at once in memory."""
    with ExitStack() as stack:
        yield {name: asking(stack.enter_context(load()), **how) for name, load in loads.items()}


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Engines take the number from here."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ[name] = str(count)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality_engines.py", description="Score engines beside torch.")
    add = parser.add_argument
    add("--exported", type=Path, required=True, metavar="DIR", help="what `sana-edge export --int8` made")
    add("--model", default="sana-tiny", help="what it was made from (default: %(default)s)")
    add(
        "--engines",
        type=words,
        default=["onnxruntime", "openvino", "openvino:fp32"],
        metavar="NAMES",
        help="with a precision if not their own (default: onnxruntime,openvino,openvino:fp32)",
    )
    add("--yardstick", type=positive, default=10, metavar="N", help="of them for the yardstick (default: 10)")
    for name, ending, what in (("--output", "json", "numbers"), ("--sheet", "png", "pairs")):
        place = RESULTS / f"quality_engines.{ending}"
        add(name, type=Path, default=place, metavar="PATH", help=f"of the {what} (default: results/)")
    add_options(parser, "torch and engines")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
