"""The GPU and the software around it as JSON values: what a result has to say of where it was measured.

    python benchmarks/gpu_machine.py --output machine.json

runs in a process of its own, since a driver that hangs must not stop the one that asks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import ended, header, write_json

ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")
MODULES = ("pytest", "xdist", "diffusers", "transformers", "tokenizers", "torch", "triton", "numpy", "PIL")


def facts(arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, commit, GPU and versions, as far as each can be found out."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {
            **header("benchmarks/gpu_check.py", arguments),
            "torch": f"does not load: {error}",
            "cuda": None,
        }
    return {
        **header("benchmarks/gpu_check.py", arguments),
        "cuda": _device(torch) if torch.cuda.is_available() else None,
        "nvidia_smi": _nvidia_smi(),
        "cuda_runtime": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _nvcc(),
        "compute_sanitizer": shutil.which("compute-sanitizer") is not None,
        "modules": [name for name in MODULES if importlib.util.find_spec(name) is not None],
    }


def _device(torch: Any) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "processors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 2**30, 1),
        "cudnn": torch.backends.cudnn.version(),
    }


def _nvidia_smi() -> dict[str, str] | None:
    """Driver, power limit in W, and clocks in MHz."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits")
    if not said:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(ASKED, values, strict=False))


def _nvcc() -> str | None:
    said = _said("nvcc", "--version")
    return next((line.strip() for line in said.splitlines() if "release" in line), None) if said else None


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description="say what GPU and software are here")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("given", nargs="*", help="what gpu_check.py was called with, after --")
    options = parser.parse_args()
    return ended(lambda: write_json(options.output, facts(options.given)))


if __name__ == "__main__":
    sys.exit(main())
