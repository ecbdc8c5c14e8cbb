"""Running TensorRT engines without TensorRT and a GPU: against stand-ins made of the real bindings' names."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_export
import fake_tensorrt
import numpy as np
import pytest

from sana_edge.cli.main import main
from sana_edge.engines.engine import Settings
from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.engines.tensorrt import cuda as cuda_memory
from sana_edge.engines.tensorrt.backend import TensorRT
from sana_edge.engines.tensorrt.engine import TensorRTEngine
from sana_edge.engines.tensorrt.trust import check_loadable
from sana_edge.errors import InvalidInput, OutOfMemory, SanaError, UnsupportedDevice
from sana_edge.store.manifest import GRAPHS

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=fake_tensorrt.TABLES["tensorrt"], ids=lambda table: table["version"])
def table(request: pytest.FixtureRequest) -> Any:
    """Each version of the bindings."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder."""
    return Path(fake_export.write_folder(tmp_path / "onnx"))


def loaded(folder: Path, output: Path, trt: Any, cuda: Any) -> TensorRTEngine:
    entry = next(
        entry for entry in fake_export.built(folder, output, trt, cuda) if entry.key.graph == "denoiser"
    )
    return TensorRTEngine(entry, trt, cuda, inputs=fake_export.INPUTS)


def step(side: int, batch: int = 1) -> dict[str, np.ndarray]:
    latent = np.random.default_rng(side).normal(size=(batch, 4, side, side + 1)).astype(np.float32)
    return {"latent": latent, "scale": np.array([3], np.float32)}


def test_an_engine_computes_and_records_its_second_run(
    folder: Path, cache: Path, trt: Any, cuda: Any
) -> None:
    engine = loaded(folder, cache, trt, cuda)
    for _ in range(4):
        inputs = step(9)
        result = engine.run(inputs)
        np.testing.assert_array_equal(result["velocity"], inputs["latent"] * 3)
    # the first runs, the second is recorded, and what is recorded runs when it is launched
    assert (trt.state.executions, cuda.state.launches) == (4, 3)
    assert len(cuda.state.graphs) == 1
    assert len(cuda.state.memory) == 3
    inputs = step(40, batch=2)
    np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)
    assert (cuda.state.launches, len(cuda.state.graphs), len(cuda.state.memory)) == (3, 0, 3)
    assert engine._context._profile == 1
    engine.close()
    engine.close()
    assert not cuda.state.memory and not cuda.state.streams and not cuda.state.graphs
    with pytest.raises(SanaError, match="was closed"):
        engine.run(inputs)


def test_arrays_that_cannot_change_are_uploaded_once(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    engine = loaded(folder, cache, trt, cuda)
    inputs = step(9)
    inputs["scale"].flags.writeable = False
    for _ in range(3):
        # the same array, but one that can change
        inputs["latent"] += 1
        np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)
    assert [size for kind, size in cuda.state.copies if kind == "cudaMemcpyHostToDevice" and size == 4] == [4]
    inputs["scale"] = np.array([5], np.float32)
    np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 5)


def on_device(array: np.ndarray, **changed: Any) -> Any:
    """What CuPy's arrays show; the memory of the stand-in's device is the host's."""
    facts = {
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (array.ctypes.data, False),
        "version": 3,
    }
    return SimpleNamespace(__cuda_array_interface__={**facts, **changed}, kept=array)


def test_device_arrays_are_used_where_they_are(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    engine = loaded(folder, cache, trt, cuda)
    inputs, velocity = step(9), np.zeros((1, 4, 9, 10), np.float32)
    latent = np.ascontiguousarray(inputs["latent"])
    given = {"latent": on_device(latent, stream=1), "scale": inputs["scale"]}
    for _ in range(3):
        latent += 1
        assert engine.run(given, {"velocity": on_device(velocity)}) == {}
        np.testing.assert_array_equal(velocity, latent * 3)
    assert 1 in cuda.state.waits
    # only the scale was copied, and only for it there is a buffer
    assert {size for _, size in cuda.state.copies} == {4} and len(cuda.state.memory) == 1
    assert cuda.state.launches == 2
    # at other addresses what is recorded would read and write the wrong memory
    moved, other = latent + 1, np.zeros_like(velocity)
    engine.run({**given, "latent": on_device(moved)}, {"velocity": on_device(other)})
    np.testing.assert_array_equal(other, moved * 3)
    assert cuda.state.launches == 2


def test_outputs_must_fit(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    engine, inputs = loaded(folder, cache, trt, cuda), step(9)
    right = np.zeros((1, 4, 9, 10), np.float32)
    for name, array, message in (
        ("pixels", on_device(right), "has no output pixels"),
        ("velocity", on_device(right[:, :3].copy()), r"is float32 \(1, 3, 9, 10\)"),
        ("velocity", on_device(right.astype(np.float16)), "is float16"),
        ("velocity", on_device(right, data=(right.ctypes.data, True)), "read-only"),
    ):
        with pytest.raises(InvalidInput, match=message):
            engine.run(inputs, {name: array})
    np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)


def test_wrong_inputs_are_named_and_the_engine_goes_on(
    folder: Path, cache: Path, trt: Any, cuda: Any
) -> None:
    engine, inputs = loaded(folder, cache, trt, cuda), step(9)
    with pytest.raises(
        InvalidInput, match=r"size 2592x2560 is outside of what .* built for, 256x256 to 2048"
    ):
        engine.run(step(80))
    with pytest.raises(InvalidInput, match="float64"):
        engine.run({**inputs, "scale": np.ones(1)})
    with pytest.raises(InvalidInput, match="no input for scale"):
        engine.run({"latent": inputs["latent"]})
    np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)


def test_without_a_graph_it_runs_all_the_same(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    engine, inputs = loaded(folder, cache, trt, cuda), step(9)
    cuda.state.fails["cudaStreamBeginCapture"] = "cudaErrorStreamCaptureInvalidated"
    for _ in range(3):
        np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)
    assert cuda.state.launches == 0
    assert len(engine.notes) == 1 and "without a CUDA graph" in engine.notes[0]


def test_failures_of_the_device(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    engine, inputs = loaded(folder, cache, trt, cuda), step(9)
    cuda.state.free = 10
    with pytest.raises(OutOfMemory, match="not enough GPU memory"):
        engine.run(inputs)
    cuda.state.free = 1 << 40
    np.testing.assert_array_equal(engine.run(inputs)["velocity"], inputs["latent"] * 3)
    trt.state.fails.add("execute")
    with pytest.raises(SanaError, match="could not run") as refused:
        engine.run(step(10))
    # that it is there and whole is no reason to keep it
    assert refused.value.hint == f"build it again: sana-edge build {folder} --output {cache} --force"
    trt.state.fails.add("context")
    with pytest.raises(OutOfMemory, match="denoiser"):
        loaded(folder, cache, trt, cuda)
    for code, kind in (("cudaErrorInsufficientDriver", "driver"), ("cudaErrorNoDevice", "no NVIDIA GPU")):
        cuda.state.fails["cudaGetDevice"] = code
        with pytest.raises(UnsupportedDevice, match=kind):
            cuda_memory.machine(cuda, "10.0")


def test_a_corrupt_engine_names_the_command(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    entry = fake_export.built(folder, cache, trt, cuda)[0]
    entry.path.write_bytes(b"\0" * entry.bytes)
    with pytest.raises(SanaError, match="is damaged") as refused:
        check_loadable(entry, trust=True)
    assert refused.value.hint == f"build it again: sana-edge build {folder} --output {cache}"
    # as if it had been written like that
    with pytest.raises(SanaError, match=r"cannot load .*: Serialization assertion failed") as refused:
        TensorRTEngine(entry, trt, cuda, inputs=fake_export.INPUTS)
    command = f"sana-edge build {folder} --output {cache}"
    assert refused.value.hint == f"build it again: {command} --force"
    with pytest.raises(SanaError, match=r"cannot read .*empty"):
        entry.path.write_bytes(b"")
        TensorRTEngine(entry, trt, cuda, inputs=fake_export.INPUTS)
    for flags in ([], ["--force"]):
        # of the right size, as a disk makes it
        entry.path.write_bytes(b"\0" * entry.bytes)
        assert main([*shlex.split(command)[1:], *flags, "--quiet"]) == 0
        check_loadable(entry, trust=True)
        TensorRTEngine(entry, trt, cuda, inputs=fake_export.INPUTS).close()
    # the first built one, the second all
    assert trt.state.built == 2 * len(GRAPHS) + 1


def test_load_finds_the_engine_of_this_machine(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    kind, graph = TensorRT.probe("cuda", Settings(dtype="fp16")), folder / "decoder.onnx"
    assert kind.title == f"TensorRT {trt.__version__} on NVIDIA GeForce RTX 4070 Laptop GPU, fp16"
    with pytest.raises(SanaError, match="has no engine of sana-tiny's decoder") as refused:
        kind.load(graph)
    assert refused.value.hint == f"build it: sana-edge build {folder} --output {cache / 'engines'}"
    fake_export.built(folder, engine_cache.engine_folder(), trt, cuda)
    engine = kind.load(graph)
    assert (engine.graph, engine.name, engine.device, engine.precision) == (
        *("decoder", "tensorrt", "cuda"),
        "fp16",
    )
    trt.__version__ = "99.1.0"
    with pytest.raises(SanaError, match=r"another TensorRT version \(.*, this is 99.1.0\)"):
        kind.load(graph)


def test_precisions_that_cannot_be_asked_for(trt: Any) -> None:
    with pytest.raises(InvalidInput, match="graphs' own fp16, not in fp32") as refused:
        TensorRT.probe("cuda", Settings(dtype="fp16", precision="fp32"))
    assert refused.value.hint == (
        "choose dtype auto, or `sana-edge export MODEL --dtype fp32 --output DIR`, then `sana-edge build DIR`"
    )
    trt.__version__ = "10.5.0"
    assert TensorRT.probe("cuda", Settings(dtype="fp16")).precision == "fp16"
    with pytest.raises(UnsupportedDevice, match=r"TensorRT 10\.5\.0 is too old, bf16 graphs need 10\.6"):
        TensorRT.probe("cuda", Settings(dtype="bf16"))


def test_the_real_bindings_without_a_gpu_say_so() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU here")
    with pytest.raises(UnsupportedDevice, match=r"driver|no NVIDIA GPU"):
        cuda_memory.machine(runtime, "10.6")
    with pytest.raises(UnsupportedDevice):
        cuda_memory.Stream(runtime)
    assert cuda_memory.driver_version(runtime) == "cuda0.0"


@pytest.mark.gpu
def test_real_device_memory_and_a_recorded_copy() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaGetDeviceCount()[0] != runtime.cudaError_t.cudaSuccess:
        pytest.skip("no CUDA device")
    assert cuda_memory.machine(runtime, "10.6").capability >= (5, 0)
    stream = cuda_memory.Stream(runtime)
    source, target = (cuda_memory.Buffer(runtime, (3, 5), np.float32) for _ in range(2))
    array, back = (
        np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        np.zeros((3, 5), np.float32),
    )

    def copy() -> None:
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        given = (target.pointer, source.pointer, array.nbytes, kind, stream.handle)
        cuda_memory.call(runtime, "cudaMemcpyAsync", *given)

    recording = stream.record(copy)
    for _ in range(2):
        array += 1
        stream.upload(source, array)
        recording.launch()
        stream.download(back, target.pointer)
        stream.wait()
        np.testing.assert_array_equal(back, array)
    with pytest.raises(ZeroDivisionError):
        stream.record(lambda: 1 // 0)
    # what failed to be recorded leaves the stream usable
    stream.upload(source, array)
    stream.wait()
    with pytest.raises(OutOfMemory):
        cuda_memory.Buffer(runtime, (1 << 50,), np.float32)
    for closed in (recording, source, target, stream):
        closed.close()
