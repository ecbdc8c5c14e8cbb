"""What benchmarks share: what their JSON says besides its numbers, its writing, and how a command ends."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sana_edge.errors import SanaError

PACKAGES = ("numpy", "Pillow", "torch", "transformers", "diffusers")


def ended(run: Callable[[], None], interrupted: str = "interrupted") -> int:
    """Runs a command: 0, 1 for an error, 130 for Ctrl-C, which `interrupted` is said to."""
    try:
        run()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except (SanaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SanaError) and error.hint:
            print(f"hint:  {error.hint}", file=sys.stderr)
        return 1
    return 0


def positive(text: str) -> int:
    """The argument of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def header(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The circumstances of a run as JSON values; no host name and no folder of this machine.

    script: the command's file, such as "benchmarks/quality.py"; arguments: what followed it.
    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", script, *map(_without_folder, arguments)]),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


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
    known = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {"hash": known or None, "dirty": None if changed is None else bool(changed)}


def write_json(path: Path, data: Any) -> None:
    """Writes the whole file or nothing; an object or a list without others inside takes one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    flat = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\n *", " ", match[0]), text)
    write_bytes(path, (flat + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the whole file or nothing, and the folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _without_folder(argument: str) -> str:
    """`--output=/a/b.json` to `--output=b.json`: an absolute path keeps its name only."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in ("sana-edge", *PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
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


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str | None:
    """What a command prints, None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
