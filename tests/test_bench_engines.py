"""The benchmark of engines: what it measures, refuses and writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

for package in ("onnx", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason=f"{package} is not installed")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# scripts there import each other by their plain names
sys.path.append(str(BENCHMARKS))

import bench_engines  # noqa: E402
import cold_start  # noqa: E402
import engine_work  # noqa: E402
import measuring  # noqa: E402
import peaks  # noqa: E402
from contenders import BASELINE  # noqa: E402
from contenders import INT8 as TORCH_INT8  # noqa: E402

from sana_edge.errors import SanaError  # noqa: E402

SHAPES = ["--shapes", "tiny", "--repeat", "2", "--threads", "1"]
OURS = [BASELINE, TORCH_INT8, *engine_work.ENGINES]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run the script and return its JSON; memory is measured here, processes cost seconds."""
    monkeypatch.setattr(measuring, "peaks", peaks._measure)
    monkeypatch.setattr(measuring, "SAMPLE_SECONDS", 0.001)

    def run(*arguments: str) -> dict[str, Any]:
        output = tmp_path / "out.json"
        code = bench_engines.main([*arguments, "--output", str(output)])
        assert code == 0, capsys.readouterr().err
        data: dict[str, Any] = json.loads(output.read_text())
        return data

    return run


def test_a_step(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    options = ["--stage", "step", "--sizes", "96", "--layers", "2", "--contenders", ",".join(OURS)]
    data = run(*SHAPES, *options)
    (work,) = data["works"]
    rows = {row["name"]: row for row in work["rows"]}
    assert list(rows) == OURS and data["threads"] == 1 and data["packages"]["openvino"]
    for name in ("onnxruntime", "openvino"):
        assert 0 < rows[name]["difference"] < 1e-4
        # quantized, and by the same scales in both
        assert 1e-3 < rows[f"{name} int8"]["difference"] < 0.1
        assert rows[name]["weights"] > rows[f"{name} int8"]["weights"] > 0
    found = work["ratios"][BASELINE]["openvino int8"]
    pairs = zip(rows["openvino int8"]["seconds"], rows[BASELINE]["seconds"], strict=True)
    assert [found["least"], found["most"]] == sorted(a / b for a, b in pairs)
    assert work["ratios"][engine_work.NAIVE_INT8] == {}
    assert str(tmp_path) not in json.dumps(data) and "folder" not in work


def test_a_decoder(run: Callable[..., dict[str, Any]]) -> None:
    names = [BASELINE, "onnxruntime", "onnxruntime int8", "openvino"]
    data = run(*SHAPES, "--stage", "decode", "--sizes", "64", "--contenders", ",".join(names))
    (work,) = data["works"]
    rows = {row["name"]: row for row in work["rows"]}
    assert list(rows) == names
    assert 0 < rows["onnxruntime"]["difference"] < 1e-4 and 0 < rows["openvino"]["difference"] < 1e-4
    assert 1e-3 < rows["onnxruntime int8"]["difference"] < 0.15


@pytest.mark.slow
def test_the_naive_graph(run: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("nncf", reason="nncf is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    names = [BASELINE, engine_work.NAIVE_INT8]
    data = run(
        *(*SHAPES, "--stage", "step", "--sizes", "96", "--layers", "1"), *("--contenders", ",".join(names))
    )
    rows = {row["name"]: row for row in data["works"][0]["rows"]}
    assert 1e-4 < rows[engine_work.NAIVE_INT8]["difference"] < 0.5
    assert data["works"][0]["ratios"][engine_work.NAIVE_INT8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "step", "--contenders", "tensorflow"], "unknown contender 'tensorflow'"),
        (["--stage", "step", "--shapes", "tiny", "--layers", "9"], "9 layers are more than tiny has"),
        (["--stage", "cold"], "no exported folders"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_engines.main([*arguments, "--output", str(tmp_path / "a.json")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unequal_outputs() -> None:
    row = measuring.Row("step", "openvino", [1.0], [1.0], reference=BASELINE, difference=0.01)
    with pytest.raises(SanaError, match=r"openvino is not diffusers's, relative L2 0\.01, allowed 0\.001"):
        bench_engines._check([row])
    with pytest.raises(SanaError, match="relative L2 nan"):
        bench_engines._check([measuring.Row("step", "openvino int8", [1.0], [1.0], difference=float("nan"))])
    bench_engines._check([measuring.Row("step", engine_work.NAIVE_INT8, [1.0], [1.0], difference=0.9)])


def test_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands that write pictures of one colour."""
    write = "import sys; from PIL import Image; Image.new('RGB', (8, 8), {}).save(sys.argv[-1])"
    commands = {
        "torch": [sys.executable, "-c", write.format(100)],
        "openvino fp32": [sys.executable, "-c", write.format(101)],
    }
    monkeypatch.setattr(cold_start, "_commands", lambda options: commands)
    options = argparse.Namespace(repeat=1, threads=1, model="sana-tiny", steps=2)
    rows = cold_start.measure_cold(options, lambda line: None)["rows"]
    assert [row["name"] for row in rows] == list(commands)
    assert rows[0]["psnr"] is None and rows[0]["peak"] > 1e6 and len(rows[0]["seconds"]) == 1
    # Image.new gives red only: a third of the values differ by 1
    assert rows[1]["psnr"] == pytest.approx(10 * np.log10(255**2 * 3))
    assert Image.new("RGB", (1, 1), 100).getpixel((0, 0)) == (100, 0, 0)


def test_a_command_that_fails() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no picture')"]
    with pytest.raises(SanaError, match="torch failed: no picture"):
        cold_start._timed(command, 1, "torch")
