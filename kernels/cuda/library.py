"""The CUDA library of csrc/, loaded with ctypes: its C functions by name, on tensors.

Where it cannot be used, `refusal` says why. ``SANA_EDGE_CUDA_LIBRARY`` names another file than the installed
one, such as the emulated library that the tests build, whose "GPU" is the CPU.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput, OutOfMemory, SanaError, UnsupportedDevice
from sana_edge.kernels.cuda.operations import OPERATIONS

ABI = 3
VARIABLE = "SANA_EDGE_CUDA_LIBRARY"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_NAME = "sana_edge_cuda.dll" if sys.platform == "win32" else "libsana_edge_cuda.so"


class DeviceInfo(ctypes.Structure):
    """``sana_edge_device_info``."""

    _fields_ = (
        ("capability", ctypes.c_int32),
        ("processors", ctypes.c_int32),
        ("shared_memory", ctypes.c_int32),
    )


class Library:
    """A loaded library. ``device_type`` is where its tensors must be: "cuda", of the emulated one "cpu"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        for name in ("sana_edge_version", "sana_edge_architectures", "sana_edge_status_text"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self.device_type = "cpu" if self._library.sana_edge_emulated() else "cuda"

    @property
    def abi(self) -> int:
        """The header's SANA_EDGE_ABI that it was built with."""
        return int(self._library.sana_edge_abi())

    @property
    def version(self) -> str:
        """The version of sana-edge that it was built from."""
        return str(self._library.sana_edge_version().decode())

    @property
    def architectures(self) -> str:
        """What it has code for, as "75 80 86 89 90 ptx90 120"."""
        return str(self._library.sana_edge_architectures().decode())

    def device(self, index: int) -> DeviceInfo:
        """What a device is.

        Raises:
            UnsupportedDevice: there is none, or the library cannot run on it.
        """
        info = DeviceInfo()
        self._check(self._library.sana_edge_device(index, ctypes.byref(info)), "sana_edge_device")
        return info

    def missing(self) -> list[str]:
        """Operations of the header that it does not have."""
        return [name for name in OPERATIONS if not hasattr(self._library, f"sana_edge_{name}")]

    def ask(self, function: str, *structs: ctypes.Structure) -> None:
        """Call another function of the header than an operation, on structs.

        Raises:
            SanaError: the library refused; of the kind that fits.
        """
        self._check(getattr(self._library, function)(*map(ctypes.byref, structs)), function)

    def count(self, function: str, *structs: ctypes.Structure | ctypes.Array[Any]) -> int:
        """What a function that counts answers."""
        return int(getattr(self._library, function)(*map(ctypes.byref, structs)))

    def workspace(self, images: int, tokens: int, heads: int) -> int:
        """Bytes that qkv_linear_attention and qk_norm_linear_attention need."""
        function = self._library.sana_edge_qkv_linear_attention_workspace
        function.restype = ctypes.c_int64
        return int(function(images, tokens, heads))

    def call(self, operation: str, device: torch.device, **fields: Tensor | int | float | None) -> None:
        """Start an operation of sana_edge.h on the current stream of a device; tensors are given as pointers.

        Raises:
            SanaError: the library refused; of the kind that fits.
        """
        for name, value in fields.items():
            if not isinstance(value, Tensor) or (value.device == device and device.type == self.device_type):
                continue
            wanted = device if device.type == self.device_type else self.device_type
            raise InvalidInput(f"{name} of {operation} is on {value.device}, not on {wanted}", "move it")
        values = {
            name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()
        }
        arguments = OPERATIONS[operation].struct(**values)
        function = getattr(self._library, f"sana_edge_{operation}")
        if self.device_type == "cpu":
            status = function(ctypes.byref(arguments), None)
        else:
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                status = function(ctypes.byref(arguments), stream)
        self._check(status, operation)

    def _check(self, status: int, operation: str) -> None:
        if status:
            text = self._library.sana_edge_status_text(status).decode()
            kind, hint = _ERRORS.get(status, (SanaError, "`sana-edge doctor` says what this machine can run"))
            raise kind(f"{operation}: {text}", hint)


_TORCH = "use the torch backend"
_AGAIN = "install sana-edge again, or in a checkout: make cuda"
_ERRORS: dict[int, tuple[type[SanaError], str]] = {
    **dict.fromkeys(range(1, 6), (InvalidInput, "see csrc/sana_edge.h")),
    6: (UnsupportedDevice, _TORCH),
    7: (UnsupportedDevice, _TORCH),
    8: (UnsupportedDevice, "update the NVIDIA driver, or use the torch backend"),
    9: (OutOfMemory, "choose a smaller size, or close other programs"),
    10: (SanaError, "start the program again"),
}


@functools.cache
def load() -> Library:
    """The installed library, or the one that SANA_EDGE_CUDA_LIBRARY names.

    Raises:
        UnsupportedDevice: there is none, it does not load, or it is of another version.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else Path(str(resources.files("sana_edge"))) / _NAME
    if not path.exists():
        hint = f"correct {VARIABLE}, or unset it" if named else "install with nvcc 12.8 or later on PATH"
        raise UnsupportedDevice(f"the CUDA library was not built: no {named or path.name}", hint)
    try:
        if _cut_short(path):
            raise UnsupportedDevice(f"the CUDA library does not load: {path} is cut short", _AGAIN)
        library = Library(path)
        found = library.abi
    except (OSError, AttributeError) as error:
        raise UnsupportedDevice(f"the CUDA library does not load: {error}", _AGAIN) from error
    if found != ABI:
        text = f"the CUDA library {path} has interface {found}, this sana-edge needs {ABI}"
        raise UnsupportedDevice(text, _AGAIN)
    # tests may build the emulated one of the operations at hand
    missing = library.missing() if library.device_type == "cuda" else []
    if missing:
        raise UnsupportedDevice(f"the CUDA library {path} lacks {', '.join(missing)}", _AGAIN)
    return library


def _cut_short(path: Path) -> bool:
    """Whether the end of an ELF file is missing, whose loading would end the process.

    Its section headers come last; where they are stands in the first 64 bytes.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF\x02"):
        return False
    if len(header) < 64:
        return True
    (offset,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<2H", header, 58)
    return path.stat().st_size < int(offset) + int(size) * int(count)


def refusal(device: torch.device) -> str:
    """Why the CUDA library cannot run on a device; empty where it can."""
    try:
        library = load()
        if device.type != library.device_type:
            return f"the CUDA kernels run on {library.device_type}, not on {device.type}"
        capability = library.device(index_of(device)).capability
    except UnsupportedDevice as error:
        return str(error)
    if library.device_type == "cuda" and not covers(library.architectures, capability):
        found = f"the CUDA library is built for {library.architectures}"
        return f"{found}, not for compute capability {capability / 10}"
    return ""


def index_of(device: torch.device) -> int:
    """The number of a device; of ``cuda`` alone the current one's, or 0 where torch can use none."""
    if device.index is not None or device.type != "cuda":
        return device.index or 0
    try:
        return torch.cuda.current_device()
    # built without CUDA, it asserts
    except (RuntimeError, AssertionError):
        return 0


def covers(architectures: str, capability: int) -> bool:
    """Whether a GPU runs code of one of `Library.architectures`.

    Machine code runs on GPUs of its major version that are not older; PTX on all that are not older, but that
    below 80 not on 80 and above: the kernels for these are empty in it.
    """
    for name in architectures.split():
        number = int(name.removeprefix("ptx"))
        whole = name.startswith("ptx") and (number >= 80 or capability < 80)
        same = whole or (number // 10 == capability // 10 and not name.startswith("ptx"))
        if same and number <= capability:
            return True
    return False
