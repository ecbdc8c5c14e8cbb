"""CPU threads of the engines: the user's number, or the physical cores within a container's quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def cpu_threads(asked: int | None = None) -> int | None:
    """Threads to compute with: what was asked for, OMP_NUM_THREADS, or the physical cores.

    Of the cores those that this process may use, within a container's quota. None where the system does not
    tell, and the engine counts for itself.
    """
    if asked is not None:
        return asked
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    # two hardware threads of a core have the same siblings
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def shown_threads(threads: int | None) -> str:
    """As in "2 threads"."""
    return "its own number of threads" if threads is None else f"{threads} thread{'s' * (threads != 1)}"


def _quota() -> int:
    """The cores that a container may keep busy, rounded up; a large number without a limit."""
    limit, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if limit.isdecimal() and period.isdecimal() and int(period):
        return math.ceil(int(limit) / int(period))
    return 1 << 16


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
