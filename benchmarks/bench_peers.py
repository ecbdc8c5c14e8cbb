"""This project beside others that draw with the same weights: diffusers, and INT8 by sdnq, torchao and more.

    python benchmarks/bench_peers.py --scratch peers --threads 2
    python benchmarks/bench_peers.py --scratch peers --random-weights 0.6b --layers 4 --size 512 --threads 2

Every contender draws the same picture: weights, noise, prompt, steps, guidance and threads are the same. They
take turns, each in a process of its own, whose first picture warms up. A peer's packages are installed, at
the versions that `works/peers.py` names, into an environment in --scratch that is kept for the next run; one
that does not install or run is named with its reason, and the rest goes on. Columns: seconds of a step, from
the last step to pixels, and of a whole picture with its text; the peak memory of the process; the PSNR to
diffusers in fp32. The model is the bundled one, another folder, or one in full size with random weights, its
layers cut where asked. The JSON is written whenever a process has ended: Ctrl-C loses what is under way.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from harness import needs

needs("torch", "transformers", "diffusers")

import numpy as np
import torch
from PIL import Image

from harness.results import BASELINE, ended, output_for, positive, say, words
from harness.study_tables import peers
from sana_edge.bench.drawers import plan_of
from sana_edge.bench.measure import read_files
from sana_edge.bench.process import run
from sana_edge.bench.results import header, load, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.image_metrics import psnr
from sana_edge.prompt import CHI
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub
from works.peers import PEERS, SCRIPT, Peer, environment, job
from works.pictures import FLOAT, prepare

COLUMNS = ("load", "first", "step", "decode", "picture")
SEED = 7
# seconds of a process: what compiles for longer is of no use to a person either
LIMIT = 3600.0
PROMPT = "a red house left of a yellow star"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    names = options.contenders or list(PEERS)
    for name in names:
        if name not in PEERS:
            raise InvalidInput(f"unknown contender {name!r}", f"choose from {', '.join(PEERS)}")
    options.scratch.mkdir(parents=True, exist_ok=True)
    output = output_for(options, f"bench_peers-{_name(options)}")
    folders = _folders(options, names)
    size = None if options.size is None else (options.size, options.size)
    request = Request(options.prompt, size=size, exact_size=True, steps=options.steps, seed=SEED)
    found = hub.resolve(folders[FLOAT], offline=True)
    plan = plan_of(found.path, request)
    if plan.steps < 2:
        raise InvalidInput("one step has no time of a step after the first", "give --steps 2 or more")
    rows: dict[str, dict[str, Any]] = {name: row(name) for name in names}
    data = {**header("benchmarks/bench_peers.py", given), "load_before": load(), "threads": options.threads}
    data |= {"model": found.name if options.random_weights is None else f"random {options.random_weights}"}
    data |= {"layers": options.layers, "size": plan.width, "steps": plan.steps, "pictures": options.pictures}
    with tempfile.TemporaryDirectory(dir=options.scratch) as place:
        shared = _shared(options, plan, Path(place))
        for turn in range(options.repeat):
            for name in (name for name in names if rows[name]["failure"] is None):
                told = partial(say, f"{turn + 1}/{options.repeat}, {name}")
                try:
                    rows[name]["runs"].append(_drawn(name, folders, options, shared, Path(place), told))
                    rows[name] |= summed(rows[name]["runs"])
                    rows[name] |= compared(name, rows, Path(place))
                    told("a picture in {picture:.2f} s".format(**rows[name]["runs"][-1]))
                except SanaError as error:
                    rows[name]["failure"] = failure(error, (options.scratch.absolute(), Path(place)))
                    told(rows[name]["failure"])
                write_json(output, {**data, "rows": list(rows.values())})
    print(peers({**data, "rows": list(rows.values())}).text())
    print(output)


def row(name: str) -> dict[str, Any]:
    """A contender that has not drawn yet."""
    peer = PEERS[name]
    facts = {"name": name, "packages": list(peer.packages), "failure": None, "versions": None}
    return {**facts, "median": None, "peak": None, "reference": None, "psnr": None, "runs": []}


def summed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a contender's processes: medians of seconds, the most memory, and its versions."""
    medians = {column: statistics.median(run[column] for run in runs) for column in COLUMNS}
    peaks = [run["peak"] for run in runs if run["peak"] is not None]
    return {"median": medians, "peak": max(peaks, default=None), "versions": runs[-1]["versions"]}


def compared(name: str, rows: Mapping[str, Mapping[str, Any]], place: Path) -> dict[str, Any]:
    """The PSNR in dB to diffusers in fp32, where that drew; None where the pictures are equal."""
    if name == BASELINE or not rows.get(BASELINE, {}).get("runs"):
        return {"reference": None, "psnr": None}
    pictures = [np.asarray(Image.open(_picture(place, other)).convert("RGB")) for other in (name, BASELINE)]
    near = psnr(*pictures)
    return {"reference": BASELINE, "psnr": near if math.isfinite(near) else None}


def failure(error: SanaError, folders: Sequence[Path]) -> str:
    """Why a contender did not draw, on one line, without folders of this machine."""
    text = " ".join((error.message.partition(" failed: ")[2] or error.message).split())
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return text if len(text) <= 200 else f"{text[:200]}..."


def _picture(place: Path, name: str) -> Path:
    return place / f"{name.replace(' ', '-')}.png"


def _shared(options: argparse.Namespace, plan: Plan, place: Path) -> dict[str, Any]:
    """What all jobs have in common, the noise as a file: that which this project draws for the seed."""
    cell = plan.width // 32, plan.height // 32
    noise = torch.randn((1, 32, cell[1], cell[0]), generator=torch.Generator().manual_seed(SEED))
    np.save(place / "latents.npy", noise.numpy())
    return {
        "latents": str(place / "latents.npy"),
        "prompt": plan.prompt,
        "instruction": list(CHI),
        "size": [plan.width, plan.height],
        "steps": plan.steps,
        "guidance": plan.guidance,
        "seed": SEED,
        "threads": options.threads,
        "pictures": options.pictures,
    }


def _drawn(
    name: str,
    folders: Mapping[str, str],
    options: argparse.Namespace,
    shared: Mapping[str, Any],
    place: Path,
    told: Any,
) -> dict[str, Any]:
    """What `peer_process` prints, of one process."""
    peer = PEERS[name]
    python = environment(peer.packages, options.scratch, told)
    model = hub.resolve(folders[FLOAT], offline=True) if peer.form == FLOAT else None
    folder = folders[peer.form] if model is None else str(model.path)
    asked = {**shared, "folder": folder, "output": str(_picture(place, name))}
    asked["variant"] = model.component_variant("transformer") if model else None
    if peer.made:
        made = options.scratch.absolute() / "made" / f"{name.replace(' ', '-')}-{_name(options)}"
        if not made.is_dir():
            told("making its folder")
            unfinished = made.with_name(f"{made.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            _process(name, python, peer, {**asked, "make": str(unfinished)}, options.threads)
            unfinished.rename(made)
        asked["made"] = str(made)
    if Path(asked.get("made") or folder).is_dir():
        read_files(Path(asked.get("made") or folder))
    return _process(name, python, peer, asked, options.threads)


def _process(name: str, python: Path, peer: Peer, asked: Mapping[str, Any], threads: int) -> dict[str, Any]:
    # a peer gets no path of this checkout: its kernels/ is the name of another package
    isolated = [] if peer.by == "sana-edge" else ["-I"]
    command = [str(python), *isolated, str(SCRIPT), json.dumps(job(peer, **asked))]
    printed = run(command, name, threads=threads, limit=LIMIT).printed
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _folders(options: argparse.Namespace, names: Sequence[str]) -> dict[str, str]:
    """The model by form: the bundled one's by name, those of random weights made where they are missing."""
    if options.random_weights is None:
        return {FLOAT: options.model, "int8": options.model, "onnx": options.model}
    forms = {PEERS[name].form for name in names} | {FLOAT}
    forms |= {"int8"} if "onnx" in forms else set()
    shapes = options.random_weights
    random = ["--layers", str(options.layers), "--text-layers", "1"] if options.layers else []
    name = f"{shapes}-{options.layers}layers" if options.layers else f"{shapes}-guided"
    told = partial(say, "random weights")
    prepare(options.scratch, shapes, options.threads, told, name=name, random=random, forms=forms)
    return {form: str(options.scratch.absolute() / name / form) for form in forms}


def _name(options: argparse.Namespace) -> str:
    parts = [options.random_weights or hub.resolve(options.model, offline=True).name]
    parts += [f"{options.layers}layers"] if options.layers else []
    parts += [f"{options.size}px"] if options.size else []
    return "-".join(parts)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_peers.py", description="This project beside others.", allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", default="sana-tiny", help="a bundled name, or a folder with its package")
    what.add_argument(
        "--random-weights", choices=sorted(DENOISERS), metavar="SHAPES", help="0.6b, 1.6b, tiny"
    )
    add = parser.add_argument
    add("--scratch", type=Path, required=True, metavar="DIR", help="for environments and models; kept")
    add("--contenders", type=words, metavar="A,B", help=f"only these (default: {','.join(PEERS)})")
    add("--layers", type=positive, metavar="N", help="of the denoiser's, for random weights (default: all)")
    add("--size", type=positive, metavar="PX", help="side of the picture (default: the model's own)")
    add("--steps", type=positive, default=20, metavar="N", help="(default: %(default)s)")
    add("--repeat", type=positive, default=3, metavar="N", help="turns (default: %(default)s)")
    add("--pictures", type=positive, default=2, metavar="N", help="of each process, after one that warms up")
    add("--prompt", default=PROMPT, metavar="TEXT")
    threads = torch.get_num_threads()
    add("--threads", type=positive, default=threads, metavar="N", help="(default: %(default)s)")
    add("--output", type=Path, metavar="PATH", help="the JSON (default: results/bench_peers-*.json)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
