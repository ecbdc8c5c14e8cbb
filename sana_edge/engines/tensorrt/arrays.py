"""Arrays in a GPU's memory, of torch, CuPy, PyCUDA and others, taken without a copy or these packages.

Two interfaces carry them: DLPack, a capsule with a C structure (torch, CuPy, JAX), and
``__cuda_array_interface__``, a dict (also Numba and PyCUDA's `GPUArray`, which in older versions has only
``gpudata``). Sources: DLPack's ``dlpack.h``, versions 0.x and 1.x; Numba's CUDA Array Interface, version 3.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sana_edge.errors import InvalidInput

# DLDeviceType
CPU = 1
CUDA = 2
_CUDA_MANAGED = 13

# DLDataTypeCode: signed, unsigned, float, bool
_CODES = {0: "i", 1: "u", 2: "f", 6: "b"}
_BFLOAT = 4


@dataclass(frozen=True)
class DeviceArray:
    """Memory that somebody else owns, dense and in C order.

    Attributes:
        pointer: its address on the device; 0 where there are no elements.
        stream: the CUDA stream that its content may still be computed in; None if it is ready.
        owner: keeps the memory alive.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: int = 0
    stream: int | None = None
    readonly: bool = False
    owner: Any = field(default=None, repr=False, compare=False)

    @property
    def ndim(self) -> int:
        """How many sides its shape has."""
        return len(self.shape)


def is_device_array(value: object) -> bool:
    """Whether a value is in a GPU's memory, or says that it is; numpy arrays are not."""
    if _has_interface(value) or _is_old_pycuda(value):
        return True
    locate = getattr(value, "__dlpack_device__", None)
    return locate is not None and locate()[0] in (CUDA, _CUDA_MANAGED)


def device_array(value: Any, name: str = "the array", *, stream: int = 1) -> DeviceArray:
    """Take a GPU array of any of these packages as it is.

    Args:
        name: of the input, for messages.
        stream: handle of the CUDA stream that will read it, for DLPack's producer to wait in; 1 is the
            default stream.

    Raises:
        InvalidInput: no such interface, not in CUDA memory, not dense in C order, a dtype that numpy has not.
    """
    # DLPack first: our stream is made to wait for what still computes the array, as not by torch's dict
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, device = value.__dlpack_device__()
        if kind not in (CUDA, _CUDA_MANAGED):
            raise InvalidInput(
                f"{name} is in the memory of DLPack device type {int(kind)}, not CUDA's", _HINT
            )
        return from_capsule(value.__dlpack__(stream=stream), name, int(device))
    if _has_interface(value):
        return _from_interface(value.__cuda_array_interface__, value, name)
    if _is_old_pycuda(value):
        # PyCUDA before 2021: the same facts as attributes
        facts = {"shape": value.shape, "typestr": np.dtype(value.dtype).str, "strides": value.strides}
        return _from_interface({**facts, "data": (int(value.gpudata), False), "version": 2}, value, name)
    raise InvalidInput(f"{name} is a {type(value).__name__}, which is in no GPU's memory", _HINT)


_HINT = (
    "give a numpy array, or a CUDA array of torch, CuPy, PyCUDA or another package with one of the interfaces"
)


def _has_interface(value: object) -> bool:
    try:
        # torch raises here for tensors that are not on a GPU (AttributeError) or that need gradients
        return hasattr(value, "__cuda_array_interface__")
    except (RuntimeError, TypeError):
        return False


def _is_old_pycuda(value: object) -> bool:
    return hasattr(value, "gpudata") and hasattr(value, "strides")


def _from_interface(interface: Mapping[str, Any], owner: object, name: str) -> DeviceArray:
    try:
        pointer, readonly = interface["data"]
        shape = tuple(int(side) for side in interface["shape"])
        dtype = np.dtype(interface["typestr"])
        strides, stream = interface.get("strides"), interface.get("stream")
        masked = interface.get("mask") is not None
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{name} has a damaged __cuda_array_interface__: {error!r}", _HINT) from error
    if masked:
        raise InvalidInput(f"{name} has a mask", "give an array without one")
    if stream == 0:
        raise InvalidInput(f"{name} names stream 0, which the interface forbids as ambiguous", _HINT)
    if strides is not None:
        _check_dense(shape, tuple(strides), dtype.itemsize, name)
    _check_order(dtype, name)
    return DeviceArray(int(pointer or 0), shape, dtype, 0, stream, bool(readonly), owner)


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


def from_capsule(
    capsule: Any, name: str, device: int, kinds: tuple[int, ...] = (CUDA, _CUDA_MANAGED)
) -> DeviceArray:
    """Read the structure in a DLPack capsule, which is not consumed: its own destructor frees the memory.

    Args:
        kinds: the DLDeviceType values to accept.

    Raises:
        InvalidInput: as `device_array`.
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    valid = ctypes.pythonapi.PyCapsule_IsValid
    valid.restype, valid.argtypes = ctypes.c_int, (ctypes.py_object, ctypes.c_char_p)
    readonly = False
    if valid(capsule, b"dltensor"):
        # DLManagedTensor begins with the tensor
        tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    elif valid(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(get(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise InvalidInput(f"{name} comes in DLPack version {versioned.major}, known is 1", _HINT)
        tensor, readonly = versioned.tensor, bool(versioned.flags & 1)
    else:
        raise InvalidInput(
            f"{name} gives a DLPack capsule that was used before", "give the array, not a capsule"
        )
    if tensor.device.kind not in kinds:
        raise InvalidInput(f"{name} is in the memory of DLPack device type {tensor.device.kind}", _HINT)
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    dtype = _dtype(tensor.dtype, name)
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
        _check_dense(shape, strides, dtype.itemsize, name)
    pointer = (tensor.data or 0) + tensor.byte_offset if tensor.data else 0
    return DeviceArray(pointer, shape, dtype, device, None, readonly, capsule)


def _dtype(stated: Any, name: str) -> np.dtype[Any]:
    if stated.code == _BFLOAT:
        raise InvalidInput(f"{name} is bfloat16, which the graphs' inputs are not", "convert it to float32")
    if stated.code not in _CODES or stated.lanes != 1 or stated.bits % 8:
        raise InvalidInput(f"{name} has DLPack type code {stated.code}, {stated.bits} bits", "give float32")
    return np.dtype(f"{_CODES[stated.code]}{stated.bits // 8}")


def _check_dense(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, name: str) -> None:
    """Strides in bytes must be those of C order, where a dimension has any."""
    if len(strides) != len(shape):
        raise InvalidInput(f"{name} of shape {shape} has {len(strides)} strides", _HINT)
    expected = itemsize
    for side, stride in zip(reversed(shape), reversed(strides), strict=True):
        if side > 1 and stride != expected and 0 not in shape:
            raise InvalidInput(f"{name} of shape {shape} is not dense in C order", "make it contiguous")
        expected *= side


def _check_order(dtype: np.dtype[Any], name: str) -> None:
    if dtype.byteorder == ">":
        raise InvalidInput(f"{name} is big-endian", "give it in the machine's byte order")
