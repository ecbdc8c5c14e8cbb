"""The choice of an engine, the checks of inputs; and no engine needs torch."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_export
import numpy as np
import pytest

from sana_edge.engines import choose as engines
from sana_edge.engines import ports
from sana_edge.engines.choose import choose
from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.errors import CheckpointError, InvalidInput, MissingDependency, OutOfMemory, SanaError
from sana_edge.store.manifest import GRAPHS

PORTS = {
    "latent": ("float32", ("B", 32, "h", "w")),
    "keys": ("float32", (2, "B", "L")),
    "timestep": ("float32", (1,)),
}


def inputs(**changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "latent": np.zeros((2, 32, 3, 5), np.float32),
        "keys": np.zeros((2, 2, 7), np.float32),
        "timestep": np.zeros(1, np.float32),
    }
    return {name: value for name, value in (found | changed).items() if value is not None}


def test_inputs_give_the_sizes() -> None:
    assert ports.check_inputs("denoiser", inputs(), PORTS) == {"B": 2, "h": 3, "w": 5, "L": 7}


@pytest.mark.parametrize(
    ("changed", "message", "hint"),
    [
        ({"keys": None}, "no input for keys", "latent, keys, timestep"),
        ({"value": np.zeros(1)}, "has no input value", "latent, keys, timestep"),
        ({"latent": np.zeros((2, 32, 3, 5))}, "latent is float64", "float32"),
        ({"latent": np.zeros((2, 31, 3, 5), np.float32)}, "latent is (2, 31, 3, 5)", "give (B, 32, h, w)"),
        ({"latent": np.zeros((2, 32, 3), np.float32)}, "latent is (2, 32, 3)", "give (B, 32, h, w)"),
        ({"keys": np.zeros((2, 3, 7), np.float32)}, "keys is (2, 3, 7)", "give (2, B, L) with B = 2, as in"),
        ({"timestep": np.zeros(2, np.float32)}, "timestep is (2,)", "give (1,)"),
    ],
)
def test_wrong_inputs(changed: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        ports.check_inputs("denoiser", inputs(**changed), PORTS)
    assert message in caught.value.message and caught.value.message.startswith("denoiser")
    assert hint in caught.value.hint


def test_shapes_of_outputs() -> None:
    sizes = {"h": 3, "w": 5}
    assert ports.known_shape((1, 3, "32h", "32*w"), sizes) == (1, 3, 96, 160)
    assert ports.known_shape(("B", "h"), sizes) is None
    assert ports.known_shape((), sizes) == ()


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("std::bad_alloc", OutOfMemory, "not enough memory"),
        ("x\nFailed to allocate memory for requested buffer of size 1", OutOfMemory, "not enough memory"),
        ("Invalid usage of method for externally stored data in file", CheckpointError, "weights"),
        ("Could not find an implementation for MatMul(13)", CheckpointError, "dtype"),
        ("No conversion rule found for operations: F-21", CheckpointError, "operation"),
        ("", CheckpointError, "cannot load"),
    ],
)
def test_failures_while_loading(text: str, kind: type[SanaError], words: str) -> None:
    error = ports.load_failure(Path("a/denoiser.onnx"), "openvino", RuntimeError(text))
    assert type(error) is kind and words in error.message and error.hint
    assert "\n" not in error.message and "denoiser.onnx" in error.message + error.hint


def test_failures_while_running() -> None:
    lost = ports.run_failure("decoder", "openvino", {"h": 32}, MemoryError())
    assert isinstance(lost, OutOfMemory)
    assert lost.message.startswith("not enough memory for decoder with h = 32 in openvino")
    other = ports.run_failure("decoder", "openvino", {}, RuntimeError("Exception from src/a.cpp:1:\nno"))
    assert type(other) is SanaError and other.message == "openvino failed in decoder: no"


def test_said_is_short() -> None:
    text = "[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Load model from a.onnx failed"
    assert ports.said(RuntimeError(text)) == "Load model from a.onnx failed"
    assert len(ports.said(RuntimeError("x" * 999))) == 200


@pytest.mark.parametrize("content", [None, b""])
def test_files_that_are_no_graphs(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"decoder\.onnx"):
        ports.check_file(path)


# the choice


def fake(name: str, **able: SanaError | None) -> type[EngineKind]:
    """A kind of engine: what it can do by device."""

    class Fake(EngineKind):
        devices = engines._KINDS[name].devices

        @classmethod
        def probe(cls, device: str, settings: Settings) -> EngineKind:
            refused = able.get(device, MissingDependency(f"{device} is missing", f"install {name}"))
            if refused is not None:
                raise refused
            if name == "tensorrt" and settings.folder:
                hint = f"build it: sana-edge build {settings.folder}"
                raise SanaError(f"{settings.engine_folder} has no engine", hint)
            return cls(device, "fp32", f"{name} 1 on {device}", settings)

    Fake.name = name
    return Fake


def offer(monkeypatch: pytest.MonkeyPatch, *kinds: type[EngineKind]) -> None:
    known = {name: fake(name) for name in engines.NAMES} | {kind.name: kind for kind in kinds}
    monkeypatch.setattr(engines, "_KINDS", known)


def test_auto_takes_the_first_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, fake("openvino", cpu=None), fake("onnxruntime", cpu=None))
    kind = choose()
    assert (kind.name, kind.device, kind.precision, kind.title) == (
        *("openvino", "cpu", "fp32"),
        "openvino 1 on cpu",
    )
    assert kind.reasons == {
        "tensorrt cuda": "cuda is missing; install tensorrt",
        "onnxruntime cuda": "cuda is missing; install onnxruntime",
    }
    offer(monkeypatch, fake("onnxruntime", cpu=None))
    kind = choose()
    assert kind.name == "onnxruntime" and kind.reasons["openvino cpu"] == "cpu is missing; install openvino"
    offer(monkeypatch, fake("openvino", cpu=None), fake("onnxruntime", cuda=None))
    assert choose().device == "cuda" and choose(device="cpu").name == "openvino"
    offer(monkeypatch, fake("tensorrt", cuda=None), fake("onnxruntime", cuda=None))
    assert [choose(device=device).name for device in ("auto", "cuda", "gpu")] == ["tensorrt"] * 3


def exported(path: Path, size: int) -> Path:
    """A folder whose graphs have so many bytes."""
    fake_export.write_folder(path)
    for name in GRAPHS:
        (path / f"{name}.onnx").unlink()
        (path / f"{name}.onnx").touch()
    # with a hole, which takes no space on the disk
    os.truncate(path / "denoiser.onnx.data", size)
    fake_export.write_manifest(path)
    return path


def test_on_a_cpu_the_size_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engines, "SMALL", 5000)
    small, large = exported(tmp_path / "small", 4999), exported(tmp_path / "large", 5000)
    offer(monkeypatch, fake("openvino", cpu=None), fake("onnxruntime", cpu=None))
    for device in ("auto", "cpu"):
        kind = choose(device=device, folder=small)
        assert kind.name == "onnxruntime"
        assert kind.reasons["openvino cpu"].startswith("onnxruntime starts faster with a small model, 0 MB")
        kind = choose(device=device, folder=large)
        assert kind.name == "openvino"
        assert kind.reasons["onnxruntime cpu"] == "openvino is faster for models of this size, 0 MB"
    for name in ("openvino", "onnxruntime"):
        assert choose(name, folder=small).name == choose(name, folder=large).name == name
    # what cannot be used is no choice, and has its own reason
    offer(monkeypatch, fake("openvino", cpu=None))
    kind = choose(device="cpu", folder=small)
    assert kind.name == "openvino" and kind.reasons == {
        "onnxruntime cpu": "cpu is missing; install onnxruntime"
    }
    offer(monkeypatch, fake("onnxruntime", cpu=None))
    kind = choose(device="cpu", folder=large)
    assert kind.name == "onnxruntime" and kind.reasons == {"openvino cpu": "cpu is missing; install openvino"}
    # nor does it matter on a GPU
    offer(monkeypatch, fake("openvino", cpu=None), fake("onnxruntime", cpu=None, cuda=None))
    assert choose(folder=small).reasons.keys() == {"tensorrt cuda"}


def test_tensorrt_without_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, settings = fake_export.write_folder(tmp_path / "onnx"), Settings(engine_folder=Path("e"))
    offer(monkeypatch, fake("tensorrt", cuda=None), fake("onnxruntime", cuda=None))
    kind = choose(folder=folder, settings=settings)
    assert (kind.name, kind.device, kind.settings.dtype) == ("onnxruntime", "cuda", "fp16")
    assert kind.reasons == {"tensorrt cuda": f"e has no engine; build it: sana-edge build {folder}"}
    with pytest.raises(SanaError, match=r"no engine can be used, tensorrt cuda: e has no engine$") as caught:
        choose("tensorrt", folder=folder, settings=settings)
    assert caught.value.hint == f"build it: sana-edge build {folder}"


def test_no_gpu_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    with pytest.raises(MissingDependency) as caught:
        choose(device="gpu")
    assert all(name in caught.value.message for name in engines.NAMES)
    # neither of the two is the one to install without asking whose GPU it is
    assert all(words in caught.value.hint for words in ("Intel", "NVIDIA", "onnxruntime-gpu", "--device cpu"))
    with pytest.raises(MissingDependency) as caught:
        choose("openvino", "gpu")
    assert caught.value.hint == "install openvino"


def test_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, fake("openvino", cpu=None), fake("onnxruntime", cpu=None))
    kind = choose("onnxruntime")
    assert kind.name == "onnxruntime" and kind.reasons["openvino cpu"] == "onnxruntime was asked for"


def test_nothing_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    with pytest.raises(MissingDependency) as caught:
        choose("openvino")
    assert caught.value.message == "no engine can be used, openvino cpu: cpu is missing"
    assert caught.value.hint == "install openvino"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"asked": "tensorflow"}, "unknown engine 'tensorflow'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"settings": Settings(precision="int4")}, "unknown precision 'int4'"),
        ({"settings": Settings(threads=0)}, "threads is 0"),
        ({"asked": "openvino", "device": "cuda"}, "openvino does not run on device cuda"),
        ({"asked": "onnxruntime", "device": "npu"}, "onnxruntime does not run on device npu"),
        ({"asked": "tensorrt", "device": "cpu"}, "tensorrt does not run on device cpu"),
        (
            {"asked": "tensorrt", "device": "tensorrt"},
            "device tensorrt is onnxruntime's own TensorRT, not the engines of `sana-edge build`",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        choose(**arguments)
    assert caught.value.message == message and caught.value.hint.startswith("choose ")


def test_a_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        choose(folder=tmp_path)


ON_CPU = ("onnxruntime", "openvino")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_missing_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(module: str, *arguments: Any, **keywords: Any) -> Any:
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(module, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependency) as caught:
        choose(name, "cpu")
    assert f"{name} is not installed" in caught.value.message
    assert caught.value.hint == f"pip install 'sana-edge[{'onnx' if name == 'onnxruntime' else name}]'"


@pytest.mark.parametrize("name", ON_CPU)
def test_an_old_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.setattr(module, "__version__", "0.9.1-7-abc")
    with pytest.raises(MissingDependency, match=f"{name} 0.9.1-7-abc is too old"):
        choose(name, "cpu")


def test_survey_tells_of_all() -> None:
    found = {place: (usable, detail) for place, usable, detail in engines.survey()}
    assert list(found) == [
        "tensorrt cuda",
        *("onnxruntime cpu", "onnxruntime cuda", "onnxruntime tensorrt"),
        *("openvino cpu", "openvino gpu", "openvino npu"),
    ]
    assert all(detail for _, detail in found.values())


# without torch

WITHOUT_TORCH = """
import json, sys
from pathlib import Path
import numpy as np

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "diffusers", "onnx"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from sana_edge.engines import choose as engines
engine = engines.choose(sys.argv[1], "cpu").load(Path(sys.argv[2]))
x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
print(json.dumps(engine.run({"x": x})["y"].tolist()))
"""


@pytest.mark.parametrize("name", ON_CPU)
def test_engines_need_no_torch(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    port = [onnx.helper.make_tensor_value_info(side, 1, ["B", "h", 4]) for side in "xy"]
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", port[:1], port[1:])
    path = tmp_path / "g.onnx"
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    command = [sys.executable, "-c", WITHOUT_TORCH, name, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == np.arange(24.0).reshape(2, 3, 4).tolist()
