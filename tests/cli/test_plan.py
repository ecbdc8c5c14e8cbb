"""`sana-edge plan`: the table and the JSON, what fits and what would, and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sana_edge import pipeline
from sana_edge.cli import engine_times, forecast
from sana_edge.cli.main import main
from sana_edge.engines import runtime
from sana_edge.request.loading import LoadOptions
from sana_edge.request.request import Request
from sana_edge.store import manifest
from sana_edge.store.catalogue import bundled_exports

PROMPT = "a red house"


def planned(capsys: pytest.CaptureFixture[str], *arguments: str, probe: bool = False) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json", *([] if probe else ["--no-probe"])]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, str(tiny_folder), "--size", "96x64", "--steps", "3", probe=True)
    assert found["fits"] and found["way"] == "together" and found["proposals"] == []
    assert found["drawn"] == [96, 64] and found["steps"] == 3 and found["download"] == 0
    assert [stage["name"] for stage in found["stages"]] == ["text", "denoiser", "decoder"]
    assert found["base"] < found["peak"] <= found["limit"]
    assert set(found["seconds"]) == {"text", "denoise", "decode"}
    assert (
        found["total_seconds"] == pytest.approx(sum(found["seconds"].values())) and found["total_seconds"] > 0
    )


def test_in_words(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_folder), "--image", "--no-probe"]) == 0
    out = capsys.readouterr().out
    assert f"{tiny_folder.name} at 128x128, 20 steps, by torch on cpu (fp32)" in out
    assert "encoder (image)" in out and "\nYes: " in out and "Nothing to download: " in out


def test_a_model_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "sana-1.6b-1024", "--memory", "4GB")
    assert not found["fits"] and found["limit"] == 4_000_000_000 and found["download"] > 9e9
    assert found["seconds"] == {} and found["total_seconds"] is None
    peaks = {each["options"]: each["peak"] for each in found["proposals"]}
    assert "--int8" in peaks and all(found["base"] + peak <= 4e9 for peak in peaks.values())
    # what is proposed is what plan says of it
    for options, peak in peaks.items():
        if options.startswith("--"):
            again = planned(capsys, "sana-1.6b-1024", "--memory", "4GB", *options.split())
            assert again["fits"] and abs(again["peak"] - again["base"] - peak) < 1e6
    assert main(["plan", "sana-1.6b-1024", "--memory", "4GB", "--no-probe"]) == 0
    out = capsys.readouterr().out
    assert "\nNo: it needs " in out and "What would fit:\n  --int8" in out and "To download: 9.7 GB" in out
    assert "note:  not on this machine" in out


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sana-1.5-4.8b-1024", "--memory", "700MB", "--no-probe"]) == 0
    assert "Nothing that was tried fits" in capsys.readouterr().out


def test_without_torch_the_bundled_graphs_are_planned() -> None:
    """As `generate` draws with them."""
    pytest.importorskip("onnxruntime")
    hide = "import sys; sys.modules['torch'] = None; "
    hide += "from sana_edge.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", hide, "plan", "sana-tiny", "--json", "--no-probe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["backend"] == "onnxruntime" and found["model"] == "sana-tiny-int8"


def test_an_exported_folder(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    found = planned(capsys, "sana-tiny-int8-onnx", "--backend", "onnxruntime", "--steps", "2", probe=True)
    assert found["backend"] == "onnxruntime" and found["fits"] and found["kinds"] == "fp32, INT8"
    assert found["seconds"]["denoise"] > 0
    # the bundled graphs of a bundled model
    assert planned(capsys, "sana-tiny", "--int8", "--backend", "onnxruntime")["model"] == "sana-tiny-int8"


def test_the_first_picture_of_an_engine_and_further_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine does once, before or at the first step, does not grow with the picture or its steps."""
    folder = bundled_exports()["sana-tiny-int8-onnx"]
    plan = Request(PROMPT, size=(512, 512), steps=20).plan(256, "flow-dpm")
    drawn = iter([{"text": 0.5, "denoise": 9.0, "decode": 3.0}, {"text": 0.1, "denoise": 4.5, "decode": 1.0}])

    class Drawing(AbstractContextManager[Any]):
        def generate(self, *_: object, on_step: Any, steps: int, **__: object) -> Any:
            for left in reversed(range(steps)):
                on_step(SimpleNamespace(image=None if left else self))
            return SimpleNamespace(timings=next(drawn))

        def __exit__(self, *_: object) -> None: ...

    ends = iter(range(100))
    monkeypatch.setattr(engine_times, "time", SimpleNamespace(perf_counter=lambda: float(next(ends))))
    monkeypatch.setattr(runtime.EngineRuntime, "load", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "Sana", lambda _: Drawing())
    found = engine_times.measured(folder, manifest.read(folder), plan, LoadOptions())
    assert found.first == {"text": 0.5, "denoise": 5 + 20 * 4, "decode": 2 + 4}
    assert found.further == {"text": 0.1, "denoise": 0.5 + 20 * 4, "decode": 4}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sana-1.6b-1042"], "did you mean sana-1.6b-1024"),
        (["./nowhere"], "no folder ./nowhere"),
        (["someone/else"], "someone/else"),
        (["--size", "0x64"], "too small"),
        (["--size", "50000x50000"], "too large"),
        (["--size", "100x100", "--exact-size"], "not a multiple of 32"),
        (["--steps", "0"], "steps is 0"),
        (["--backend", "triton"], "backend triton cannot be used"),
        (["--decoder", "dc-ae-heavy"], "unknown decoder"),
        (["--tile", "7"], "tile is 7"),
        (["--threads", "0"], "threads is 0"),
        (["--device", "npu"], "device npu is for exported folders"),
        (["sana-0.6b-1024", "--backend", "openvino"], "backend openvino runs exported folders"),
        (["sana-0.6b-1024", "--revision", "../../x"], "is no branch, tag or commit"),
        (["sana-0.6b-1024", "--engines", "x"], "engines are of exported folders"),
        (["sana-tiny-int8-onnx", "--backend", "torch"], "backend torch runs models"),
        (["sana-tiny-int8-onnx", "--decoder", "dc-ae-lite"], "has its decoder in it"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments, "--no-probe", "--json"]) == 1
    out, error = capsys.readouterr()
    assert said in error and set(json.loads(out)) == {"error", "hint"}


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("0", "less than any model takes"),
        ("1.5GB", "that is 1500MB"),
        ("lots", "such as 8GB"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "generate", "serve"])
def test_bad_budgets(command: str, memory: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["a house"] if command == "generate" else []
    with pytest.raises(SystemExit, match="2"):
        main([command, *prompt, "--memory", memory])
    assert said in capsys.readouterr().err


def test_an_unreadable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_index.json").write_text("none")
    assert main(["plan", str(tmp_path), "--no-probe"]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_what_cannot_be_loaded_has_no_plan(tiny_folder: Path, tmp_path: Path, name: str, capsys: Any) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert main(["plan", str(tmp_path / "model"), "--no-probe"]) == 1
    assert f"{name}: it is a Git LFS pointer" in capsys.readouterr().err


def test_generate_refuses_before_it_loads(tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    picture = ["generate", "a house", "--model", str(tiny_folder), "--output", str(tmp_path / "a.png")]
    assert main([*picture, "--memory", "9MB"]) == 1
    error = capsys.readouterr().err
    assert "9.0 MB are left" in error and "sana-edge plan" in error and list(tmp_path.iterdir()) == []


def test_the_instruction_is_counted(tiny_folder: Path) -> None:
    from sana_edge.plan.model import facts_of

    assert forecast._instruction(facts_of(str(tiny_folder))) > 20
    assert forecast._instruction(facts_of("sana-1.6b-1024")) == forecast._INSTRUCTION
