"""Arrays in a GPU's memory, of torch, CuPy, PyCUDA and others, taken without a copy or these packages.

A TensorRT engine reads and writes them where they are:

    engine = choose("tensorrt", "cuda", folder).load(folder / "denoiser.onnx")
    engine.run({"latent": cupy_array, ...}, outputs={"velocity": pycuda_array})

Two interfaces carry them: DLPack, a capsule with a C structure (torch, CuPy, JAX), and
``__cuda_array_interface__``, a dict (also Numba, and PyCUDA's `GPUArray` since 2021). Sources: DLPack's
``dlpack.h``, DLManagedTensor; Numba's CUDA Array Interface, version 3.
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
    stream: int | None = None
    readonly: bool = False
    owner: Any = field(default=None, repr=False, compare=False)

    @property
    def ndim(self) -> int:
        """The number of its dimensions."""
        return len(self.shape)


def is_device_array(value: object) -> bool:
    """Whether a value is in a GPU's memory, or says that it is; numpy arrays are not."""
    if _has_interface(value):
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
        kind, _ = value.__dlpack_device__()
        if kind not in (CUDA, _CUDA_MANAGED):
            raise InvalidInput(
                f"{name} is in the memory of DLPack device type {int(kind)}, not CUDA's", _HINT
            )
        return from_capsule(value.__dlpack__(stream=stream), name)
    if _has_interface(value):
        return _from_interface(value.__cuda_array_interface__, value, name)
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
    return DeviceArray(int(pointer or 0), shape, dtype, stream, bool(readonly), owner)


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


def from_capsule(capsule: Any, name: str, kinds: tuple[int, ...] = (CUDA, _CUDA_MANAGED)) -> DeviceArray:
    """Read the structure in a DLPack capsule, which is not consumed: its own destructor frees the memory.

    Args:
        kinds: the DLDeviceType values to accept.

    Raises:
        InvalidInput: as `device_array`.
    """
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    try:
        # DLManagedTensor begins with the tensor; nobody gives a versioned one who is not asked for it
        tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    except ValueError as error:
        raise InvalidInput(
            f"{name} gives a DLPack capsule that was used before", "give the array, not a capsule"
        ) from error
    if tensor.device.kind not in kinds:
        raise InvalidInput(f"{name} is in the memory of DLPack device type {tensor.device.kind}", _HINT)
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    dtype = _dtype(tensor.dtype, name)
    if tensor.strides:
        strides = tuple(tensor.strides[i] * dtype.itemsize for i in range(tensor.ndim))
        _check_dense(shape, strides, dtype.itemsize, name)
    pointer = (tensor.data or 0) + tensor.byte_offset if tensor.data else 0
    return DeviceArray(pointer, shape, dtype, owner=capsule)


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
