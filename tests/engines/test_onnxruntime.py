"""Graphs in onnxruntime: what they compute, what is refused, and the words for what is damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_graphs

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from sana_edge import Sana  # noqa: E402
from sana_edge.engines import onnxruntime  # noqa: E402
from sana_edge.engines.choose import choose  # noqa: E402
from sana_edge.engines.engine import EngineKind, Settings  # noqa: E402
from sana_edge.errors import (  # noqa: E402
    CheckpointError,
    InvalidInput,
    MissingDependency,
    OutOfMemory,
    SanaError,
    UnsupportedDevice,
)
from sana_edge.store.known_models import BUNDLED  # noqa: E402

product: Callable[..., Path] = small_graphs.product
huge: Callable[[Path], Path] = small_graphs.huge
largest_int8: Callable[[Path], Path] = small_graphs.largest_int8
damaged: dict[str, tuple[Callable[[Path], Path], str]] = small_graphs.DAMAGED
expected: Callable[[Any], Any] = small_graphs.expected
PORTS = {"x": ("float32", ("B", "h", 8))}, {"y": ("float32", ("B", "h", 8))}


@pytest.fixture
def kind() -> EngineKind:
    return choose("onnxruntime", "cpu", settings=Settings(threads=1))


def test_computes(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "denoiser.onnx"))
    assert (engine.graph, engine.name, engine.device, engine.precision) == (
        *("denoiser", "onnxruntime", "cpu"),
        "fp32",
    )
    assert kind.title.startswith("onnxruntime 1.") and kind.title.endswith("on cpu, 1 thread")
    for rows in (3, 5, 3):
        x = np.random.default_rng(rows).standard_normal((2, rows, 8), np.float32)
        # sums of 8 products, in another order
        np.testing.assert_allclose(engine.run({"x": x})["y"], expected(x), rtol=0, atol=1e-5)


def test_int8_sums_are_exact(kind: EngineKind, tmp_path: Path) -> None:
    """Also on CPUs without VNNI, whose INT8 instructions saturate."""
    engine = kind.load(largest_int8(tmp_path / "g.onnx"))
    x = np.full((1, 3, 64), 127, np.float32)
    x[0, 1] = -127
    # integers below 2^24
    assert engine.run({"x": x})["y"][0].tolist() == [[s * 64 * 127**2] * 4 for s in (1, -1, 1)]


def test_outputs_belong_to_the_caller(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "g.onnx"), *PORTS)
    x = np.ones((1, 2, 8), np.float32)
    first = engine.run({"x": x})["y"]
    kept = first.copy()
    # the same array with another content, which is bound already
    x[:] = 2
    second = engine.run({"x": x})["y"]
    assert first is not second and np.array_equal(first, kept)
    np.testing.assert_allclose(second, 2 * kept, rtol=1e-6)


def test_any_memory(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "g.onnx"))
    x = np.random.default_rng(0).standard_normal((8, 3, 2), np.float32).T
    fixed = np.ascontiguousarray(x)
    fixed.flags.writeable = False
    for given in (x, fixed, fixed, x):
        np.testing.assert_allclose(engine.run({"x": given})["y"], expected(x), rtol=0, atol=1e-5)


def test_refuses_inputs(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "g.onnx"))
    with pytest.raises(InvalidInput) as caught:
        engine.run({"x": np.zeros((1, 2, 7), np.float32)})
    assert (caught.value.message, caught.value.hint) == ("g: x is (1, 2, 7)", "give (B, h, 8)")
    engine.close()
    with pytest.raises(SanaError, match="the engine of g is closed"):
        engine.run({"x": np.zeros((1, 2, 8), np.float32)})


@pytest.mark.parametrize("name", damaged)
def test_damaged(name: str, kind: EngineKind, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, words = damaged[name]
    with pytest.raises(CheckpointError) as caught:
        kind.load(make(tmp_path / "denoiser.onnx"))
    assert words in caught.value.message and "denoiser.onnx" in caught.value.message
    assert caught.value.hint and "\n" not in caught.value.message
    assert capfd.readouterr() == ("", "")


def test_bf16_is_refused(kind: EngineKind, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="in its dtype") as caught:
        kind.load(product(tmp_path / "g.onnx", onnx.TensorProto.BFLOAT16))
    command = "`sana-edge export MODEL --dtype {} --output DIR`"
    assert caught.value.hint == f"{command.format('fp32')}, or use another engine"
    with pytest.raises(InvalidInput, match="no bf16 products") as refused:
        choose("onnxruntime", "cpu", settings=Settings(dtype="bf16"))
    assert refused.value.hint == f"{command.format('fp32')}, or install openvino"
    for precision, able in (("fp16", command.format("fp16")), ("bf16", "install openvino")):
        with pytest.raises(InvalidInput, match=f"own fp32, not in {precision}") as refused:
            choose("onnxruntime", "cpu", settings=Settings(precision=precision))
        assert refused.value.hint == f"choose dtype auto, or {able}"


def test_memory(kind: EngineKind, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = kind.load(huge(tmp_path / "decoder.onnx"))
    n = 1 << 20
    with pytest.raises(OutOfMemory, match=r"memory for decoder with n = 1048576"):
        engine.run({"column": np.ones((n, 1), np.float32), "row": np.ones((1, n), np.float32)})
    # it still works
    few = engine.run({"column": np.ones((2, 1), np.float32), "row": np.ones((1, 2), np.float32)})
    assert few["y"] == pytest.approx(np.sin(1), rel=1e-6)
    assert capfd.readouterr() == ("", "")


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (least,) = re.findall(r'"onnxruntime>=([\d.]+)"', project)
    assert tuple(map(int, least.split("."))) == onnxruntime._OLDEST
    runtime = onnxruntime._runtime()
    monkeypatch.setattr(runtime, "__version__", f"{least}.0")
    assert choose("onnxruntime", "cpu").title.startswith(f"onnxruntime {least}.0")
    monkeypatch.setattr(runtime, "__version__", "1.19.2")
    with pytest.raises(MissingDependency, match=rf"onnxruntime 1\.19\.2 is too old, {least} is needed"):
        choose("onnxruntime", "cpu")


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = onnxruntime._runtime()
    if "CUDAExecutionProvider" in runtime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    for device in ("cuda", "tensorrt"):
        with pytest.raises(UnsupportedDevice, match=f"built without {device}") as caught:
            choose("onnxruntime", device)
        assert "onnxruntime-gpu" in caught.value.hint
    # there, but its libraries do not load: sessions go on with the CPU
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(UnsupportedDevice, match="its libraries do not load"):
        choose("onnxruntime", "cuda")


def test_options_of_providers(tmp_path: Path) -> None:
    kind = onnxruntime.OnnxRuntime("tensorrt", "fp16", "", Settings(cache=tmp_path))
    (tensorrt, options), (cuda, memory), cpu = onnxruntime._providers(kind)
    assert (tensorrt, cuda, cpu) == (
        *("TensorrtExecutionProvider", "CUDAExecutionProvider"),
        "CPUExecutionProvider",
    )
    assert options["trt_engine_cache_path"] == str(tmp_path) and options["trt_fp16_enable"] == "True"
    assert memory["arena_extend_strategy"] == "kSameAsRequested"


def test_the_number_of_threads_changes_no_pixel() -> None:
    """On one machine: the products of the bundled INT8 model are split by rows and columns, not by sums."""
    pictures = []
    for threads in (1, 2, 3):
        with Sana.load("sana-tiny", int8=True, backend="onnxruntime", threads=threads) as sana:
            pictures.append(sana.generate("a red house", seed=3, steps=2).pixels)
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])


@pytest.mark.parametrize("names", [("text_encoder", "denoiser"), ("decoder", "text_projection")])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_graphs_that_were_swapped(tmp_path: Path, backend: str, names: tuple[str, str]) -> None:
    pytest.importorskip(backend)
    folder = tmp_path / "onnx"
    shutil.copytree(BUNDLED / "sana-tiny-int8-onnx", folder)
    content = json.loads((folder / "manifest.json").read_text())
    first, second = (content["graphs"][name] for name in names)
    first["file"], second["file"] = second["file"], first["file"]
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(SanaError), Sana.load(str(folder), backend=backend) as sana:
        list(sana.stream("a red house", steps=1))
