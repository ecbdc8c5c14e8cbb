"""What `sana-edge generate` takes and gives: prompts, formats, pictures made again, errors as JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from sana_edge import Image, Sana, SanaError, progress, read_metadata
from sana_edge.cli.main import main
from sana_edge.errors import UnsupportedDevice

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-m", "sana_edge"]
# what starts without torch
GRAPHS = "sana-tiny-int8-onnx"


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer, self.closed = io.BytesIO(data), False


def draw(model: Path, *arguments: str) -> int:
    return main(["generate", *arguments, "--steps", "1", "--model", str(model)])


@pytest.mark.parametrize("arguments", [["a red house"], ["--prompt", "a red house"], ["--", "a red house"]])
def test_a_prompt_with_and_without_its_option(tiny_folder: Path, arguments: list[str]) -> None:
    start = ["generate", "--steps", "1", "--model", str(tiny_folder), "--seed", "1"]
    assert main([*start, *arguments]) == 0
    assert read_metadata("sana-1.png")["prompt"] == "a red house"


@pytest.mark.parametrize("data", ["a red house\n", "\ufeffein Häuschen 🏠"], ids=["line", "bom"])
def test_a_prompt_from_stdin(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    for arguments in (["-"], ["--prompt", "-"]):
        monkeypatch.setattr(sys, "stdin", Stdin(data.encode()))
        assert draw(tiny_folder, *arguments, "--seed", "1", "--force") == 0
        assert read_metadata("sana-1.png")["prompt"] == data.strip("\ufeff\n")


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "the prompt is empty"), (b"\xff\xfe", "not UTF-8"), (b"x" * (2 << 20), "more than 1048576 bytes")],
    ids=["empty", "latin", "endless"],
)
def test_stdin_that_is_no_prompt(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, data: bytes, problem: str
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    assert main(["generate", "-"]) == 1
    assert problem in capsys.readouterr().err


def usage_error(capsys: Capture, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: sana-edge")
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "required: PROMPT"),
        (["generate", "a", "--prompt", "b"], "two prompts"),
        (["generate", "--promt", "x"], "--promt (did you mean --prompt?)"),
        (["generate", "x", "--seeed=3"], "--seeed=3 (did you mean --seed?)"),
        (["generate", "a", "red", "house"], "red house (a prompt of several words stands in quotes)"),
        (["genrate", "x"], "(did you mean generate?)"),
        (["generate", "x", "--sampler", "flow-dmp"], "(did you mean flow-dpm?)"),
        (["models", "remove"], "invalid choice: 'remove'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_usage_errors_say_what_was_meant(capsys: Capture, arguments: list[str], said: str) -> None:
    assert said in usage_error(capsys, *arguments)


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP")])
def test_formats(tiny_folder: Path, capsys: Capture, name: str, kind: str) -> None:
    assert draw(tiny_folder, "a house", "--seed", "1", "--output", name, "--quality", "80") == 0
    assert capsys.readouterr().out == f"{name}\n"
    with PILImage.open(name) as image:
        assert (image.format, image.size) == (kind, (128, 128))
    assert read_metadata(name)["seed"] == 1


def test_a_picture_on_stdout() -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    arguments = ["generate", "a house", "--model", GRAPHS, "--steps", "1", "--seed", "1"]
    done = subprocess.run([*COMMAND, *arguments, "--output", "-"], capture_output=True, timeout=120)
    # a slow machine's progress lines come before
    assert done.returncode == 0 and done.stderr.splitlines()[-1].startswith(b"256x256, seed 1, onnxruntime: ")
    assert main(arguments) == 0
    assert done.stdout == Path("sana-1.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--output", "-", "--json"], "both write to stdout"),
        (["--output", "-", "--images", "2"], "is one picture, not 2"),
        (["--output", "-", "--quality", "80"], "has no quality"),
        (["--output", "a.gif"], "a.gif does not end in .png"),
        (["--output", "a"], "output a does not end in"),
        (["--output", "a.png", "--quality", "80"], "PNG loses nothing"),
        (["--output", "a.jpg", "--quality", "0"], "quality is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_outputs_that_are_refused_before_torch(capsys: Capture, arguments: list[str], problem: str) -> None:
    assert main(["generate", "x", "--model", "./no-such-model", *arguments]) == 1
    assert problem in capsys.readouterr().err
    assert os.listdir() == []


def test_made_again(tiny_folder: Path, capsys: Capture) -> None:
    options = ["a house", "--negative-prompt", "a boat", "--seed", "5", "--guidance", "3", "--size", "100x64"]
    assert main(["generate", *options, "--steps", "2", "--model", str(tiny_folder), "--output", "a.png"]) == 0
    again = ["generate", "--from", "a.png", "--model", str(tiny_folder)]
    assert main([*again, "--output", "b.png"]) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    # what is given goes first, also the prompt
    assert main([*again, "a boat", "--seed", "6", "--output", "c.jpg"]) == 0
    changed = {**read_metadata("a.png"), "prompt": "a boat", "seed": 6}
    assert read_metadata("c.jpg") == changed
    assert main(["generate", "--from", "c.jpg", "--model", str(tiny_folder), "--output", "d.png"]) == 0
    assert read_metadata("d.png") == changed
    capsys.readouterr()
    assert main(["generate", "--from", "a.png", "--output", "e.png"]) == 1
    err = capsys.readouterr().err
    assert "unknown model 'tiny'" in err and "a.png was made with it: give its folder with --model" in err


def test_made_again_on_another_backend(
    tiny_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the picture's own cannot run, and not where it was asked for."""
    with Sana.load(str(tiny_folder)) as sana:
        made = sana.generate("a house", seed=1, steps=1)
    made.metadata["backend"] = "cuda"
    made.save("a.png")
    again = ["generate", "--from", "a.png", "--model", str(tiny_folder), "--device", "cpu"]
    assert main([*again, "--output", "b.png"]) == 0
    assert read_metadata("b.png")["backend"] == "torch"
    assert "note:  a.png was made on backend cuda, pixels may differ a little: " in capsys.readouterr().err
    assert main([*again, "--output", "c.png", "--backend", "cuda"]) == 1


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"model": 5}, "a.png has the model 5"),
        ({"backend": ["cuda"]}, "a.png has the backend ['cuda']"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"size": [1]}, "size is (1,)"),
        ({"prompt": None}, "required: PROMPT"),
        ({"prompt": ["a house"]}, "prompt is ['a house']"),
    ],
    ids=str,
)
def test_metadata_that_nobody_wrote(capsys: Capture, changed: dict[str, Any], problem: str) -> None:
    made = {"prompt": "a house", "seed": 1, "model": "sana-tiny", "version": "0.1.0", **changed}
    Image(np.zeros((8, 8, 3), np.uint8), 1, made).save("a.png")
    try:
        assert main(["generate", "--from", "a.png", "--output", "b.png"]) == 1
    except SystemExit as exited:
        assert exited.code == 2
    assert problem in capsys.readouterr().err and os.listdir() == ["a.png"]


def test_a_stranger_s_picture_sets_only_what_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where engines, which are code, come from, nor where files go."""
    foreign = {"engines": "evil", "trust_engine": True, "output": "x.png", "revision": "evil", "text": "evil"}
    made = {"prompt": "a house", "seed": 1, "model": "sana-tiny", "version": "0.1.0", **foreign}
    Image(np.zeros((8, 8, 3), np.uint8), 1, made).save("a.png")
    asked: dict[str, Any] = {}

    def load(model: str, **options: Any) -> None:
        asked.update(options, model=model)
        raise SanaError("enough")

    monkeypatch.setattr(Sana, "load", load)
    assert main(["generate", "--from", "a.png"]) == 1
    assert (asked["engines"], asked["trust_engine"], asked["revision"]) == (None, False, None)
    assert asked["model"] == "sana-tiny"


@pytest.mark.parametrize(
    ("named", "offline"),
    [
        ({"model": "a/theirs"}, True),
        ({"decoder": "a/theirs"}, True),
        ({"model": "sana-tiny"}, False),
    ],
)
def test_a_stranger_s_picture_downloads_no_model_of_theirs(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], offline: bool
) -> None:
    made = {"prompt": "a house", "seed": 1, "model": "sana-tiny", "version": "0.1.0", **named}
    Image(np.zeros((8, 8, 3), np.uint8), 1, made).save("a.png")
    asked: dict[str, Any] = {}

    def load(model: str, **options: Any) -> None:
        asked.update(options)
        raise SanaError("enough")

    monkeypatch.setattr(Sana, "load", load)
    assert main(["generate", "--from", "a.png"]) == 1
    # a model is looked for before it is loaded
    assert asked.get("offline") is offline or (not asked and "offline mode is on" in capsys.readouterr().err)
    assert main(["generate", "--from", "a.png", "--model", "sana-tiny", "--decoder", "dc-ae-lite"]) == 1
    assert asked["offline"] is False


def test_a_picture_that_says_nothing(capsys: Capture) -> None:
    PILImage.new("RGB", (8, 8)).save("a.png")
    assert main(["generate", "--from", "a.png"]) == 1
    assert "no sana-edge metadata" in capsys.readouterr().err
    assert main(["generate", "--from", "missing.png"]) == 1
    assert "cannot read missing.png" in capsys.readouterr().err


def test_metadata_are_arguments(tiny_folder: Path) -> None:
    with Sana.load(str(tiny_folder)) as sana:
        made = sana.generate("a house", seed=np.int64(3), steps=np.int32(1), size=(np.int64(64), 96))
        assert type(made.metadata["seed"]) is int and made.metadata["size"] == [64, 96]
        floats = {"guidance": np.float32(4.5), "flow_shift": np.float16(3)}
        again = sana.generate("a house", seed=torch.tensor(3), steps=1, size=np.array([64, 96]), **floats)
        assert {**made.metadata, "flow_shift": 3.0} == again.metadata
        assert type(again.metadata["guidance"]) is float
        assert np.array_equal(again.pixels, made.pixels)
        made.save("a.webp", quality=np.int64(80))
        path = made.save("a.png")
        assert sana.generate(**read_metadata(path)).png() == made.png()
        later = {**read_metadata(path), "what later versions add": 1}
        assert sana.generate(**later).png() == made.png()
        assert len(sana.generate(**made.metadata, images=np.int8(2))) == 2
        with pytest.raises(TypeError, match="sed"):
            sana.generate("a house", sed=3)
        with pytest.raises(TypeError, match="backend"):
            sana.generate("a house", backend="torch")
        foreign = sana.generate(**{**made.metadata, "model": "another"})
        assert "the metadata is of a picture by another, this one is by tiny" in foreign.notes


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["x", "--size", "0x9"], 1, "size 0x9 is too small", "choose sides"),
        (["x", "--model", "sana-tini"], 1, "unknown model 'sana-tini'", "did you mean sana-tiny?"),
        (["x", "--sede", "3"], 2, "did you mean --seed?", "--help` shows the options"),
        (["x", "--steps", "many"], 2, "invalid int value", "--help` shows the options"),
    ],
    ids=["value", "model", "option", "type"],
)
def test_errors_as_json(capsys: Capture, arguments: list[str], code: int, error: str, hint: str) -> None:
    try:
        found = main(["generate", "--json", *arguments])
    except SystemExit as exited:
        found = int(exited.code or 0)
    out = capsys.readouterr().out
    line: dict[str, Any] = json.loads(out)
    assert found == code and out.count("\n") == 1 and line.keys() == {"error", "hint"}
    assert error in line["error"] and hint in line["hint"]


def test_ctrl_c_as_json(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Sana, "load", interrupt)
    assert main(["generate", "x", "--json"]) == 130
    assert json.loads(capsys.readouterr().out) == {"error": "interrupted", "hint": ""}


def test_lines_where_there_is_no_terminal(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in five seconds, however many steps there are in them."""
    clock = iter(range(0, 100, 2))
    # not of the module itself: servers of other tests go by it
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.bar(unit="step") as shown:
        for step in range(1, 8):
            shown("denoise", step, 7)
    assert capsys.readouterr().err == "denoise: 3 of 7\ndenoise: 6 of 7\n"
    with progress.bar(unit="B") as shown:
        shown("a model", 0, 0)
        shown("a model", 0, 0)
        shown("a model", 0, 0)
        shown("a model", 2_000_000, 4_000_000)
        shown("a model", 2_000_000, 4_000_000)
        shown("a model", 3_000_000, 4_000_000)
    assert capsys.readouterr().err == "a model\na model: 3 of 4 MB\n"
    with progress.bar(quiet=True) as shown:
        assert shown is progress.unseen


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    command = f'"{sys.executable}" -m sana_edge generate x --steps 1 --seed 1 --model {GRAPHS} {closed}'
    done = subprocess.run(["sh", "-c", command], timeout=120)
    assert done.returncode == 0 and read_metadata("sana-1.png")["seed"] == 1


def test_a_program_without_streams(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pythonw and frozen programs with windows have none."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with Sana.load(str(tiny_folder), progress=True) as sana:
        assert sana.generate("x", steps=1)
    assert main(["generate", "x", "--steps", "1", "--seed", "1", "--model", str(tiny_folder)]) == 0


def test_a_backend_of_another_machine_is_not_hidden(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Only what --from brought is made up for."""

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedDevice("no", "hint")

    monkeypatch.setattr(Sana, "load", refuse)
    assert main(["generate", "x", "--backend", "triton"]) == 1
