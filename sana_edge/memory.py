"""How much memory was used, and one error for the ways in which it runs out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sana_edge.errors import OutOfMemory

# not every allocator has an exception class of its own
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Turn allocation failures inside into `OutOfMemory`; ``what`` did not fit."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _MESSAGES):
            raise
        raise OutOfMemory(
            f"not enough memory for {what}", "choose a smaller size, or close other programs"
        ) from error


def peak_memory(device: torch.device) -> int | None:
    """The most memory used so far, in bytes; None where the system does not tell.

    On CUDA what PyTorch has allocated, on the CPU the resident size of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
