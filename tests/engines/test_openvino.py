"""Graphs in OpenVINO: what they compute, in which precision, sizes, the cache, and the words for damage."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_graphs

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from sana_edge.engines.choose import choose  # noqa: E402
from sana_edge.engines.engine import EngineKind, Settings  # noqa: E402
from sana_edge.engines.openvino import backend, parts  # noqa: E402
from sana_edge.engines.openvino import engine as engine_module  # noqa: E402
from sana_edge.engines.openvino.engine import OpenVinoEngine, _config  # noqa: E402
from sana_edge.errors import (  # noqa: E402
    CheckpointError,
    InvalidInput,
    OutOfMemory,
    SanaError,
    UnsupportedDevice,
)

product: Callable[..., Path] = small_graphs.product
phases: Callable[[Path], Path] = small_graphs.phases
expected_phases: Callable[[float], Any] = small_graphs.expected_phases
huge: Callable[[Path], Path] = small_graphs.huge
largest_int8: Callable[[Path], Path] = small_graphs.largest_int8
damaged: dict[str, tuple[Callable[[Path], Path], str]] = small_graphs.DAMAGED
expected: Callable[[Any], Any] = small_graphs.expected
PORTS = {"x": ("float32", ("B", "h", 8))}, {"y": ("float32", ("B", "h", 8))}


@pytest.fixture
def kind() -> EngineKind:
    return choose("openvino", "cpu", settings=Settings(threads=1, precision="fp32"))


def needs_bf16() -> None:
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bf16")


@pytest.mark.parametrize("ports", [(), PORTS], ids=["its own ports", "ports of the manifest"])
def test_computes(kind: EngineKind, ports: Any, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "denoiser.onnx"), *ports)
    assert (engine.graph, engine.name, engine.device, engine.precision) == (
        *("denoiser", "openvino", "cpu"),
        "fp32",
    )
    assert kind.title.startswith("openvino 20") and kind.title.endswith("fp32, 1 thread")
    for rows in (3, 5, 7, 3):
        x = np.random.default_rng(rows).standard_normal((2, rows, 8), np.float32)
        # sums of 8 products, in another order
        np.testing.assert_allclose(engine.run({"x": x})["y"], expected(x), rtol=0, atol=1e-5)


def test_keeps_few_sizes(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "g.onnx"), *PORTS)
    assert isinstance(engine, OpenVinoEngine)
    for rows in (3, 5, 3, 7):
        engine.run({"x": np.zeros((1, rows, 8), np.float32)})
    assert [dict(key) for key in engine._requests] == [{"B": 1, "h": 3}, {"B": 1, "h": 7}]
    request = next(iter(engine._requests.values()))
    assert request.get_compiled_model().inputs[0].get_shape() == [1, 3, 8]


LENGTHS = """if True:
    import sys
    from pathlib import Path
    import numpy as np, psutil
    from sana_edge.engines.choose import choose
    from sana_edge.engines.engine import Settings
    kind = choose("openvino", "cpu", settings=Settings(threads=1, precision="fp32"))
    engine = kind.load(Path(sys.argv[1]))
    used = []
    for length in [300, *range(1, 65), 300, *range(65, 300, 2)]:
        engine.run({"x": np.ones((1, length, 64), np.float32)})
        used.append(psutil.Process().memory_info().rss)
    print(used[-1] - used[65])
"""


def test_lengths_do_not_add_up(tmp_path: Path) -> None:
    """A graph that has seen many lengths holds no more than after the longest one, in its own process."""
    path = small_graphs.attention(tmp_path / "g.onnx")
    done = subprocess.run([sys.executable, "-c", LENGTHS, str(path)], capture_output=True, text=True)
    # 64 compiled products of each kind are reached within the first 65 lengths; with all of them it is 20 MB
    assert int(done.stdout) < 4_000_000, done.stderr


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
    # memory of this size goes back to the system once it is freed
    large = np.random.default_rng(0).standard_normal((8, 100_000, 2), np.float32).T
    for _ in range(3):
        np.testing.assert_allclose(engine.run({"x": large})["y"], expected(large), rtol=0, atol=1e-4)


def test_precision(tmp_path: Path) -> None:
    needs_bf16()
    kind = choose("openvino", "cpu", settings=Settings(threads=1))
    assert kind.precision == "bf16"
    path = product(tmp_path / "g.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 8), np.float32)
    error = np.abs(kind.load(path).run({"x": x})["y"] - expected(x)).max()
    # values and weights up to 3 have steps of 2^-7 at most, and sums of 8 products up to 20 of 2^-4
    assert 1e-4 < error < 0.2


def test_phases_stay_exact(tmp_path: Path) -> None:
    """Angles up to 999 in bf16 have steps of 4, and sines of them no meaning."""
    needs_bf16()
    kind = choose("openvino", "cpu", settings=Settings(threads=1, precision="bf16"))
    engine = kind.load(phases(tmp_path / "g.onnx"))
    values = engine.run({"t": np.array([999], np.float32)})
    assert list(values) == ["y"]
    # sines and weights rounded to 2^-9, 8 products of up to 3
    assert np.abs(values["y"] - expected_phases(999)).max() < 8 * 3 * 2**-8


def test_unsupported_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    core = type("Core", (), {"get_property": lambda self, device, name: ["FP32", "INT8"]})()
    assert backend._precision(core, "cpu", Settings()) == "fp32"
    with pytest.raises(InvalidInput, match="cannot compute in bf16 on this cpu") as caught:
        backend._precision(core, "cpu", Settings(precision="bf16"))
    assert caught.value.hint == "choose dtype auto, fp32"
    assert backend._precision(core, "gpu", Settings()) == "fp32"
    assert backend._precision(core, "gpu", Settings(dtype="fp16")) == "fp16"
    assert backend._precision(core, "npu", Settings()) == "fp16"


def test_refuses_inputs(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(product(tmp_path / "g.onnx"), *PORTS)
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


def test_memory(kind: EngineKind, tmp_path: Path) -> None:
    engine = kind.load(huge(tmp_path / "decoder.onnx"))
    n = 1 << 20
    with pytest.raises(OutOfMemory, match=r"memory for decoder.*: 4398\.0 GB more are needed, .* free"):
        engine.run({"column": np.ones((n, 1), np.float32), "row": np.ones((1, n), np.float32)})
    # it still works
    few = engine.run({"column": np.ones((2, 1), np.float32), "row": np.ones((1, 2), np.float32)})
    assert few["y"] == pytest.approx(np.sin(1), rel=1e-6)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_ports_that_say_something_else_than_the_graph(name: str, tmp_path: Path) -> None:
    kind, path = choose(name, "cpu", settings=Settings(threads=1)), product(tmp_path / "g.onnx")
    for wrong in (
        {"x": ("float32", ("B", "h", 7))},
        {"x": ("float16", ("B", "h", 8))},
        {"x": ("float32", ("B", 8))},
        {"z": ("float32", ("B", "h", 8))},
        {**PORTS[0], "z": ("float32", (1,))},
    ):
        with pytest.raises(CheckpointError, match=r"is another graph: its [xz] is"):
            kind.load(path, wrong, PORTS[1])
    with pytest.raises(CheckpointError, match="is another graph: its y is float32"):
        kind.load(path, PORTS[0], {"y": ("float32", ("B", "h", 999))})


def test_cache(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    kind = choose("openvino", "cpu", settings=Settings(threads=1, precision="fp32", cache=folder))
    x = np.ones((1, 2, 8), np.float32)
    for _ in range(2):
        engine = kind.load(product(tmp_path / "g.onnx"))
        np.testing.assert_allclose(engine.run({"x": x})["y"], expected(x), rtol=0, atol=1e-5)
        assert engine.notes == ()
    (kept,) = folder.iterdir()
    # damaged, it is made again
    kept.write_bytes(kept.read_bytes()[:50])
    np.testing.assert_allclose(
        kind.load(tmp_path / "g.onnx").run({"x": x})["y"], expected(x), rtol=0, atol=1e-5
    )


def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = Settings(threads=1, precision="fp32", cache=tmp_path / "file" / "cache")
    engine = choose("openvino", "cpu", settings=settings).load(product(tmp_path / "g.onnx"))
    (note,) = engine.notes
    assert "not kept" in note and "Not a directory" in note
    assert engine.run({"x": np.zeros((1, 2, 8), np.float32)})["y"].shape == (1, 2, 8)


@pytest.mark.parametrize("device", ["gpu", "npu"])
def test_missing_devices(device: str) -> None:
    if any(found.startswith(device.upper()) for found in openvino.Core().available_devices):
        pytest.skip(f"this machine has a {device}")
    with pytest.raises(UnsupportedDevice, match=device) as caught:
        choose("openvino", device)
    assert "driver" in caught.value.hint and "--device cpu" in caught.value.hint
    # plain words: neither paths nor OpenVINO's own
    assert not any(words in caught.value.message for words in ("/", "key", "\n"))


@pytest.mark.parametrize(
    ("device", "there", "text", "expected"),
    [
        (
            *("gpu", False),
            'a.cpp:1:\nCannot load library "/a/libopenvino_intel_gpu_plugin.so": '
            "libOpenCL.so.1: cannot open shared object file: No such file or directory",
            "no Intel GPU driver (libOpenCL.so.1 is missing)",
        ),
        ("npu", False, "Unsupported configuration key: FULL_DEVICE_NAME", "openvino finds no npu"),
        ("gpu", True, "Exception from src/a.cpp:1:\nno context", "openvino cannot use gpu: no context"),
        (
            *("cpu", True),
            "/a/libopenvino_intel_cpu_plugin.so: cannot open shared object file",
            "openvino cannot use cpu: /a/libopenvino_intel_cpu_plugin.so: cannot open shared object file",
        ),
    ],
)
def test_why_a_device_is_refused(device: str, there: bool, text: str, expected: str) -> None:
    assert backend._refusal(device, there, RuntimeError(text)) == expected


def test_configuration_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path))
    config, notes = _config(backend.OpenVino("gpu", "fp16", "", Settings(threads=1)))
    assert config == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f16",
        "CACHE_DIR": str(tmp_path / "openvino"),
    }
    assert not notes


def wide_convolution(path: Path, channels: int, bias: bool) -> tuple[Path, Callable[[Any], Any]]:
    """An INT8 convolution as exports have it, (1, 8, h, w) to (1, channels, h, w), and what it computes."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from sana_edge.export.graph.builder import GraphBuilder
    from sana_edge.export.graph.conv import conv
    from sana_edge.export.graph.external_data import ExternalData
    from sana_edge.int8.conv import W8A8Conv2d

    torch.manual_seed(0)
    step = 0.03
    layer = W8A8Conv2d.from_float(
        torch.nn.Conv2d(8, channels, 3, padding=1, bias=bias), input_scale=torch.tensor(step)
    )
    with ExternalData(path.with_suffix(".data")) as data:
        graph = GraphBuilder(path.stem, data)
        x = graph.input("x", (1, 8, "h", "w"))
        graph.output("y", conv(graph, "conv", layer, x), (1, channels, "h", "w"))
        graph.save(path)

    def exact(x: Any) -> Any:
        levels = (torch.from_numpy(x) / step).round().clamp(-128, 127).double()
        sums = torch.nn.functional.conv2d(levels, layer.weight.double(), padding=1)
        scaled = sums * (layer.weight_scale.double() * step)[:, None, None]
        return (scaled if layer.bias is None else scaled + layer.bias.double()[:, None, None]).numpy()

    return path, exact


@pytest.mark.parametrize(
    ("channels", "width", "bias", "count"),
    [(386, 130, True, 2), (513, 129, False, 3), (512, 128, True, 1), (320, 200, True, 1)],
    ids=str,
)
def test_wide_int8_convolutions_in_parts(
    kind: EngineKind,
    channels: int,
    width: int,
    bias: bool,
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of channels that divide and that do not, whole where rows or channels are few: the same sums."""
    path, exact = wide_convolution(tmp_path / "decoder.onnx", channels, bias)
    monkeypatch.setattr(engine_module, "parts_pay", lambda: True)
    sides: dict[str, tuple[str, tuple[int | str, ...]]] = {
        name: ("float32", (1, given, "h", "w")) for name, given in (("x", 8), ("y", channels))
    }
    engine = kind.load(path, {"x": sides["x"]}, {"y": sides["y"]})
    assert isinstance(engine, OpenVinoEngine)
    x = np.random.default_rng(1).standard_normal((1, 8, 3, width)).astype(np.float32)
    # 72 products of levels are exact; scales and bias in fp32 are 3 roundings of values below 8
    np.testing.assert_allclose(engine.run({"x": x})["y"], exact(x), rtol=0, atol=3 * 8 * 2**-24)
    if engine._parts:
        (request,) = engine._requests.values()
        nodes = request.get_compiled_model().get_runtime_model().get_ops()
        assert sum(node.get_rt_info()["layerType"].astype(str) == "Convolution" for node in nodes) == count
    else:
        assert not backend.sums_are_exact()


def test_wide_float_convolutions_stay_whole() -> None:
    ops = openvino.opset13
    x = ops.parameter([1, 4, 3, 130], np.float32)
    weights = ops.constant(np.ones((386, 4, 3, 3), np.float32))
    model = openvino.Model([ops.convolution(x, weights, [1, 1], [1, 1], [1, 1], [1, 1])], [x])
    assert parts.part_wide_convolutions(model) == 0


def test_parts_pay_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, pay in (
        ({"avx512_vnni"}, True),
        ({"avx512_vnni", "amx_int8"}, False),
        ({"avx_vnni"}, False),
        (None, False),
    ):
        monkeypatch.setattr(parts, "instructions", lambda found=found: found)
        assert parts.parts_pay() is pay
