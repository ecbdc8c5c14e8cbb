"""How much memory is free and was used, and one error for the ways in which it runs out, or a GPU fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sana_edge.errors import OutOfMemory, SanaError

if TYPE_CHECKING:
    import torch

# not every allocator has an exception class of its own
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")

# what torch says of CUDA's memory: "Tried to allocate 2.00 GiB", "of which 1.50 GiB is free"
_NEEDED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_FREE = re.compile(r"of which ([\d.]+ \w+) is free")

_MEMINFO = Path("/proc/meminfo")
# where Linux tells the peak of this program; getrusage also counts what the process was before it ran it
_STATUS = Path("/proc/self/status")
# where a container sees the limits of its own control group: v2 and v1 name their files differently
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn failed allocations inside into `OutOfMemory` of ``what``, and a lost GPU into `SanaError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _MESSAGES):
            if _is_device_error(error):
                reason = str(error).partition("\n")[0]
                raise SanaError(f"the GPU failed: {reason}", "start the program again") from error
            raise
        raise OutOfMemory(
            f"not enough memory for {what}{_amounts(str(error))}",
            "choose a smaller size, or close other programs",
        ) from error


def _is_device_error(error: RuntimeError) -> bool:
    """Whether it is what a failed kernel raises in torch 2.8 and later; nothing runs on the GPU after it."""
    kind = getattr(sys.modules.get("torch"), "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)


def _amounts(message: str) -> str:
    """What was asked for and what is free, where torch says both."""
    needed, free = _NEEDED.search(message), _FREE.search(message)
    return f": {needed[1]} more are needed, {free[1]} are free" if needed and free else ""


def available_memory(device: torch.device | None = None) -> int | None:
    """The bytes that are free on a device, None where the system does not tell.

    On the CPU, which no device stands for too, what can be had without swapping, within the limits of a
    container.
    """
    kind = device.type if device is not None else "cpu"
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if kind != "cpu":
        return None
    kilobytes = _table(_MEMINFO).get("MemAvailable")
    known = [] if kilobytes is None else [kilobytes * 1024]
    for limit_file, used_file, table_file, cache_keys in _CGROUP_FILES:
        limit, used = _number(_CGROUP / limit_file), _number(_CGROUP / used_file)
        if limit is not None and used is not None:
            # files that were read count as used, but give way
            table = _table(_CGROUP / table_file)
            cached = sum(table.get(key, 0) for key in cache_keys)
            known.append(max(limit - used + cached, 0))
    return min(known, default=None)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says "max"."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    """The lines "name number" or "name: number unit" of a file; empty where there is no such file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return {}
    words = [words for words in map(str.split, lines) if len(words) > 1]
    return {name.rstrip(":"): int(number) for name, number, *_ in words if number.isdecimal()}


def peak_memory(device: torch.device | None = None) -> int | None:
    """The most memory used so far, in bytes; None where the system does not tell.

    On CUDA what PyTorch has allocated, on the CPU, which no device stands for too, the resident size of the
    process.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    kilobytes = _table(_STATUS).get("VmHWM")
    if kilobytes is not None:
        return kilobytes * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
