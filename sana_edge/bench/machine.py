"""Where numbers were measured: processor, memory, commit, versions, and the GPU with its software."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import sana_edge
from sana_edge.system.instructions import instructions
from sana_edge.system.threads import processor

# the checkout, or the folder of an installation
_ABOVE = Path(sana_edge.__file__).parents[1]
PACKAGES = ("sana-edge", "numpy", "Pillow", "torch", "transformers", "diffusers")
ASKED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "temperature.gpu")
_POWERCAP = Path("/sys/class/powercap")
MODULES = ("pytest", "xdist", "diffusers", "transformers", "tokenizers", "torch", "triton", "numpy", "PIL")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory, operating system, power, and the GPU where torch or its driver tells.

    ``instructions`` are those that decide how fast INT8 and 16 bit are, None where the system does not tell.
    """
    torch = sys.modules.get("torch")
    smi = _nvidia_smi("name", "driver_version", "power.limit") or {}
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else smi.get("name")
    found = instructions()
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": gpu,
        "gpu_driver": smi.get("driver_version"),
        "gpu_power_limit_w": smi.get("power.limit"),
        "instructions": None if found is None else sorted(found),
        "power": power(),
    }


def power() -> dict[str, Any]:
    """Mains or battery with its charge in %, the CPU package's limit in W, and the system's profile.

    None is what the system does not tell.
    """
    try:
        import psutil

        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (ImportError, OSError, RuntimeError):
        battery = None
    limit = _first(_POWERCAP.glob("intel-rapl:0/constraint_0_power_limit_uw"))
    return {
        "source": None if battery is None else "mains" if battery.power_plugged else "battery",
        "charge": None if battery is None else round(battery.percent),
        "limit_w": int(limit) / 1e6 if limit.isdecimal() else None,
        "profile": _first([Path("/sys/firmware/acpi/platform_profile")]) or None,
    }


def _first(paths: Iterable[Path]) -> str:
    """The text of the first file that can be read."""
    for path in paths:
        with suppress(OSError, ValueError):
            return path.read_text(encoding="ascii").strip()
    return ""


def commit() -> dict[str, Any]:
    """The commit of this checkout and whether tracked files differ from it; None where it is none."""
    if not (_ABOVE / ".git").exists():
        return {"hash": None, "dirty": None}
    known = _said("git", "-C", str(_ABOVE), "rev-parse", "HEAD")
    changed = _said("git", "-C", str(_ABOVE), "status", "--porcelain", "--untracked-files=no")
    return {"hash": known or None, "dirty": None if changed is None else bool(changed)}


def versions(*packages: str) -> dict[str, str | None]:
    """Of installed packages; None where one is not."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            # a checkout that is not installed knows its own
            found[package] = sana_edge.__version__ if package == "sana-edge" else None
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
        "nvidia_smi": _nvidia_smi(*ASKED),
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


def _nvidia_smi(*asked: str) -> dict[str, str] | None:
    """What the driver tells of the first GPU: limits in W, clocks in MHz."""
    said = _said("nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits")
    if not said:
        return None
    values = [value.strip() for value in said.splitlines()[0].split(",")]
    return dict(zip(asked, values, strict=False))


def _processor() -> str:
    if sys.platform == "darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return processor()


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
