"""`sana-edge generate --prompts`: files and stdin, what it prints, and exit codes."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from stand_in import StandInSana

from sana_edge import Image, Sana
from sana_edge.cli import many
from sana_edge.cli.main import main
from sana_edge.errors import OutOfMemory

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Stand(StandInSana):
    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def sana(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `Sana.load` was given; the seeds in "fails" do, and "interrupt" ends it as Ctrl-C."""
    asked: dict[str, Any] = {"fails": ()}

    def before(seed: int) -> None:
        if seed == asked.get("interrupt"):
            raise KeyboardInterrupt
        if seed in asked["fails"]:
            raise OutOfMemory("not enough memory", "close others")

    def load(model: str, **options: Any) -> Stand:
        asked.update(options, model=model)
        return Stand(before)

    monkeypatch.setattr(Sana, "load", load)
    return asked


def run(*arguments: str, seed: str = "7") -> int:
    return main(["generate", "--prompts", *arguments, "--output", "out", "--seed", seed])


def test_a_file(sana: dict[str, Any], capsys: Capture) -> None:
    Path("p.txt").write_text("a house\n# no\na boat\n")
    assert run("p.txt", "--images", "2", "--int8", "--steps", "5") == 0
    said = capsys.readouterr()
    names = ["00001-7.png", "00002-8.png", "00003-9.png", "00004-10.png"]
    assert said.out.splitlines() == [str(Path("out", name)) for name in names]
    assert said.err == "4 drawn, of 4 in out\n" and sana["int8"] is True
    assert run("p.txt", "--count", "2", "--int8", "--steps", "5") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "0 drawn, 4 kept, of 4 in out\n")
    assert run("p.txt", "--images", "2", "--steps", "6") == 1
    err = capsys.readouterr().err
    assert "4 pictures in out were drawn otherwise" in err and "the same command goes on" not in err


def test_stdin(sana: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for content, line in ((b'{"prompt": "a", "seed": 3}\n', 1), (b"\xef\xbb\xbf\r\n{a|a} house", 2)):
        stdin = io.TextIOWrapper(io.BytesIO(content))
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("-", "--name", "{line}-{prompt}", "--json") == 0
        first, last = map(json.loads, capsys.readouterr().out.splitlines())
        assert (first["event"], first["line"], first["done"], first["total"]) == ("picture", line, 1, 1)
        assert last == {"event": "end", "drawn": 1, "kept": 0, "failed": 0, "left": 0, "bad": 0}
    assert sorted(path.name for path in Path("out").glob("*.png")) == ["1-a.png", "2-a-house.png"]


def test_failures(sana: dict[str, Any], capsys: Capture) -> None:
    Path("p.txt").write_text("a\nb\nc\n")
    sana["fails"] = (8,)
    assert run("p.txt", "--json") == 1
    said = capsys.readouterr()
    events = [json.loads(line) for line in said.out.splitlines()]
    assert [event.get("event") for event in events] == ["picture", "failed", "picture", "end", None]
    assert (events[1]["error"], events[1]["seed"]) == ("not enough memory", 8)
    assert events[4]["error"] == "1 of 3 pictures failed: 00002-8.png (line 2): not enough memory"
    assert "2 drawn, 1 failed, of 3 in out; the same command goes on" in said.err
    sana["fails"] = ()
    assert run("p.txt") == 0 and capsys.readouterr().out == f"{Path('out', '00002-8.png')}\n"


def test_what_a_picture_was_made_with(sana: dict[str, Any], capsys: Capture) -> None:
    """--from brings the options of another, and not its prompt."""
    made = {"prompt": "a cat", "seed": 3, "steps": 5, "model": "sana-tiny", "version": "0.1.0"}
    Image(np.zeros((8, 8, 3), np.uint8), 3, made).save("a.png")
    Path("p.txt").write_text("a house\n")
    assert main(["generate", "--prompts", "p.txt", "--output", "out", "--from", "a.png"]) == 0
    entry = json.loads(Path("out", "manifest.jsonl").read_text().splitlines()[1])
    assert entry["options"] == {"steps": 5, "prompt": "a house", "seed": 3}


def test_ctrl_c(sana: dict[str, Any], capsys: Capture) -> None:
    Path("p.txt").write_text("a\nb\nc\n")
    sana["interrupt"] = 8
    assert run("p.txt") == 130
    assert capsys.readouterr().err == "1 drawn, 2 left, of 3 in out; the same command goes on\ninterrupted\n"
    del sana["interrupt"]
    assert run("p.txt") == 0 and len(capsys.readouterr().out.splitlines()) == 2


def test_lines_of_progress(sana: dict[str, Any], capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in five seconds where there is no terminal, with what is left by the pace so far."""
    clock = iter(range(0, 1000, 4))
    # not of the module itself: servers of other tests go by it
    monkeypatch.setattr(many, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    Path("p.txt").write_text("a\nb\nc\nd\n")
    assert run("p.txt") == 0
    lines = capsys.readouterr().err.splitlines()
    assert all(re.fullmatch(r"pictures: \d of 4, \d+ s left", line) for line in lines[:-1])
    assert len(lines) > 2 and lines[-2] == "pictures: 4 of 4, 0 s left"
    assert run("p.txt", "--force", "--quiet") == 0 and capsys.readouterr().err == ""


def test_bad_lines(sana: dict[str, Any], capsys: Capture) -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 0}\n{"prompt": "c", "sede": 1}\n')
    assert run("p.jsonl") == 1
    err = capsys.readouterr().err
    assert "2 lines are bad: line 2: steps is 0" in err and "(did you mean seed?)" in err
    assert "model" not in sana and not Path("out").exists()
    assert run("p.jsonl", "--skip-bad") == 0
    assert "note:  passed over line 3: unknown option 'sede'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--prompts", "missing.txt", "--output", "out"], 1, "cannot read the prompts in missing.txt"),
        (["--prompts", "p.txt"], 2, "--prompts needs --output"),
        (["--prompts", "p.txt", "--output", "-"], 2, "--prompts needs --output"),
        (["a house", "--prompts", "p.txt", "--output", "out"], 2, "a prompt and --prompts"),
        (["--prompts", "p.txt", "--output", "p.txt"], 1, "p.txt exists and is not a folder"),
        (["--prompts", "p.txt", "--output", "out", "--batch", "x"], 2, "'x' is no number of pictures"),
        (["--prompts", "p.txt", "--output", "out", "--batch", "0"], 1, "batch is 0"),
        (["--prompts", "p.txt", "--output", "out", "--workers", "2"], 1, "--workers is 2"),
        (["--prompts", "p.txt", "--output", "out", "--retries", "-1"], 1, "--retries is -1"),
        (["--prompts", "p.txt", "--output", "out", "--images", "0"], 1, "images is 0"),
        (["--prompts", "p.txt", "--output", "out", "--seed", "-1"], 1, "seed is -1"),
        (["--prompts", "p.txt", "--output", "out", "--quality", "5"], 1, "PNG loses nothing"),
        (["--prompts", "p.txt", "--output", "out", "--name", "{x}"], 1, "unknown {x}"),
        (["--prompts", "p.txt", "--output", "out", "--variations", "2"], 1, "--variations are of one"),
        (["a house", "--combinations"], 2, "is for --prompts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refused(sana: dict[str, Any], capsys: Capture, arguments: list[str], code: int, said: str) -> None:
    Path("p.txt").write_text("a house\n")
    try:
        found = main(["generate", *arguments])
    except SystemExit as exited:
        found = int(exited.code or 0)
    assert (found, "model" in sana) == (code, False)
    assert said in capsys.readouterr().err and not Path("out").exists()
