"""Seconds and memory of a whole Sprint model, prompt to pixels, each contender in a process of its own."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sprint_folders
from contenders import BASELINE, INT8
from engine_work import HALF
from PIL import Image
from processes import run
from sprint_folders import FLOAT, ONNX

from sana_edge.errors import SanaError
from sana_edge.image_metrics import psnr

STEPS = 2
# the first from the start of the process, both with their PNG
COLUMNS = (
    *("load", "first", "first text", "first denoise", "first decode"),
    *("second", "second text", "second denoise", "second decode"),
)
_EMPTY = {"median": None, "failure": None, "reference": None, "psnr": None}
_SCRIPT = Path(__file__).with_name("picture_process.py")


@dataclass(frozen=True)
class Way:
    """How a contender draws: ``by`` diffusers, torch or an engine, with one of `sprint_folders`."""

    by: str
    folder: str
    dtype: str


WAYS = {
    BASELINE: Way("diffusers", FLOAT, "fp32"),
    HALF: Way("diffusers", FLOAT, "bf16"),
    "sana-edge bf16": Way("torch", FLOAT, "bf16"),
    INT8: Way("torch", sprint_folders.INT8, "bf16"),
    "onnxruntime int8": Way("onnxruntime", ONNX, "fp32"),
    "openvino int8": Way("openvino", ONNX, "fp32"),
    "openvino int8 bf16": Way("openvino", ONNX, "bf16"),
}


def measure_pictures(
    options: argparse.Namespace, say: Callable[[str], None], keep: Callable[[Mapping[str, Any]], None]
) -> None:
    """Make the folders that are missing, then let each contender draw in turn, ``options.repeat`` times.

    A contender whose process fails gets a row with the reason; the others go on.

    Args:
        keep: is given what has been found so far, after each process.
    """
    found: dict[str, Any] = {"shapes": options.shapes, "size": options.sizes[0], "steps": STEPS}
    found["prepared"] = sprint_folders.prepare(options.scratch, options.shapes, options.threads, say)
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
    print(_table(list(rows.values())), flush=True)


def _drawn(name: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """What `picture_process` prints, of one process."""
    output.mkdir(exist_ok=True)
    way = WAYS[name]
    model = sprint_folders.folder_of(options.scratch, options.shapes) / way.folder
    _read(model)
    command = [sys.executable, str(_SCRIPT), str(model), str(output), "--by", way.by, "--dtype", way.dtype]
    command += ["--size", str(options.sizes[0]), "--steps", str(STEPS), "--started", str(time.time())]
    printed = run(command, options.threads, name).printed
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return result


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {column: statistics.median(run[column] for run in runs) for column in COLUMNS}


def _read(folder: Path) -> None:
    """Read the files, so that none waits for the disk that another has read before."""
    block = bytearray(1 << 24)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _likeness(name: str, rows: Mapping[str, dict[str, Any]], pictures: Path) -> dict[str, Any]:
    """PSNR in dB of the first picture to that of the first contender that drew; None for equal ones."""
    reference = next((other for other, row in rows.items() if row["runs"]), None)
    if reference in (None, name) or not rows[name]["runs"]:
        return {"reference": None, "psnr": None}
    one, other = (np.asarray(Image.open(pictures / drawn / "first.png")) for drawn in (name, str(reference)))
    found = psnr(one, other)
    return {"reference": reference, "psnr": found if math.isfinite(found) else None}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each contender."""
    lines = [("by", *COLUMNS, "peak MB", "PSNR dB")]
    for row in rows:
        median = row["median"]
        seconds = [f"{median[column]:.2f}" if median else "" for column in COLUMNS]
        memory = f"{max(run['peak'] for run in row['runs']) / 1e6:.0f}" if median else ""
        lines.append((row["name"], *seconds, memory, f"{row['psnr']:.1f}" if row["psnr"] else ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
