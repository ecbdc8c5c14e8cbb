"""One TensorRT engine, loaded and run without torch.

It has not run with TensorRT or on an NVIDIA GPU; tests use stand-ins made of the real bindings' names and
parameters.

Of a graph with the same shapes and addresses as before, the second run is recorded as a CUDA graph, which the
later ones launch; the first lets TensorRT set up what the recording may not.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sana_edge.engines.ports import Arrays, check_inputs, written
from sana_edge.engines.tensorrt import cuda as cuda_memory
from sana_edge.engines.tensorrt.arrays import DeviceArray, device_array, is_device_array
from sana_edge.engines.tensorrt.cache import Entry
from sana_edge.engines.tensorrt.cuda import Buffer, Recording, Stream
from sana_edge.engines.tensorrt.profiles import Shapes, fitting, outside
from sana_edge.errors import InvalidInput, OutOfMemory, SanaError
from sana_edge.store.manifest import Port
from sana_edge.system.regular import open_regular

logger = logging.getLogger("sana_edge")


class TensorRTEngine:
    """One engine, loaded; behaves as `sana_edge.engines.engine.Engine`. Not for two threads at once.

    Args:
        entry: checked by `sana_edge.engines.tensorrt.trust.check_loadable`, as loading runs code in the file.
        trt, cuda: the modules ``tensorrt`` and ``cuda.bindings.runtime``.
        inputs: ports of the manifest.
        precision: of the graph, for a person.
        cell: pixels of a latent cell along a side, for messages.

    Raises:
        OutOfMemory: the GPU's memory does not suffice.
        SanaError: the file is damaged, or another TensorRT's.
    """

    name = "tensorrt"
    device = "cuda"

    def __init__(
        self,
        entry: Entry,
        trt: Any,
        cuda: Any,
        *,
        inputs: Mapping[str, Port],
        precision: str = "fp32",
        cell: int = 32,
    ) -> None:
        self.graph, self.precision = entry.key.graph, precision
        self.notes: tuple[str, ...] = ()
        self._entry, self._trt, self._cuda, self._cell = entry, trt, cuda, cell
        self._log = logger_class(trt)()
        # lives as long as the engine does, or longer
        self._runtime = trt.Runtime(self._log)
        self._engine = self._deserialize(entry)
        self._profiles, self._dtypes = self._describe()
        self._inputs = inputs
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        self._context = self._engine.create_execution_context(strategy)
        if self._context is None:
            raise OutOfMemory(
                f"not enough GPU memory for {self.graph}: {self._log.last}", "close other programs"
            )
        self._stream = Stream(cuda)
        self._profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._buffers: dict[str, Buffer] = {}
        self._addresses: dict[str, int] = {}
        # what lies in the buffers already; kept, so that no other array gets its identity
        self._uploaded: dict[str, NDArray[Any]] = {}
        self._recording: Recording | None = None
        self._recordable = True

    def run(self, inputs: Arrays, outputs: Mapping[str, Any] | None = None) -> dict[str, NDArray[Any]]:
        """Compute the graph's outputs by name; see `sana_edge.engines.engine.Engine`.

        Args:
            inputs: numpy arrays, copied to the GPU, or arrays on the GPU of torch, CuPy, PyCUDA and others,
                which are read where they are; those must be ready, or name their stream.
            outputs: dense arrays on the GPU for outputs to be written into, which are then not returned.

        Raises:
            InvalidInput: a name, dtype or shape that the graph has not, or a size outside of what the
                engine was built for: names the range and the command that builds another.
            OutOfMemory: the GPU's memory does not suffice.
            SanaError: the engine failed, or was closed.
        """
        if self._context is None:
            raise SanaError(f"the {self.graph} engine was closed", "load it again")
        taken = {
            name: device_array(value, name, stream=self._stream.handle)
            if is_device_array(value)
            else np.asarray(value, order="C")
            for name, value in inputs.items()
        }
        # checks what both kinds of arrays have
        check_inputs(self.graph, cast(Arrays, taken), self._inputs)
        self._set_shapes({name: tuple(array.shape) for name, array in taken.items()})
        given = {name: self._output(name, value) for name, value in (outputs or {}).items()}
        same = self._set_addresses(taken, given)
        self._upload(taken)
        self._start(record=same)
        own = (name for name in self._outputs if name not in given)
        results = {name: np.empty(self._shape(name), self._dtypes[name]) for name in own}
        for name, array in results.items():
            self._stream.download(array, self._addresses[name])
        self._stream.wait()
        return results

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that it was built for inputs of these shapes; see `sana_edge.engines.sessions.Sized`."""
        self._fitting(shapes)

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        profile = fitting(self._profiles, shapes)
        if profile is None:
            raise outside(self.graph, self._profiles, shapes, self._cell, self._entry.rebuild)
        return profile

    def close(self) -> None:
        """Free its memory; it cannot run any more."""
        if self._context is None:
            return
        self._forget()
        # in this order: a context uses its engine, that its runtime
        self._context = self._engine = self._runtime = None
        self._stream.close()

    def _deserialize(self, entry: Entry) -> Any:
        try:
            with (
                open_regular(entry.path) as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            ):
                engine = self._runtime.deserialize_cuda_engine(content)
        except (OSError, ValueError) as error:
            raise SanaError(
                f"cannot read {entry.path}: {error}", f"build it again: {entry.rebuild(force=True)}"
            ) from error
        if engine is None:
            raise SanaError(
                f"TensorRT {self._trt.__version__} cannot load {entry.path}: {self._reason()}",
                f"build it again: {entry.rebuild(force=True)}",
            )
        return engine

    def _describe(self) -> tuple[list[dict[str, Shapes]], dict[str, np.dtype[Any]]]:
        """The engine's profiles, of its inputs, and the dtypes of its inputs and outputs."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self._outputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        profiles = [
            {
                name: Shapes(*(tuple(dims) for dims in engine.get_tensor_profile_shape(name, index)))
                for name in names
                if name not in self._outputs
            }
            for index in range(engine.num_optimization_profiles)
        ]
        return profiles, dtypes

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Prepare for input shapes, unless the last run had the same."""
        if shapes == self._shapes:
            return
        profile = self._fitting(shapes)
        self._forget()
        if profile != self._profile:
            self._check(
                self._context.set_optimization_profile_async(profile, self._stream.handle),
                f"choose profile {profile}",
            )
            self._stream.wait()
            self._profile = profile
        for name, shape in shapes.items():
            self._check(self._context.set_input_shape(name, shape), f"take {name} of shape {written(shape)}")
        missing = self._context.infer_shapes()
        self._check(not missing, f"tell the shapes of {', '.join(missing)}")
        self._shapes = shapes

    def _set_addresses(self, taken: Mapping[str, Any], given: Mapping[str, DeviceArray]) -> bool:
        """Tell TensorRT where inputs and outputs are; whether they are where they were in the last run."""
        addresses = {}
        for name, array in {**dict.fromkeys(self._outputs), **taken, **given}.items():
            if isinstance(array, DeviceArray):
                if array.stream is not None:
                    cuda_memory.call(self._cuda, "cudaStreamSynchronize", array.stream)
                addresses[name] = array.pointer
            else:
                if name not in self._buffers:
                    shape = self._shape(name) if array is None else array.shape
                    self._buffers[name] = Buffer(self._cuda, shape, self._dtypes[name])
                addresses[name] = self._buffers[name].pointer
        if addresses == self._addresses:
            return True
        self._drop_recording()
        for name, address in addresses.items():
            self._check(self._context.set_tensor_address(name, address), f"take the memory of {name}")
        self._addresses = addresses
        return False

    def _upload(self, taken: Mapping[str, Any]) -> None:
        for name, array in taken.items():
            if isinstance(array, DeviceArray) or self._uploaded.get(name) is array:
                continue
            self._stream.upload(self._buffers[name], array)
            self._uploaded.pop(name, None)
            if not array.flags.writeable:
                self._uploaded[name] = array

    def _start(self, *, record: bool) -> None:
        if record and self._recordable and self._recording is None:
            try:
                self._recording = self._stream.record(self._execute)
            except SanaError as error:
                self._recordable = False
                self.notes = (*self.notes, f"{self.graph} runs without a CUDA graph: {error.message}")
                logger.warning(self.notes[-1])
        if self._recording is None:
            self._execute()
        else:
            self._recording.launch()

    def _execute(self) -> None:
        self._check(self._context.execute_async_v3(self._stream.handle), "run")

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise SanaError(
                f"the {self.graph} engine could not {what}: {self._reason()}",
                f"build it again: {self._entry.rebuild(force=True)}",
            )

    def _reason(self) -> str:
        return self._log.last or "TensorRT gives no reason"

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._context.get_tensor_shape(name))

    def _output(self, name: str, value: Any) -> DeviceArray:
        """A caller's array for an output."""
        if name not in self._outputs:
            raise InvalidInput(f"{self.graph} has no output {name}", f"it has {', '.join(self._outputs)}")
        array = device_array(value, name, stream=self._stream.handle)
        if array.readonly:
            raise InvalidInput(f"the array for output {name} is read-only", "give one that can be written")
        if (array.shape, array.dtype) != (self._shape(name), self._dtypes[name]):
            raise InvalidInput(
                f"the array for output {name} is {array.dtype} {written(array.shape)}",
                f"give {self._dtypes[name]} {written(self._shape(name))}",
            )
        return array

    def _drop_recording(self) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.close()

    def _forget(self) -> None:
        """Free what belongs to the last run's shapes."""
        self._stream.wait()
        self._drop_recording()
        for buffer in self._buffers.values():
            buffer.close()
        self._shapes, self._buffers, self._addresses, self._uploaded = {}, {}, {}, {}


def logger_class(trt: Any) -> Any:
    """A class of loggers for TensorRT that write into Python's log and keep the last error in ``last``."""
    severity_of = trt.ILogger.Severity
    errors = (severity_of.INTERNAL_ERROR, severity_of.ERROR)

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last = ""

        def log(self, severity: Any, msg: str) -> None:
            if severity in errors:
                # it ends up in a SanaError, where one line is enough
                self.last = msg.partition("\n")[0]
            chatter = severity in (severity_of.INFO, severity_of.VERBOSE)
            logger.log(logging.DEBUG if chatter else logging.INFO, "tensorrt: %s", msg)

    return Log
