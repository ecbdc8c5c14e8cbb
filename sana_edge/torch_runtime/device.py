"""The device a model runs on: its choice, the dtypes and threads it computes with, fp32 without TF32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sana_edge.errors import InvalidInput, UnsupportedDevice
from sana_edge.fused import backends
from sana_edge.system.instructions import BF16_PRODUCTS, instructions
from sana_edge.system.threads import quota

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_LOCK = threading.Lock()


def check_target(device: str, dtype: str, backend: str) -> torch.device:
    """The device of that name; checks what can be said before a model is found.

    Raises:
        InvalidInput, UnsupportedDevice: see `choose_device`, `check_dtype` and `backends.choose`.
    """
    place = choose_device(device)
    check_dtype(dtype, place)
    backends.choose(backend, place, dtype, int8=True)
    return place


def choose_device(name: str) -> torch.device:
    """Return the device called "auto", "cpu" or "cuda"; auto is CUDA where there is any.

    Raises:
        UnsupportedDevice: no CUDA device is usable.
        InvalidInput: unknown name.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InvalidInput(f"unknown device {name!r}", "choose auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        reason = "no CUDA device is usable" if torch.version.cuda else "this PyTorch is built without CUDA"
        raise UnsupportedDevice(f"cuda cannot be used: {reason}", "choose cpu; `sana-edge doctor` says more")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_dtype(name: str, device: torch.device) -> None:
    """Check a dtype's name before anything is loaded.

    Raises:
        InvalidInput: unknown name.
        UnsupportedDevice: the device cannot compute in it.
    """
    if name not in ("auto", *DTYPES):
        raise InvalidInput(f"unknown dtype {name!r}", f"choose auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise UnsupportedDevice("fp16 is not supported on the CPU", "choose fp32 or bf16")


def computes_bf16() -> bool:
    """Whether this CPU has bf16 instructions that torch uses; without, bf16 takes many times fp32's time."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return bool(supported()) and not (instructions() or set()).isdisjoint(BF16_PRODUCTS)


def without_fp16(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cpu" or torch.cuda.is_bf16_supported() else torch.float32


def thread_count(count: int | None) -> int:
    """The threads that `torch_threads` takes."""
    return min(torch.get_num_threads(), quota()) if count is None else count


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Inside torch computes on the CPU with so many threads; None: its own number, within a quota.

    It counts the machine's cores, also where a container may use only some of them.
    """
    before, wanted = torch.get_num_threads(), thread_count(count)
    if wanted == before:
        yield
        return
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
