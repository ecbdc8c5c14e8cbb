"""How much memory is free and was used, and one error for the ways in which it runs out, or a GPU fails."""

from __future__ import annotations

import ctypes
import errno
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sana_edge.errors import OutOfMemory, SanaError

if TYPE_CHECKING:
    import torch

HINT = "choose a smaller size, or close other programs"

# what allocators, loaders and engines say where memory runs out; not each has an exception of its own
_WORDS = re.compile(
    # Python, C++, numpy, torch, onnxruntime, OpenVINO
    r"bad_alloc|bad allocation|bad array new length|out of memory|(?:not enough|insufficient) memory"
    r"|(?:can(?:no|')t|could not|unable to|failed to) alloc|memory allocation (?:of \d+ bytes )?fail"
    r"|failed to create memory|exceed max size of memory|bfcarena::allocate"
    # OpenCL, and oneDNN, which has nowhere to put the code that it makes
    r"|cl_out_of_|cl_mem_object_allocation_failure|could not (?:create|execute) a primitive(?! desc)"
    # files and libraries that are mapped, threads without a stack
    r"|unable to mmap|mmap failed|cannot map|failed to map segment|can't start new thread"
    # Windows: not enough memory (8, 14), system resources (1450), page file (1455); Linux: ENOMEM (12)
    r"|paging file is too small|error code: <(?:8|14|1450|1455)>|\(os error (?:8|12|14|1450|1455)\)",
    re.IGNORECASE,
)
_WINDOWS = (8, 14, 1450, 1455)
# "Tried to allocate 2.00 GiB", "you tried to allocate 4096 bytes", "unable to mmap 4096 bytes", "Unable to
# allocate 1.00 GiB for an array", "Failed to allocate memory for requested buffer of size 4096"
_NEEDED = re.compile(
    r"(?:tried to allocate|unable to (?:allocate|mmap)|failed to allocate|allocation of) ([\d.]+) (\w+)"
    r"|buffer of size (\d+)",
    re.IGNORECASE,
)
# what torch says of CUDA's memory
_FREE = re.compile(r"of which ([\d.]+) (\w+) is free")
_UNITS = {"b": 1, "byte": 1, "bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}

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
def memory_errors(what: str, needed: int | None = None) -> Iterator[None]:
    """Turn failed allocations inside into `OutOfMemory` of ``what``, and a lost GPU into `SanaError`.

    Also those that were taken for something else, as a file that could not be mapped is for a damaged one.

    Args:
        needed: bytes, where they are known and the error does not tell.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        found = _memory_error(error)
        if found is not None:
            raise out_of_memory(what, found, needed=needed) from error
        if _is_device_error(error):
            reason = str(error).partition("\n")[0]
            raise SanaError(f"the GPU failed: {reason}", "start the program again") from error
        raise


def out_of_memory(
    what: str, error: BaseException | None = None, *, needed: int | None = None, hint: str = HINT
) -> OutOfMemory:
    """The error for ``what``, with the bytes that are needed and free as far as anybody knows them.

    Args:
        error: of a library; what it says of both goes before ``needed`` and what the system says is free.
    """
    if isinstance(error, OutOfMemory):
        return error
    text = str(error or "")
    asked, left = _bytes(_NEEDED.search(text)), _bytes(_FREE.search(text))
    try:
        # the CPU's is not what a GPU lacks
        free = available_memory() if left is None and "cuda" not in text.lower() else left
    except MemoryError:
        # not even enough to ask
        free = 0
    needed = needed if asked is None else asked
    parts = [
        f"{shown(count)} {word}"
        for count, word in ((needed, "more are needed"), (free, "are free"))
        if count is not None
    ]
    return OutOfMemory(
        f"not enough memory for {what}{': ' if parts else ''}{', '.join(parts)}",
        hint,
        needed=needed,
        free=free,
    )


def is_memory(error: BaseException) -> bool:
    """Whether an error of Python, the system or any library says that memory did not suffice."""
    if isinstance(error, (MemoryError, OutOfMemory)):
        return True
    if isinstance(error, OSError) and (
        error.errno == errno.ENOMEM or getattr(error, "winerror", None) in _WINDOWS
    ):
        return True
    # errors of this package speak for themselves, those of Python are of the code
    known = (SanaError, TypeError, ValueError, LookupError, AttributeError, RecursionError)
    return not isinstance(error, known) and _WORDS.search(str(error)) is not None


def shown(count: int) -> str:
    """Bytes for people: "1.5 GB", "20 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _memory_error(error: BaseException) -> BaseException | None:
    """The one in an error's chain of causes that `is_memory`."""
    found: BaseException | None = error
    while found is not None and not is_memory(found):
        found = found.__cause__
    return found


def _bytes(match: re.Match[str] | None) -> int | None:
    """A count with its unit, or a plain one, that `_NEEDED` or `_FREE` found."""
    if match is None:
        return None
    count, unit, *plain = match.groups()
    if count is None:
        return int(plain[0])
    factor = _UNITS.get(unit.lower())
    return None if factor is None else int(float(count) * factor)


def _is_device_error(error: BaseException) -> bool:
    """Whether it is what a failed kernel raises in torch 2.8 and later; nothing runs on the GPU after it."""
    kind = getattr(sys.modules.get("torch"), "AcceleratorError", None)
    return kind is not None and isinstance(error, kind)


def available_memory(device: torch.device | None = None) -> int | None:
    """The bytes that are free on a device, None where the system does not tell.

    On the CPU, which no device stands for too, what can be had without swapping, within the limits of a
    container and of the process (``ulimit -v``).
    """
    kind = device.type if device is not None else "cpu"
    if kind == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    if kind != "cpu":
        return None
    known = [*_system(), *_process()]
    for limit_file, used_file, table_file, cache_keys in _CGROUP_FILES:
        limit, used = _number(_CGROUP / limit_file), _number(_CGROUP / used_file)
        if limit is not None and used is not None:
            # files that were read count as used, but give way
            table = _table(_CGROUP / table_file)
            cached = sum(table.get(key, 0) for key in cache_keys)
            known.append(max(limit - used + cached, 0))
    return min(known, default=None)


def _system() -> list[int]:
    """What the whole machine has; nothing where it does not tell."""
    # commands that need no packages import this module
    import psutil

    try:
        return [psutil.virtual_memory().available]
    except (OSError, RuntimeError, KeyError, psutil.Error):
        return []


def _process() -> list[int]:
    """What the limits of address space and data leave to this process."""
    try:
        import resource
    except ModuleNotFoundError:
        return []
    table, found = _table(_STATUS), []
    for limit, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and name in table:
            found.append(max(most - table[name] * 1024, 0))
    return found


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


def give_back() -> None:
    """Return freed memory to the system: glibc keeps gigabytes of a network that has gone."""
    gc.collect()
    # none in other libraries
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)


def used_memory(device: torch.device | None = None) -> int | None:
    """What `peak_memory` counts, now."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    kilobytes = _table(_STATUS).get("VmRSS")
    if kilobytes is not None:
        return kilobytes * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)


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
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
