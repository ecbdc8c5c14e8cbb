"""fp32 on a GPU as fp32: torch's default lets cuDNN round the operands of convolutions to TF32's 10 bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.Lock()


class _Inside:
    """How many are inside of `full_precision`, and what the caller's flag was before the first."""

    count = 0
    allowed = True


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in convolutions, for the whole process, while anyone is inside; then as it was."""
    with _LOCK:
        if _Inside.count == 0:
            _Inside.allowed = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = False
        _Inside.count += 1
    try:
        yield
    finally:
        with _LOCK:
            _Inside.count -= 1
            if _Inside.count == 0:
                torch.backends.cudnn.allow_tf32 = _Inside.allowed
