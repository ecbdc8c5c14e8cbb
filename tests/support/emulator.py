"""The emulated CUDA library, and the real one for tensors on the CPU, which travel to a GPU and back.

The way to a GPU and back is tested without one: `FakeGpu` stands where `Gpu` does, with the emulated library.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import pytest
import torch

from sana_edge.kernels.cuda import library as cuda_library

_STDERR = "SANA_EDGE_EMULATOR_STDERR"


def keep_stderr() -> None:
    """Let the emulator's last words out, which pytest would capture and lose; call it before it captures."""
    os.environ[_STDERR] = f"{os.getpid()}:{os.dup(2)}"


class Gpu:
    """The current CUDA device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def to_device(self, content: torch.Tensor) -> torch.Tensor:
        """A copy there, at an address of its own."""
        return content.to(self.device)

    def synchronize(self) -> None:
        """Wait for what was started."""
        torch.cuda.synchronize(self.device)


class FakeGpu:
    """Other memory of the CPU in the place of a GPU's."""

    device = torch.device("cpu")

    def to_device(self, content: torch.Tensor) -> torch.Tensor:
        """A copy, at an address of its own."""
        return content.clone()

    def synchronize(self) -> None:
        """Nothing is under way."""


class OnGpu:
    """The CUDA library for tensors on the CPU: their memory travels to the GPU and back with every call."""

    device_type = "cpu"

    def __init__(self, library: cuda_library.Library, transport: Gpu | FakeGpu) -> None:
        self._library, self._transport = library, transport

    def __getattr__(self, name: str) -> Any:
        if name in ("count", "pretend", "shuffle"):
            pytest.skip("only the emulator can do this")
        return getattr(self._library, name)

    def call(self, operation: str, device: torch.device, **fields: Any) -> None:
        """`Library.call`; whole storages are copied, so that views, aliases and what lies around stay so."""
        tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
        storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in tensors.values()}
        # not by torch.empty, which tests replace
        bytes_of = {
            address: torch.tensor([], dtype=torch.uint8).set_(storage)
            for address, storage in storages.items()
        }
        there = {address: self._transport.to_device(content) for address, content in bytes_of.items()}
        for name, value in tensors.items():
            offset = value.storage_offset() * value.element_size()
            fields[name] = there[value.untyped_storage().data_ptr()][offset:]
        try:
            self._library.call(operation, self._transport.device, **fields)
        finally:
            self._transport.synchronize()
            for address, content in bytes_of.items():
                content.copy_(there[address])


class Emulator:
    """What the emulator can be told, and what it counted."""

    NAMES = ("launches", "blocks", "int8_products", "half_products", "matrix_reads", "bank_conflicts")

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def shuffle(self, seed: int) -> None:
        """Run threads and blocks in their order (0), or in another one for every other seed."""
        self._library.sana_edge_emulator_shuffle(seed)

    def pretend(self, capability: int, processors: int, shared_memory: int) -> None:
        """Pretend to be a device: 89, its multiprocessors, and bytes of shared memory of a block."""
        self._library.sana_edge_emulator_device(capability, processors, shared_memory)

    def count(self) -> dict[str, int]:
        """What was done since the last call: see Counters in csrc/emulator/emulator.h."""
        numbers = (ctypes.c_int64 * len(self.NAMES))()
        self._library.sana_edge_emulator_counters(numbers)
        return dict(zip(self.NAMES, numbers, strict=True))
