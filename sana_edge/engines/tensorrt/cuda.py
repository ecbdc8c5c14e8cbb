"""Device memory, a stream and recorded graphs of a CUDA device, through NVIDIA's ``cuda.bindings``.

The module `cuda.bindings.runtime` is an argument of everything here, as ``cuda``: its calls return a tuple
whose first element is the error. On an NVIDIA GPU this module has not run; tests run it against a stand-in
that is made of the real package's functions and their parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines.tensorrt.cache import Machine
from sana_edge.errors import MissingDependency, OutOfMemory, SanaError, UnsupportedDevice

EXTRA = "pip install 'sana-edge[tensorrt]'"

# where Linux tells the driver's version: "NVRM version: NVIDIA UNIX x86_64 Kernel Module  575.64.03  ..."
_DRIVER = Path("/proc/driver/nvidia/version")


def load(name: str) -> ModuleType:
    """Import ``cuda.bindings.runtime`` or ``tensorrt``.

    Raises:
        MissingDependency: it is not installed, or one of its libraries is missing.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise MissingDependency(
            f"TensorRT engines need {name}, which cannot be imported: {reason}", EXTRA
        ) from error


def call(cuda: Any, function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return what it gives beside the error.

    Raises:
        OutOfMemory: the device has not enough.
        UnsupportedDevice: there is no device, or its driver is too old.
        SanaError: any other error, by its name.
    """
    error, *results = getattr(cuda, function)(*arguments)
    codes = cuda.cudaError_t
    if error == codes.cudaSuccess:
        return results[0] if len(results) == 1 else tuple(results)
    text = cuda.cudaGetErrorString(error)[1].decode(errors="replace")
    message = f"{function} failed: {text} ({error.name})"
    if error == codes.cudaErrorMemoryAllocation:
        raise OutOfMemory(
            f"not enough GPU memory: {message}", "choose a smaller size, or close other programs"
        )
    if error == codes.cudaErrorInsufficientDriver:
        raise UnsupportedDevice(
            f"no NVIDIA driver, or one that is older than the installed CUDA bindings: {message}",
            "update the driver, or pip install 'cuda-bindings<13' for a driver of CUDA 12",
        )
    if error == codes.cudaErrorNoDevice:
        raise UnsupportedDevice(f"no NVIDIA GPU: {message}", "choose --backend onnxruntime or openvino")
    raise SanaError(message, "start the program again; if it stays, update the driver")


def machine(cuda: Any, tensorrt_version: str) -> Machine:
    """What engines on this machine's current GPU are bound to."""
    properties = call(cuda, "cudaGetDeviceProperties", call(cuda, "cudaGetDevice"))
    capability = (int(properties.major), int(properties.minor))
    return Machine(properties.name.decode().strip("\0"), capability, tensorrt_version, driver_version(cuda))


def driver_version(cuda: Any) -> str:
    """The driver's own version, or where nothing tells that, the CUDA version that it brings."""
    try:
        words = _DRIVER.read_text(encoding="utf-8").splitlines()[0].split()
        return next(word for word in words if word[0].isdigit() and "." in word)
    except (OSError, IndexError, StopIteration):
        version = int(call(cuda, "cudaDriverGetVersion"))
        return f"cuda{version // 1000}.{version % 1000 // 10}"


class Handle:
    """Something of the current device, given back by `close`, or else with the last reference to it."""

    def close(self) -> None:
        """Give it back; a second time does nothing."""
        raise NotImplementedError

    def __del__(self) -> None:
        # nobody is left to hear of an error; where making it failed there is nothing to give back
        with suppress(Exception):
            self.close()


class Stream(Handle):
    """A stream of the current device, and what is recorded in it; `close` gives both back."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        # TensorRT synchronizes the whole device at each step in the default stream
        self._stream = call(cuda, "cudaStreamCreateWithFlags", cuda.cudaStreamNonBlocking)
        self.handle = int(self._stream)

    def wait(self) -> None:
        """Until all that was started here is done."""
        call(self._cuda, "cudaStreamSynchronize", self._stream)

    def record(self, start: Callable[[], None]) -> Recording:
        """Record what ``start`` starts in this stream as a CUDA graph; nothing runs.

        Raises:
            SanaError: it cannot be recorded.
        """
        cuda = self._cuda
        # other threads may use the device meanwhile
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call(cuda, "cudaStreamBeginCapture", self._stream, mode)
        try:
            start()
        except BaseException:
            # ends the capture; its own error says no more
            _, graph = cuda.cudaStreamEndCapture(self._stream)
            if graph is not None and int(graph):
                cuda.cudaGraphDestroy(graph)
            cuda.cudaGetLastError()
            raise
        graph = call(cuda, "cudaStreamEndCapture", self._stream)
        try:
            return Recording(cuda, call(cuda, "cudaGraphInstantiate", graph, 0), self._stream)
        finally:
            call(cuda, "cudaGraphDestroy", graph)

    def upload(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy a dense host array into a buffer of its size; done when `wait` returns, so keep the array."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(
            self._cuda, "cudaMemcpyAsync", buffer.pointer, array.ctypes.data, array.nbytes, kind, self._stream
        )

    def download(self, array: NDArray[Any], pointer: int) -> None:
        """Copy device memory into a dense host array; done when `wait` returns."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(self._cuda, "cudaMemcpyAsync", array.ctypes.data, pointer, array.nbytes, kind, self._stream)

    def close(self) -> None:
        """Give the stream back; nothing may use it any more."""
        stream, self._stream = self._stream, None
        if stream is not None:
            call(self._cuda, "cudaStreamDestroy", stream)


class Recording(Handle):
    """A CUDA graph; `launch` starts it in its stream."""

    def __init__(self, cuda: Any, graph: Any, stream: Any) -> None:
        self._cuda, self._graph, self._stream = cuda, graph, stream

    def launch(self) -> None:
        """Start it; done when the stream's `wait` returns."""
        call(self._cuda, "cudaGraphLaunch", self._graph, self._stream)

    def close(self) -> None:
        """Give it back."""
        graph, self._graph = self._graph, None
        if graph is not None:
            call(self._cuda, "cudaGraphExecDestroy", graph)


class Buffer(Handle):
    """Memory of the current device; `close` gives it back.

    Raises:
        OutOfMemory: there is not enough.
    """

    def __init__(self, cuda: Any, shape: tuple[int, ...], dtype: Any) -> None:
        self._cuda, self.shape, self.dtype = cuda, shape, np.dtype(dtype)
        # TensorRT wants an address also for no elements
        size = max(int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize, 1)
        self.pointer = int(call(cuda, "cudaMalloc", size))

    def close(self) -> None:
        """Give it back; nothing that reads or writes it may still run."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            call(self._cuda, "cudaFree", pointer)
