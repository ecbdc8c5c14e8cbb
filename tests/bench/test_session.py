"""Whole runs: on the bundled graphs without torch, and on what stands for processes that fail."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_runs import run as made_up

from sana_edge.bench import measure, process, worker
from sana_edge.bench.measure import Asked
from sana_edge.bench.models import subjects
from sana_edge.bench.order import Order
from sana_edge.cli import main as cli
from sana_edge.cli.main import main
from sana_edge.errors import OutOfMemory, SanaError
from sana_edge.store.known_models import BUNDLED

EXPORTED = str(BUNDLED / "sana-tiny-int8-onnx")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _cache(cache: Path) -> None:
    """Nothing is made in the user's cache."""


def test_the_bundled_graphs_without_torch(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes that could not import torch."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path(worker.__file__).parents[2]}")
    out, html = tmp_path / "new" / "a.json", tmp_path / "new" / "a.html"
    command = [
        "bench",
        EXPORTED,
        "--backends",
        "onnxruntime",
        "--size",
        "64",
        "--steps",
        "2",
        "--repeat",
        "1",
    ]
    assert main([*command, "--threads", "1", "--json", str(out), "--html", str(html)]) == 0
    data = json.loads(out.read_text())
    (work,) = data["works"]
    (row,) = work["rows"]
    assert row["name"] == "onnxruntime int8" and row["quantization"].startswith("w8a8")
    (found,) = row["runs"]
    spent = found["seconds"]
    assert list(spent) == list(worker.STAGES) and min(spent.values()) > 0 and spent["load"] < spent["first"]
    assert found["peak"] > 1 << 20 and found["pictures"] >= 1
    assert not data["partial"] and data["done"] == data["total"] == 1 and data["versions"]["onnxruntime"]
    assert data["command"].startswith("sana-edge bench sana-tiny-int8-onnx --backends onnxruntime")
    assert str(tmp_path) not in json.dumps(data)
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == data["sentences"][0]
    assert "float did not draw: there is no float model." in data["sentences"][0]
    assert (
        data["sentences"][0] in html.read_text().replace("&nbsp;", " ")
        and "INT8 on onnxruntime draws a 64x64" in printed.out
    )


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each contender's process gives or raises, by its name; each draws a grey picture."""
    answers: dict[str, Callable[[], dict[str, Any]]] = {}

    def ordered(order: Order, name: str, tell: Callable[[str], None]) -> dict[str, Any]:
        from PIL import Image

        assert not Path(order.output).exists()
        result = answers[order.by]()
        tell("step 1 of 2")
        Image.new("RGB", (8, 8), 100).save(order.output)
        facts: dict[str, Any] = {"dtype": "fp32", "backend": order.by, "quantization": None, "notes": []}
        return {**result, **facts, "instructions": ["avx2"], "versions": {}, "joules_missing": []}

    monkeypatch.setattr(measure, "ordered", ordered)
    monkeypatch.setattr(measure, "usable", lambda names: (["onnxruntime", "openvino"], []))
    answers["onnxruntime"] = lambda: made_up(2.0)
    answers["openvino"] = lambda: made_up(4.0)
    return answers


def test_memory_that_runs_out_in_one(
    processes: dict[str, Callable[[], dict[str, Any]]], tmp_path: Path, capsys: Capture
) -> None:
    """It is named and not asked again; the rest goes on."""

    def killed() -> dict[str, Any]:
        raise OutOfMemory("openvino int8 failed: killed by SIGKILL", "run its command by itself")

    processes["openvino"] = killed
    assert main(["bench", EXPORTED, "--json", str(tmp_path / "a.json"), "--repeat", "2"]) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["works"][0]["rows"]
    assert [len(row["runs"]) for row in rows] == [2, 0] and rows[1]["failure"] == "killed by SIGKILL"
    out = capsys.readouterr().out
    assert "openvino int8 failed: killed by SIGKILL." in out
    assert out.splitlines()[-1].startswith("INT8 on onnxruntime draws a 256x256 picture in 20 steps in 2.0 s")


def test_scratch_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs it fails, and is named."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(measure.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e9))
    for scratch, random, message in (
        (tmp_path / "file", "tiny", "cannot write .*: Not a directory"),
        (tmp_path / "new", "sprint", "random weights need about 24 GB, 5 GB are free in"),
    ):
        (subject,) = subjects([], [random], scratch)
        with pytest.raises(SanaError, match=message):
            measure._made("float", subject, Asked([], [None], None, 1, None), lambda at: None)


def test_all_fail(processes: dict[str, Callable[[], dict[str, Any]]], capsys: Capture) -> None:
    def fails() -> dict[str, Any]:
        raise SanaError("openvino int8 failed: error: no session hint:  install it again")

    processes["openvino"] = processes["onnxruntime"] = fails
    assert main(["bench", EXPORTED, "--repeat", "1"]) == 1
    printed = capsys.readouterr()
    assert "No 256x256 picture in 20 steps was drawn" in printed.out
    assert "no session; install it again" in printed.out and "nothing was measured" in printed.err


def test_ctrl_c_keeps_what_is_done(
    processes: dict[str, Callable[[], dict[str, Any]]], tmp_path: Path, capsys: Capture
) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    processes["openvino"] = interrupted
    files = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert main(["bench", EXPORTED, *files]) == 130
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["partial"] and (data["done"], data["total"]) == (1, 6)
    page, printed = (tmp_path / "a.html").read_text(), capsys.readouterr()
    for text in (page, printed.out):
        assert "Partial: interrupted after 1 of 6 runs." in text
        assert "INT8 on onnxruntime draws" in text
    assert "interrupted" in printed.err and "error" not in printed.out


def test_a_full_disk(
    processes: dict[str, Callable[[], dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    """The table is printed all the same; no part of a file stays."""
    from sana_edge.bench import session

    def full(path: Path, data: Any) -> None:
        raise SanaError(f"cannot write {path}: No space left on device", "the disk is full")

    monkeypatch.setattr(session, "write_json", full)
    assert main(["bench", EXPORTED, "--json", str(tmp_path / "a.json")]) == 1
    printed = capsys.readouterr()
    assert "INT8 on onnxruntime draws" in printed.out and "No space left on device" in printed.err
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backends", "tensorflow"], "unknown backend 'tensorflow'"),
        (["--backends", ","], "no backends"),
        (["sana-tinny"], "unknown model 'sana-tinny'"),
        (["--random-weights", "9b"], "no random weights '9b'"),
        (["--size", "100"], "100x100 is not a multiple of 32"),
        (["--steps", "0"], "steps is 0"),
        (["--repeat", "0"], "repeat is 0"),
        (["--threads", "0"], "threads is 0"),
        (["--json", "."], "cannot write .: Is a directory"),
        (["--json", "x" * 300], "File name too long"),
        (["sana-tiny", "./nowhere"], "no folder ./nowhere"),
    ],
)
def test_refusals(arguments: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    """Before anything is measured, and without a file."""
    assert main(["bench", *arguments, "--html", str(tmp_path / "a.html")]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("a*"))


def test_several_sizes() -> None:
    words = cli._joined(["bench", "--size", "64", "96x32", "--size", "-1"])
    assert cli._parser().parse_args(words).size == [(64, 64), (96, 32), (-1, -1)]


def test_one_file_for_two(tmp_path: Path, capsys: Capture) -> None:
    name = str(tmp_path / "a")
    assert main(["bench", "--json", name, "--html", name]) == 1
    assert "--json and --html are one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--size", "sana-tiny"], ["--size", "wide"], ["--against", "comfy"], ["--json", "-"], ["--html", ""]],
)
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "--json", str(tmp_path / "file" / "a.json")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_diffusers_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None if name == "diffusers" else 1)
    assert (
        measure.diffusers_missing() == "diffusers is not measured: pip install diffusers 'sana-edge[torch]'"
    )


def test_lines_of_a_process() -> None:
    """As they come, and not after the process has ended."""
    lines: list[str] = []
    code = "import sys; print('{\"at\": 1}', flush=True); print('b'); sys.stdout.write('c')"
    done = process.run([sys.executable, "-c", code], "a process", on_line=lines.append)
    assert lines == ['{"at": 1}', "b", "c"] and done.printed == "" and done.code == 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals")
def test_a_process_that_is_killed() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    with pytest.raises(OutOfMemory, match="torch int8 failed: killed by SIGKILL"):
        process.run([sys.executable, "-c", code], "torch int8", on_line=lambda line: None)


def test_a_process_without_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "command", lambda order: [sys.executable, "-c", "print(1); print('[]')"])
    with pytest.raises(SanaError, match="ended without a result"):
        measure.ordered(Order("torch", "model", "a.png", 0.0), "torch", lambda at: None)


@pytest.mark.slow
def test_every_backend_with_diffusers(tmp_path: Path, capsys: Capture) -> None:
    """A random Sprint model: all forms are made, once, and all draw the same noise."""
    for package in ("onnx", "onnxruntime", "openvino", "diffusers"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    options = ["--random-weights", "sprint-tiny", "--size", "64", "--repeat", "1", "--threads", "1"]
    options += ["--against", "diffusers", "--scratch", str(tmp_path / "scratch")]
    assert main(["bench", *options, "--json", str(tmp_path / "a.json")]) == 0
    (work,) = json.loads((tmp_path / "a.json").read_text())["works"]
    rows = {row["name"].partition(" ")[0] + " " + row["kind"]: row for row in work["rows"]}
    assert [row["failure"] for row in rows.values()] == [None] * 7
    for name in ("torch float", "onnxruntime float", "openvino float"):
        # None is equal
        assert rows[name]["psnr_to"].startswith("diffusers") and (rows[name]["psnr"] or 99) > 30
    assert rows["torch int8"]["psnr"] > 20 and " are kept for the next run" in capsys.readouterr().err
    made = {path.name for path in (tmp_path / "scratch" / "random-sprint-tiny").iterdir()}
    assert made == {"float", "int8", "onnx", "onnx-int8"}
