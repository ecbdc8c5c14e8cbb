"""Seconds and peak memory from the start of a process to its picture, in torch and in engines."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from processes import run

from sana_edge.store.manifest import read

# those that run on a CPU
_ENGINES = ("onnxruntime", "openvino")
_WITHOUT_TORCH = str(Path(__file__).with_name("without_torch.py"))


def measure_cold(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Every command in turns: seconds, peak resident bytes, and how far pictures are from the float one's.

    Raises: SanaError where a command fails.
    """
    commands = _commands(options)
    samples: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, int] = {}
    pictures: dict[str, NDArray[np.uint8]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # the first turn reads files from the disk and is not counted
        for turn in range(options.repeat + 1):
            for name, command in commands.items():
                path = Path(folder) / "picture.png"
                done = run([*command, "--output", str(path)], options.threads, name)
                with Image.open(path) as picture:
                    pictures[name] = np.asarray(picture.convert("RGB"))
                if turn:
                    samples[name].append(done.seconds)
                    # its own word: what the system tells of a child begins with what its parent had
                    peak = json.loads(done.printed)["peak_memory"]
                    peaks[name] = max(peak, peaks.get(name, 0))
                say(f"{turn}/{options.repeat}, {name} {done.seconds:.2f} s")
    rows = [
        {
            "name": name,
            "seconds": samples[name],
            "median": statistics.median(samples[name]),
            "peak": peaks[name],
            **_likeness(pictures[name], pictures, name),
        }
        for name in commands
    ]
    for row in rows:
        compared = f", PSNR {row['psnr']:.1f} dB to {row['reference']}" if row.get("psnr") else ""
        print(f"{row['name']:40} {row['median']:.2f} s, {row['peak'] / 1e6:.0f} MB{compared}", flush=True)
    return {"model": options.model, "steps": options.steps, "rows": rows}


def _commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """By name: torch in float and INT8, then every engine with every exported folder."""
    asked = ["generate", "--prompt", "a red house left of a yellow star", "--seed", "7", "--force"]
    asked += ["--quiet", "--json", "--steps", str(options.steps)]
    torch = [sys.executable, "-m", "sana_edge", *asked, "--model", options.model, "--backend", "torch"]
    torch += ["--device", "cpu"]
    commands = {"torch": torch, "torch int8": [*torch, "--int8"]}
    for folder in options.exported:
        described = read(Path(folder))
        kind = "int8" if described.quantization else described.dtype
        for engine in _ENGINES:
            command = [sys.executable, _WITHOUT_TORCH, *asked, "--model", folder, "--backend", engine]
            commands[f"{engine} {kind}"] = [*command, "--device", "cpu"]
    return commands


def _likeness(
    picture: NDArray[np.uint8], pictures: dict[str, NDArray[np.uint8]], name: str
) -> dict[str, Any]:
    """PSNR in dB to the picture of torch, INT8 to INT8; None where they are equal or there is none."""
    reference = "torch int8" if "int8" in name else "torch"
    if name == reference:
        return {"reference": None, "psnr": None}
    error = float(np.mean((picture.astype(np.float64) - pictures[reference]) ** 2))
    return {"reference": reference, "psnr": 10 * np.log10(255**2 / error) if error else None}
