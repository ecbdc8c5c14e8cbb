"""Tensors that end where readable memory ends: whoever reads or writes beyond one ends the process."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

NO_ACCESS = 0


def guarded(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is the last before an unreadable page; what lies before it is NaN."""
    data = tensor.contiguous()
    if data.numel() == 0:
        return data
    size = data.numel() * data.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    end = pages * mmap.PAGESIZE
    whole = torch.frombuffer(memory, dtype=torch.uint8, count=end)
    whole.fill_(0xFF)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(whole.data_ptr() + end), ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = whole[end - size :].view(data.dtype).view(data.shape)
    copy.copy_(data)
    return copy
