"""A work in a process of its own, for its memory."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sana_edge.errors import OutOfMemory
from sana_edge.system.memory import memory_errors, peak_memory

if TYPE_CHECKING:
    from harness.work import Stage, Work


@dataclass(frozen=True)
class Peak:
    """Bytes: the most during a stage, of which ``before`` (weights, libraries, inputs) when it began.

    On CUDA tensors only, on the CPU the resident size of the process. ``before`` is None where the system
    cannot forget an earlier peak; ``most`` is then that of the process so far, loading included.
    """

    most: int | None
    before: int | None


def peaks(work: Work, name: str, stages: tuple[str, ...]) -> dict[str, Peak]:
    """Loads one implementation in a new process and runs each of its stages there once.

    Raises:
        OutOfMemory: the process was killed, or could not allocate.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measure, work, name, stages).result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            f"the process that measures the memory of {name} was killed or crashed", "close other programs"
        ) from error


def _measure(work: Work, name: str, stages: tuple[str, ...]) -> dict[str, Peak]:
    import torch

    torch.set_num_threads(work.threads)
    with memory_errors(work.title):
        calls = work.loaders()[name]()
        return {stage: _peak(calls[stage], work.device) for stage in stages if stage in calls}


def _peak(call: Stage, device: str) -> Peak:
    import torch

    before = _reset(device)
    call()
    if device == "cpu" and before is not None:
        return Peak(_status("VmHWM"), before)
    return Peak(peak_memory(torch.device(device)), before)


def _reset(device: str) -> int | None:
    """Forgets the peak so far and returns what is in use, or None where that is impossible."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        _return_freed_memory()
        # Linux: the peak becomes the present resident size
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _return_freed_memory() -> None:
    """Gives the system what loading has freed, which the C library may keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
