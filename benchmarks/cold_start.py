"""Seconds and peak memory from the start of a process to its picture, in torch and in engines."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sana_edge.engines import NAMES
from sana_edge.errors import SanaError
from sana_edge.manifest import read

_BLOCKED = ("torch", "transformers", "onnx")
# the command line in a process that cannot import what an engine is to do without
_WITHOUT = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {_BLOCKED!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
from sana_edge.cli import main
sys.exit(main(sys.argv[1:]))
"""


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
                seconds, peak = _timed([*command, "--output", str(path)], options.threads, name)
                with Image.open(path) as picture:
                    pictures[name] = np.asarray(picture.convert("RGB"))
                if turn:
                    samples[name].append(seconds)
                    peaks[name] = max(peak, peaks.get(name, 0))
                say(f"{turn}/{options.repeat}, {name} {seconds:.2f} s")
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
    asked = ["generate", "--prompt", "a red house left of a yellow star", "--seed", "7", "--force", "--quiet"]
    asked += ["--steps", str(options.steps)]
    torch = [sys.executable, "-m", "sana_edge", *asked, "--model", options.model, "--backend", "torch"]
    torch += ["--device", "cpu"]
    commands = {"torch": torch, "torch int8": [*torch, "--int8"]}
    for folder in options.exported:
        described = read(Path(folder))
        kind = "int8" if described.quantization else described.dtype
        for engine in NAMES:
            command = [sys.executable, "-c", _WITHOUT, *asked, "--model", folder, "--backend", engine]
            commands[f"{engine} {kind}"] = [*command, "--device", "cpu"]
    return commands


def _timed(command: list[str], threads: int, name: str) -> tuple[float, int]:
    """Seconds, and the peak resident size in bytes.

    Raises: SanaError, if it fails, with the last line that it wrote.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        written = errors.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        reason = " ".join(written[-2:]) or f"exit {process.returncode}"
        raise SanaError(f"{name} failed: {reason}", "run its command by itself")
    return seconds, used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _likeness(
    picture: NDArray[np.uint8], pictures: dict[str, NDArray[np.uint8]], name: str
) -> dict[str, Any]:
    """PSNR in dB to the picture of torch, INT8 to INT8; None where they are equal or there is none."""
    reference = "torch int8" if "int8" in name else "torch"
    if name == reference:
        return {"reference": None, "psnr": None}
    error = float(np.mean((picture.astype(np.float64) - pictures[reference]) ** 2))
    return {"reference": reference, "psnr": 10 * np.log10(255**2 / error) if error else None}
