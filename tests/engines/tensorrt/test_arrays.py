"""Arrays on a GPU by their interfaces: real DLPack capsules of numpy and torch, dicts as CuPy shows them."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sana_edge.engines.tensorrt.arrays import (
    CPU,
    CUDA,
    DeviceArray,
    device_array,
    from_capsule,
    is_device_array,
)
from sana_edge.errors import InvalidInput

FACTS = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3, "strides": None, "stream": 7}


def shown(**changed: Any) -> Any:
    return SimpleNamespace(__cuda_array_interface__={**FACTS, **changed})


def test_the_interface_of_cupy() -> None:
    array = shown()
    taken = device_array(array)
    assert taken == DeviceArray(4096, (2, 3), np.dtype(np.float32), stream=7)
    assert taken.owner is array and taken.ndim == 2
    assert device_array(shown(data=(4096, True))).readonly
    # no elements, no memory
    assert device_array(shown(shape=(0, 3), data=(0, False))).pointer == 0
    assert device_array(shown(shape=())).shape == ()


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((2, 3), (12, 4), True),
        ((2, 3), (4, 8), False),
        ((2, 3), (24, 8), False),
        # the stride of a side of one is never used
        ((1, 3), (999, 4), True),
        ((2, 1, 3), (12, 5, 4), True),
        ((0, 3), (1, 1), True),
        ((3,), (0,), False),
    ],
)
def test_only_dense_arrays_are_taken(shape: tuple[int, ...], strides: tuple[int, ...], dense: bool) -> None:
    array = shown(shape=shape, strides=strides)
    if dense:
        assert device_array(array).shape == shape
    else:
        with pytest.raises(InvalidInput, match=r"latent of shape .* is not dense in C order"):
            device_array(array, "latent")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"typestr": "wrong"}, "damaged __cuda_array_interface__"),
        ({"data": None}, "damaged __cuda_array_interface__"),
        ({"shape": None}, "damaged __cuda_array_interface__"),
        ({"typestr": ">f4"}, "big-endian"),
        ({"mask": object()}, "mask"),
        ({"stream": 0}, "stream 0"),
        ({"strides": (12,)}, "has 1 strides"),
    ],
)
def test_damaged_interfaces_are_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        device_array(shown(**changed), "latent")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_])
def test_real_capsules_are_read(dtype: Any) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)[1:]
    capsule = array.__dlpack__()
    taken = from_capsule(capsule, "x", kinds=(CPU,))
    assert (taken.pointer, taken.shape, taken.dtype) == (array.ctypes.data, (1, 3, 4), np.dtype(dtype))
    with pytest.raises(InvalidInput, match="device type 1"):
        from_capsule(capsule, "x")
    with pytest.raises(InvalidInput, match="not dense"):
        from_capsule(array.T.__dlpack__(), "x", kinds=(CPU,))


def test_capsules_of_torch_with_an_offset() -> None:
    tensor = torch.arange(10.0)[4:]
    taken = from_capsule(tensor.__dlpack__(), "x", kinds=(CPU,))
    assert (taken.pointer, taken.shape) == (tensor.data_ptr(), (6,))
    with pytest.raises(InvalidInput, match="latent is bfloat16"):
        from_capsule(tensor.bfloat16().__dlpack__(), "latent", kinds=(CPU,))
    with pytest.raises(InvalidInput, match="type code 5"):
        from_capsule(tensor.to(torch.complex64).__dlpack__(), "x", kinds=(CPU,))


def test_memory_lives_as_long_as_the_array_that_was_taken() -> None:
    class Array(np.ndarray):
        pass

    array = np.ones(5, np.float32).view(Array)
    dead = weakref.ref(array)
    taken = from_capsule(array.__dlpack__(), "x", kinds=(CPU,))
    pointer = array.ctypes.data
    del array
    gc.collect()
    assert dead() is not None and taken.pointer == pointer
    del taken
    gc.collect()
    assert dead() is None


def test_the_producer_is_told_the_stream() -> None:
    asked = []

    class Producer:
        def __init__(self, kind: int) -> None:
            self.kind = kind

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.kind, 1

        def __dlpack__(self, *, stream: int) -> Any:
            asked.append(stream)
            return np.ones(3).__dlpack__()

    # numpy's capsule says CPU, whatever the object says
    with pytest.raises(InvalidInput, match="device type 1"):
        device_array(Producer(CUDA), "x", stream=77)
    assert asked == [77]
    with pytest.raises(InvalidInput, match="DLPack device type 10, not CUDA's"):
        device_array(Producer(10), "x", stream=77)
    assert is_device_array(shown()) and is_device_array(Producer(CUDA)) and not is_device_array(Producer(CPU))


def test_a_used_capsule_is_refused() -> None:
    capsule = torch.arange(3.0).__dlpack__()
    torch.from_dlpack(capsule)
    with pytest.raises(InvalidInput, match="used before"):
        from_capsule(capsule, "x", kinds=(CPU,))


@pytest.mark.parametrize("value", [np.ones(3), torch.ones(3), torch.ones(3, requires_grad=True), [1.0], None])
def test_what_is_on_the_host_is_no_device_array(value: Any) -> None:
    assert not is_device_array(value)
    with pytest.raises(InvalidInput, match=r"x is (a|in the memory of)"):
        device_array(value, "x")
