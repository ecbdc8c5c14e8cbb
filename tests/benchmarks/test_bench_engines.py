"""The benchmark of engines: what it measures, refuses and writes."""

from __future__ import annotations

import argparse
import importlib
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

import openvino

import bench_engines
from harness import ROOT, measure, process
from harness.results import BASELINE, NAIVE_INT8
from harness.results import INT8 as TORCH_INT8
from sana_edge.bench.process import run as process_run
from sana_edge.errors import SanaError
from works import engines, pictures
from works.denoiser import DenoiserWork

SHAPES = ["--shapes", "tiny", "--repeat", "2", "--threads", "1"]
# older CPUs have no bf16
BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
OURS = [BASELINE, TORCH_INT8, *(name for name in engines.ENGINES if BF16 or "bf16" not in name)]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Run the script and return its JSON; memory is measured here, processes cost seconds."""
    monkeypatch.setattr(measure, "peaks", process._measure)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.001)

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
    assert work["ratios"][NAIVE_INT8] == {}
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
    names = [BASELINE, NAIVE_INT8]
    data = run(
        *(*SHAPES, "--stage", "step", "--sizes", "96", "--layers", "1"), *("--contenders", ",".join(names))
    )
    rows = {row["name"]: row for row in data["works"][0]["rows"]}
    assert 1e-4 < rows[NAIVE_INT8]["difference"] < 0.5
    assert data["works"][0]["ratios"][NAIVE_INT8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "step", "--contenders", "tensorflow"], "unknown contender 'tensorflow'"),
        (["--stage", "step", "--shapes", "tiny", "--layers", "9"], "9 layers are more than tiny has"),
        (["--stage", "cold"], "no exported folders"),
        (["--stage", "picture"], "no folder for whole models"),
        (["--stage", "picture", "--contenders", "openvino"], "unknown contender 'openvino'"),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_engines.main([*arguments, "--output", str(tmp_path / "a.json")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unequal_outputs() -> None:
    common: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "threads": 1}
    step = DenoiserWork(shapes="tiny", layers=1, size=96, tokens=30, steps=20, **common)
    work = engines.EngineWork(work=step, folder="", **common)

    def check(name: str, difference: float) -> None:
        row = measure.Row("step", name, [1.0], [1.0], reference=BASELINE, difference=difference)
        measure.check(row, work)

    with pytest.raises(SanaError, match=r"openvino is not diffusers's, relative L2 0\.01, allowed 0\.001"):
        check("openvino", 0.01)
    with pytest.raises(SanaError, match="relative L2 nan"):
        check("openvino int8", float("nan"))
    check("openvino int8 bf16", 0.19)
    check(NAIVE_INT8, 0.9)


def test_cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands that write pictures of one colour."""
    write = (
        "import sys; from PIL import Image; Image.new('RGB', (8, 8), {}).save(sys.argv[-1]); "
        "print('{{\"peak_memory\": 5000000}}')"
    )
    commands = {
        "torch": [sys.executable, "-c", write.format(100)],
        "openvino fp32": [sys.executable, "-c", write.format(101)],
    }
    monkeypatch.setattr(pictures, "_commands", lambda options: commands)
    options = argparse.Namespace(repeat=1, threads=1, model="sana-tiny", steps=2)
    rows = pictures.measure_cold(options, lambda line: None)["rows"]
    assert [row["name"] for row in rows] == list(commands)
    assert rows[0]["psnr"] is None and rows[0]["peak"] == 5_000_000 and len(rows[0]["seconds"]) == 1
    # Image.new gives red only: a third of the values differ by 1
    assert rows[1]["psnr"] == pytest.approx(10 * np.log10(255**2 * 3))
    assert Image.new("RGB", (1, 1), 100).getpixel((0, 0)) == (100, 0, 0)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no picture')", "torch failed: no picture"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "torch failed: killed by SIGKILL"),
    ],
)
def test_a_command_that_fails(code: str, message: str) -> None:
    with pytest.raises(SanaError, match=message):
        process_run([sys.executable, "-c", code], "torch", threads=1)


def test_torch_is_blocked() -> None:
    """Not by what is printed, which a missing package would print too."""
    command = [sys.executable, str(ROOT / "benchmarks" / "works" / "picture_process.py"), "cli"]
    model = str(ROOT / "sana_edge" / "models" / "sana-tiny")
    with pytest.raises(SanaError, match=r"engine failed: error: .*this needs torch"):
        process_run([*command, "generate", "a cat", "--model", model], "engine")
    assert process_run([*command, "--version"], "engine").printed


@pytest.fixture(scope="module")
def sprint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a tiny random Sprint model."""
    scratch = tmp_path_factory.mktemp("sprint")
    made = pictures.prepare(scratch, "tiny", 1, lambda line: None)
    assert [entry["folder"] for entry in made] == ["float", "int8", "onnx"]
    return scratch


@pytest.mark.slow
def test_whole_pictures(
    run: Callable[..., dict[str, Any]], sprint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them draw the same picture of noise, and folders are made once."""
    names = [name for name in pictures.WAYS if BF16 or "openvino int8 bf16" not in name]
    options = ["--stage", "picture", "--sizes", "64", "--scratch", str(sprint)]
    options += ["--contenders", ",".join(names)]
    data = run("--shapes", "tiny", "--repeat", "1", "--threads", "1", *options)["picture"]
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == names
    assert [made["folder"] for made in data["prepared"]] == ["onnx-dc-ae-lite", "onnx-taesana"]
    for name, row in rows.items():
        assert row["failure"] is None, name
        (found,) = row["runs"]
        assert row["median"]["first"] == found["first"]
        assert 0 < found["load"] < found["first"] and found["peak"] > 50e6
        for picture in ("first", "second"):
            parts = [found[f"{picture} {part}"] for part in ("text", "denoise", "decode")]
            assert min(parts) > 0 and sum(parts) < found[picture]
    assert rows[BASELINE]["psnr"] is None
    # which decode other pictures
    assert all(rows[name]["psnr"] is None for name in names if pictures.WAYS[name].decoder)
    for name in ("sana-edge bf16", TORCH_INT8, "onnxruntime int8", "openvino int8"):
        assert rows[name]["reference"] == BASELINE and rows[name]["psnr"] > 20, name
    assert "first picture" in capsys.readouterr().out
    assert str(sprint) not in json.dumps(data)


def test_a_whole_picture_that_fails(
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its row says why, and the others are drawn: here by a script that draws one colour."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from PIL import Image\n"
        "if 'openvino' in sys.argv: sys.exit('no memory')\n"
        "red = 100 + ('torch' in sys.argv)\n"
        "Image.new('RGB', (8, 8), red).save(sys.argv[2] + '/first.png')\n"
        f"print(json.dumps(dict.fromkeys({pictures.COLUMNS!r}, 2.0) | {{'peak': 3000000}}))\n"
    )
    monkeypatch.setattr(pictures, "_SCRIPT", script)
    monkeypatch.setattr(pictures, "prepare", lambda *arguments: [])
    names = f"openvino int8,{BASELINE},sana-edge bf16"
    options = ["--stage", "picture", "--scratch", str(tmp_path), "--contenders", names]
    data = run("--shapes", "tiny", "--repeat", "2", "--threads", "1", *options)["picture"]
    rows = {row["name"]: row for row in data["rows"]}
    assert (data["size"], data["steps"]) == (1024, 2)
    assert rows["openvino int8"]["failure"] == "openvino int8 failed: no memory"
    assert rows["openvino int8"]["runs"] == [] and rows["openvino int8"]["median"] is None
    assert rows[BASELINE]["psnr"] is None and len(rows[BASELINE]["runs"]) == 2
    # a third of the values differ by 1
    assert rows["sana-edge bf16"]["psnr"] == pytest.approx(10 * np.log10(255**2 * 3))
    assert rows["sana-edge bf16"]["median"]["second decode"] == 2
    printed = capsys.readouterr()
    assert "openvino int8 failed: no memory" in printed.err
    (row,) = (line for line in printed.out.splitlines() if line.startswith("sana-edge bf16"))
    assert row.split()[-4:] == ["0.0", "GB", "52.9", "dB"]


def test_times_are_kept_when_memory_is_not_measured(
    run: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The process of one contender is killed, as by the system when memory runs out."""
    # a module that new processes find
    (tmp_path / "killed_process.py").write_text(_KILLED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(measure, "peaks", process.peaks)
    monkeypatch.setattr(process, "_measure", importlib.import_module("killed_process").measure)
    options = ["--stage", "decode", "--sizes", "64", "--contenders", f"{BASELINE},onnxruntime"]
    rows = {row["name"]: row for row in run(*SHAPES, *options)["works"][0]["rows"]}
    assert rows["onnxruntime"]["memory"] is None and rows["onnxruntime"]["median"] > 0
    assert rows[BASELINE]["memory"]["most"] == 7
    assert "the process that measures the memory of onnxruntime was killed" in capsys.readouterr().err


_KILLED = f"""
import os, signal
from harness import process
def measure(work, name, stages):
    if name != {BASELINE!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return dict.fromkeys(stages, process.Peak(7, None))
"""


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """While memory is measured: the times are in the JSON already."""

    def interrupted(*arguments: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "peaks", interrupted)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.001)
    output = tmp_path / "out.json"
    options = ["--stage", "decode", "--sizes", "64", "--contenders", f"{BASELINE},onnxruntime"]
    assert bench_engines.main([*SHAPES, *options, "--output", str(output)]) == 130
    (work,) = json.loads(output.read_text())["works"]
    assert [len(row["seconds"]) for row in work["rows"]] == [2, 2]
    assert work["ratios"][BASELINE]["onnxruntime"]["median"] > 0
