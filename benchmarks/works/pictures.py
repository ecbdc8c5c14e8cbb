"""Seconds and memory of pictures from the start of a process: a whole Sprint model, and a cold command line.

The Sprint model's folders, random weights in float, an INT8 package and INT8 graphs, are each made by a
command that writes it whole or not at all: a run that was interrupted goes on with the first that is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness import ROOT
from harness.results import BASELINE, HALF, INT8, Say
from sana_edge.bench.measure import read_files
from sana_edge.bench.process import run
from sana_edge.errors import SanaError
from sana_edge.image_metrics import psnr
from sana_edge.store import manifest, manifest_files

STEPS = 2
# the first from the start of the process, both with their PNG
COLUMNS = (
    *("load", "first", "first text", "first denoise", "first decode"),
    *("second", "second text", "second denoise", "second decode"),
)
FLOAT, PACKAGE, ONNX = "float", "int8", "onnx"
# of the 0.6B's folders, with room for the one that is being written
BYTES = 20e9
# engines that run on a CPU
ENGINES = ("onnxruntime", "openvino")
_EMPTY = {"median": None, "failure": None, "reference": None, "psnr": None}
_SCRIPT = Path(__file__).with_name("picture_process.py")


@dataclass(frozen=True)
class Way:
    """How a contender draws: ``by`` diffusers, torch or an engine, with one of the folders.

    ``decoder`` is a name of `sana_edge.bench.shapes.DECODERS` in place of the model's own.
    """

    by: str
    folder: str
    dtype: str
    decoder: str | None = None


WAYS = {
    BASELINE: Way("diffusers", FLOAT, "fp32"),
    HALF: Way("diffusers", FLOAT, "bf16"),
    "sana-edge bf16": Way("torch", FLOAT, "bf16"),
    INT8: Way("torch", PACKAGE, "bf16"),
    "onnxruntime int8": Way("onnxruntime", ONNX, "fp32"),
    "openvino int8": Way("openvino", ONNX, "fp32"),
    "openvino int8 bf16": Way("openvino", ONNX, "bf16"),
    **{
        f"openvino int8{half} {name}": Way("openvino", f"{ONNX}-{name}", dtype, name)
        for name in ("dc-ae-lite", "taesana")
        for half, dtype in (("", "fp32"), (" bf16", "bf16"))
    },
}


def measure_pictures(
    options: argparse.Namespace, say: Say, keep: Callable[[Mapping[str, Any]], object]
) -> dict[str, Any]:
    """Make the folders that are missing, then let each contender draw in turn, ``options.repeat`` times.

    A contender whose process fails gets a row with the reason; the others go on.

    Args:
        keep: is given what has been found so far, after each process.
    """
    found: dict[str, Any] = {"shapes": options.shapes, "size": options.sizes[0], "steps": STEPS}
    decoders = {way.decoder for name in options.contenders if (way := WAYS[name]).decoder}
    found["prepared"] = prepare(options.scratch, options.shapes, options.threads, say, decoders)
    rows: dict[str, dict[str, Any]] = {
        name: {**_EMPTY, "name": name, "runs": []} for name in options.contenders
    }
    with tempfile.TemporaryDirectory() as pictures:
        for turn in range(options.repeat):
            for name, row in rows.items():
                if row["failure"] is not None:
                    continue
                try:
                    row["runs"].append(_drawn(name, options, Path(pictures) / name))
                    row["median"] = _medians(row["runs"])
                    row |= _likeness(name, rows, Path(pictures))
                    shown = "{first:.1f} s, then {second:.1f} s".format(**row["runs"][-1])
                except SanaError as error:
                    row["failure"] = shown = error.message
                say(f"{turn + 1}/{options.repeat}, {name}: {shown}")
                keep({**found, "rows": list(rows.values())})
    return {**found, "rows": list(rows.values())}


def _drawn(name: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What `picture_process` prints, of one process."""
    output.mkdir(exist_ok=True)
    # of the turn before
    for picture in output.glob("*.png"):
        picture.unlink()
    way = WAYS[name]
    model = options.scratch / options.shapes / way.folder
    read_files(model)
    command = [sys.executable, str(_SCRIPT), str(model), str(output), "--by", way.by, "--dtype", way.dtype]
    command += ["--size", str(options.sizes[0]), "--steps", str(STEPS), "--started", str(time.time())]
    printed = run(command, name, threads=options.threads).printed
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: statistics.median(run[column] for run in runs) for column in COLUMNS}


def _likeness(name: str, rows: Mapping[str, dict[str, Any]], pictures: Path) -> dict[str, Any]:
    """Of the first picture to that of the first contender that drew."""
    reference = next((other for other, row in rows.items() if row["runs"]), None)
    # another decoder of random weights draws another picture
    if reference in (None, name) or not rows[name]["runs"] or WAYS[name].decoder:
        return _near(pictures, None)
    return _near(pictures / name / "first.png", str(reference), pictures / str(reference) / "first.png")


def _near(picture: Path, reference: str | None, other: Path | None = None) -> dict[str, Any]:
    """The name of what a picture is compared with, and its PSNR in dB; None where they are equal."""
    if reference is None or other is None:
        return {"reference": None, "psnr": None}
    found = psnr(*(np.asarray(Image.open(path).convert("RGB")) for path in (picture, other)))
    return {"reference": reference, "psnr": found if math.isfinite(found) else None}


def prepare(
    scratch: Path,
    shapes: str,
    threads: int,
    say: Say,
    decoders: Collection[str] = (),
    *,
    name: str | None = None,
    random: Sequence[str] = ("--sprint",),
    forms: Collection[str] = (FLOAT, PACKAGE, ONNX),
) -> list[dict[str, Any]]:
    """Make the model's folders that are missing in ``scratch / name``, and those with other decoders.

    Args:
        name: of the folder of all of them, the shapes if left out.
        random: what more `random_model.py` is told about the model.
        forms: which of them.

    Returns:
        The seconds of each folder that was made now.

    Raises:
        SanaError: a command fails, there is no room on the disk, or the graphs are damaged.
    """
    place = scratch.absolute() / (name or shapes)
    place.mkdir(parents=True, exist_ok=True)
    unwanted = {FLOAT, PACKAGE, ONNX} - {*forms}
    made_by = _making(place, shapes, decoders, random)
    commands = {name: command for name, command in made_by.items() if name not in unwanted}
    missing = {name: command for name, command in commands.items() if not (place / name).is_dir()}
    free = shutil.disk_usage(scratch).free
    if FLOAT in missing and shapes != "tiny" and free < BYTES:
        raise SanaError(
            f"the models need about {BYTES / 1e9:.0f} GB, {free / 1e9:.0f} GB are free in {scratch}",
            "make room, or choose another --scratch",
        )
    made = []
    for name, command in missing.items():
        say(f"making {name}: {' '.join(command[1:])}")
        seconds = run(command, f"making {name}", threads=threads).seconds
        say(f"made {name} in {seconds:.0f} s")
        made.append({"folder": name, "seconds": seconds})
    # once for all engines: the first one to load a folder would do it for the others
    for name in commands.keys() - {FLOAT, PACKAGE}:
        manifest_files.verify(place / name, manifest.read(place / name))
    return made


def _making(
    place: Path, shapes: str, decoders: Collection[str] = (), random: Sequence[str] = ("--sprint",)
) -> dict[str, list[str]]:
    """What makes each folder, in their order."""
    script = [sys.executable, str(ROOT / "benchmarks" / "random_model.py")]
    cut = ["--text-layers", "1"] if shapes == "tiny" else []
    graphs = ["--graphs-of", str(place / ONNX), "--shapes", shapes]
    others = {name: f"{ONNX}-{name}" for name in sorted(decoders)}
    exported = ["export", str(place / PACKAGE), "--int8", "--no-verify", "--output", str(place / ONNX)]
    return {
        FLOAT: [*script, str(place / FLOAT), "--shapes", shapes, *random, *cut],
        PACKAGE: [*script, str(place / PACKAGE), "--package-of", str(place / FLOAT)],
        ONNX: [sys.executable, "-m", "sana_edge", *exported],
        **{
            folder: [*script, str(place / folder), *graphs, "--decoder", name]
            for name, folder in others.items()
        },
    }


def measure_cold(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Every command in turns: seconds, peak resident bytes, and how far pictures are from the float one's.

    Raises: SanaError where a command fails.
    """
    commands = _commands(options)
    samples: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0)
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.png" for name in commands}
        # the first turn reads files from the disk and is not counted
        for turn in range(options.repeat + 1):
            for name, command in commands.items():
                done = run([*command, "--output", str(paths[name])], name, threads=options.threads)
                if turn:
                    samples[name].append(done.seconds)
                    # its own word: what the system tells of a child begins with what its parent had
                    peaks[name] = max(json.loads(done.printed)["peak_memory"], peaks[name])
                say(f"{turn}/{options.repeat}, {name} {done.seconds:.2f} s")
        rows = []
        for name, seconds in samples.items():
            reference = "torch int8" if "int8" in name else "torch"
            near = _near(paths[name], None if name == reference else reference, paths[reference])
            median = statistics.median(seconds)
            rows.append({"name": name, "seconds": seconds, "median": median, "peak": peaks[name], **near})
    return {"model": options.model, "steps": options.steps, "rows": rows}


def _commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """By name: torch in float and INT8, then every engine with every exported folder."""
    asked = ["generate", "--prompt", "a red house left of a yellow star", "--seed", "7", "--force"]
    asked += ["--quiet", "--json", "--steps", str(options.steps), "--device", "cpu", "--no-prompt-cache"]
    torch = [sys.executable, "-m", "sana_edge", *asked, "--model", options.model, "--backend", "torch"]
    commands = {"torch": torch, "torch int8": [*torch, "--int8"]}
    for folder in options.exported:
        described = manifest.read(Path(folder))
        kind = "int8" if described.quantization else described.dtype
        for engine in ENGINES:
            command = [sys.executable, str(_SCRIPT), "cli", *asked, "--model", folder, "--backend", engine]
            commands[f"{engine} {kind}"] = command
    return commands
