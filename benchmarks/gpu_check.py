"""Builds, tests, times: all that a GPU has to show, in one command and one file.

    make gpu-check

builds the CUDA library for this GPU, runs the tests that need one, some of them under compute-sanitizer where
that is installed, times every kernel beside what it replaces, and the denoising loop and the whole picture
beside diffusers, eager and compiled. Nothing is timed where a test fails. Writes
benchmarks/results/<gpu>-<date>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from record import ended, header, write_json

from sana_edge.errors import SanaError, UnsupportedDevice

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SANITIZED = ("tests/test_cuda_quantize_rows.py", "tests/test_cuda_w8a8_linear.py")


def main(argv: Sequence[str] | None = None) -> int:
    """0, 1 where something failed, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description="build, test and time the GPU path")
    parser.add_argument(
        "--shapes", default="0.6b", help="of the networks that are timed (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="(default: benchmarks/results/<gpu>-<date>.json)")
    options = parser.parse_args(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    if not torch.cuda.is_available():
        raise UnsupportedDevice("there is no CUDA device here", "run this on a machine with an NVIDIA GPU")
    data: dict[str, Any] = header("benchmarks/gpu_check.py", given)
    data["driver"] = _driver()
    _step("building", ["csrc/compile.py"])
    data["tests"] = _tests()
    data["sanitizer"] = _sanitized()
    with tempfile.TemporaryDirectory() as folder:
        data |= _timed(options.shapes, Path(folder))
    output = options.output or RESULTS / f"{_slug(torch.cuda.get_device_name())}-{date.today()}.json"
    write_json(output, data)
    print(output)


def _tests() -> str:
    """The last line of pytest, of the tests marked gpu; Triton's kernels are compiled, not interpreted."""
    return _step("testing", ["-m", "pytest", "-q", "-m", "gpu"], TRITON_INTERPRET="0").splitlines()[-1]


def _sanitized() -> str:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not run: compute-sanitizer is not installed"
    command = ["-m", "pytest", "-q", "-m", "gpu", "-x", *SANITIZED]
    for check in ("memcheck", "racecheck"):
        wrapped = [
            tool,
            "--tool",
            check,
            "--error-exitcode",
            "1",
            "--target-processes",
            "all",
            sys.executable,
        ]
        _step(check, [*wrapped, *command], python=False)
    return f"memcheck and racecheck clean: {', '.join(SANITIZED)}"


def _timed(shapes: str, folder: Path) -> dict[str, Any]:
    kernels, images = folder / "kernels.json", folder / "images.json"
    sizes = [f"--size={side}" for side in (512, 1024, 2048)]
    _step("kernels", ["benchmarks/bench_kernels.py", "--shapes", shapes, *sizes, "--output", str(kernels)])
    loop = ["--device", "cuda", "--shapes", shapes, "--dtype", "fp16", "--stage", "step,loop,decode"]
    _step("loop", ["benchmarks/bench_image.py", *loop, "--output", str(images)])
    model, pictures = folder / f"random-{shapes}", folder / "pictures.json"
    _step("model", ["benchmarks/random_model.py", str(model), "--shapes", shapes])
    picture = ["--device", "cuda", "--model", str(model), "--dtype", "fp16", "--stage", "text,decode,picture"]
    _step("picture", ["benchmarks/bench_image.py", *picture, "--output", str(pictures)])
    found = json.loads(kernels.read_text())
    return {
        **{name: found[name] for name in ("dtype", "peaks", "kernels")},
        "works": [work for path in (images, pictures) for work in json.loads(path.read_text())["works"]],
    }


def _step(name: str, command: Sequence[str], *, python: bool = True, **variables: str) -> str:
    """Run one step, its output shown and returned.

    Raises:
        SanaError: it failed.
    """
    print(f"{name}...", file=sys.stderr)
    done = subprocess.Popen(
        [*([sys.executable] if python else []), *command],
        cwd=ROOT,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout is not None
    lines = []
    for line in done.stdout:
        print(line, end="", file=sys.stderr)
        lines.append(line)
    if done.wait():
        raise SanaError(f"{name} failed with exit code {done.returncode}", "nothing is written; see above")
    return "".join(lines).strip()


def _driver() -> str | None:
    """The driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
