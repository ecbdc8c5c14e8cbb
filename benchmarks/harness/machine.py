"""Where numbers were measured: processor, memory, commit, versions, and the GPU with its software."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import ROOT

PACKAGES = ("sana-edge", "numpy", "Pillow", "torch", "transformers", "diffusers")
ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")
MODULES = ("pytest", "xdist", "diffusers", "transformers", "tokenizers", "torch", "triton", "numpy", "PIL")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, operating system, and the GPU if torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": gpu,
    }


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether tracked files differ from it; None where git does not know."""
    known = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return {"hash": known or None, "dirty": None if changed is None else bool(changed)}


def versions(*packages: str) -> dict[str, str | None]:
    """Of installed packages; None where one is not."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def gpu_facts() -> dict[str, Any]:
    """The GPU and the software around it, as far as each can be found out.

    To be asked in a process of its own: a driver that hangs must not stop the one that asks.
    """
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch": f"does not load: {error}", "cuda": None}
    nvcc = (_said("nvcc", "--version") or "").splitlines()
    return {
        "cuda": _device(torch) if torch.cuda.is_available() else None,
        "nvidia_smi": _nvidia_smi(),
        "cuda_runtime": torch.version.cuda,
        **versions("triton"),
        "nvcc": next((line.strip() for line in nvcc if "release" in line), None),
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


def _processor() -> str:
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _said(*command: str) -> str | None:
    """What a command prints, None where it is missing, hangs or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
