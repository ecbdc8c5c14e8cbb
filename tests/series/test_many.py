"""A series in a folder: drawn once, gone on with after every kind of end, and never by two at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn

from sana_edge import Cancelled, Sana, SanaError, generate_many, read_metadata
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.series import entries as entries_room
from sana_edge.series import manifest as manifest_room
from sana_edge.series import series as series_room
from sana_edge.series.manifest import FILE, Manifest
from sana_edge.series.pictures import Picture, Settings
from sana_edge.series.series import Drawn, Series

LINES = ["a house", {"prompt": "a boat", "images": 2}, "a star"]
NAMES = ["00001-7.png", "00002-8.png", "00003-9.png", "00004-10.png"]


def draw(folder: Path, painter: Any = None, lines: Any = LINES, **options: Any) -> list[Drawn]:
    return list(generate_many(painter or StandIn(), lines, folder, **{"seed": 7, **options}))


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def test_drawn_once(tmp_path: Path) -> None:
    painter = StandIn()
    first = draw(tmp_path, painter)
    assert [drawn.path.name for drawn in first] == painter.drawn == NAMES
    assert sorted(os.listdir(tmp_path)) == [*NAMES, FILE]
    assert read_metadata(first[1].path)["seed"] == 8 and first[1].line == 2
    header, *rest = entries(tmp_path)
    assert header == {"sana_edge_series": 1, "seed": 7}
    assert [(entry["file"], entry["state"]) for entry in rest] == [(name, "done") for name in NAMES]
    assert rest[0]["options"] == {"prompt": "a house", "seed": 7} and rest[0]["metadata"]["seed"] == 7
    assert draw(tmp_path, painter) == [] and len(painter.drawn) == 4


def test_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / NAMES[2]).unlink()
    # lines that were added, and the seed of the first time
    names = [drawn.path.name for drawn in draw(tmp_path, lines=[*LINES, "a cat"], seed=None)]
    assert names == [NAMES[2], "00005-11.png"]


def test_a_random_seed_is_kept(tmp_path: Path) -> None:
    first = draw(tmp_path, seed=None)
    first[3].path.unlink()
    again = draw(tmp_path, seed=None)
    assert [one.path for one in again] == [first[3].path] and again[0].options == first[3].options
    with pytest.raises(InvalidInput, match="was drawn with seed"):
        draw(tmp_path, seed=first[0].options["seed"] + 1)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lines": ["a house", "a cat", "a star"]}, r"2 pictures .*prompt was 'a boat', is 'a cat'"),
        ({"steps": 5}, r"4 pictures .*steps was not given, is 5"),
        ({"painter": StandIn(quantization="w8a8")}, "quantization was not given, is 'w8a8'"),
    ],
    ids=["line", "option", "model"],
)
def test_changed_options_are_noticed(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    draw(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(InvalidInput, match=said):
        draw(tmp_path, **changed)
    assert (tmp_path / FILE).read_bytes() == before
    assert draw(tmp_path, force=True, **changed)
    assert draw(tmp_path, **changed) == []


def test_another_backend_goes_on(tmp_path: Path) -> None:
    """It differs by roundings alone."""
    draw(tmp_path)
    assert draw(tmp_path, StandIn(backend="cuda")) == []


def test_foreign_files_are_in_the_way(tmp_path: Path) -> None:
    (tmp_path / NAMES[1]).write_bytes(b"a photograph")
    with pytest.raises(InvalidInput, match=f"1 files .* in the way: {NAMES[1]}"):
        draw(tmp_path)
    assert (tmp_path / NAMES[1]).read_bytes() == b"a photograph"
    assert len(draw(tmp_path, force=True)) == 4


@pytest.mark.parametrize(
    "spoil", [lambda content: content[:-30], lambda content: b"", len], ids=["cut", "empty", "zeros"]
)
def test_damaged_pictures_are_drawn_again(tmp_path: Path, spoil: Any) -> None:
    """Cut off, empty, zeros; what somebody changed and can be read stays."""
    draw(tmp_path)
    path = tmp_path / NAMES[1]
    whole = path.read_bytes()
    path.write_bytes(bytes(spoil(whole)))
    painter = StandIn()
    draw(tmp_path, painter)
    assert painter.drawn == [NAMES[1]] and path.read_bytes() == whole
    path.write_bytes(whole + b"more")
    assert draw(tmp_path) == []
    path.unlink()
    path.mkdir()
    with pytest.raises(InvalidInput, match="in the way"):
        draw(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("torn", [True, False], ids=["half a line", "no line"])
def test_a_process_that_is_killed_loses_the_picture_in_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool
) -> None:
    """After its file, before its line: it is drawn again, and taken for no foreign one."""
    write = os.write

    def dies(number: int, data: bytes) -> int:
        if b'"00003' in data:
            if torn:
                write(number, data[: len(data) // 2])
            raise Killed
        return write(number, data)

    monkeypatch.setattr(manifest_room.os, "write", dies)
    with pytest.raises(Killed):
        draw(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / NAMES[2]).exists()
    painter = StandIn()
    draw(tmp_path, painter)
    assert painter.drawn == NAMES[2:]
    assert [entry["file"] for entry in entries(tmp_path)[1:]] == NAMES


def test_failures_are_passed_over_and_drawn_again(tmp_path: Path) -> None:
    troubled = {
        NAMES[1]: OutOfMemory("not enough memory", "close others"),
        NAMES[2]: RuntimeError("nan\nnan"),
    }

    def before(picture: Picture) -> None:
        if picture.name in troubled:
            raise troubled[picture.name]

    found = draw(tmp_path, StandIn(before))
    assert [(one.path.name, one.error) for one in found if one.error] == [
        (NAMES[1], "not enough memory"),
        (NAMES[2], "RuntimeError: nan nan"),
    ]
    assert [entry["state"] for entry in entries(tmp_path)[1:]] == ["done", "failed", "failed", "done"]
    troubled.clear()
    assert [drawn.path.name for drawn in draw(tmp_path)] == NAMES[1:3]


def test_retries_in_the_same_run(tmp_path: Path) -> None:
    tries: list[str] = []

    def before(picture: Picture) -> None:
        tries.append(picture.name)
        if picture.name == NAMES[1] and tries.count(NAMES[1]) < 3:
            raise OutOfMemory("not enough memory")

    found = draw(tmp_path, StandIn(before), retries=5)
    assert tries == [*NAMES, NAMES[1], NAMES[1]]
    assert [bool(one.error) for one in found] == [False, True, False, False, True, False]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = generate_many(StandIn(), LINES, tmp_path, seed=7)
    next(first)
    with pytest.raises(InvalidInput, match="another process draws into"):
        generate_many(StandIn(), LINES, tmp_path, seed=7)
    del first
    # an iterator that was never begun holds nothing when it is gone
    generate_many(StandIn(), LINES, tmp_path, seed=7)
    assert len(draw(tmp_path)) == 3


def test_cancelled(tmp_path: Path) -> None:
    cancel = threading.Event()

    def before(picture: Picture) -> None:
        if picture.name == NAMES[2]:
            cancel.set()

    class Watching(StandIn):
        def outcomes(self, pictures: Any, on_progress: Any, cancel: Any) -> Iterator[Any]:
            for outcome in super().outcomes(pictures, on_progress, cancel):
                if cancel.is_set():
                    raise Cancelled("cancelled")
                yield outcome

    with pytest.raises(Cancelled):
        draw(tmp_path, Watching(before), cancel=cancel)
    assert len(draw(tmp_path)) == 2


def test_a_full_disk_ends_it_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(number: int, data: bytes) -> int:
        if b'"00002' in data:
            write(number, data[:5])
            raise OSError(28, "No space left on device")
        return write(number, data)

    monkeypatch.setattr(manifest_room.os, "write", full)
    with pytest.raises(SanaError, match="No space left") as caught:
        draw(tmp_path)
    assert "the disk is full" in caught.value.hint
    monkeypatch.undo()
    assert [entry.get("file") for entry in entries(tmp_path)] == [None, NAMES[0]]
    assert len(draw(tmp_path)) == 3


@pytest.mark.parametrize("lines", [["a", {"prompt": "b", "steps": 0}, {"sede": 1}, "c"]])
def test_bad_lines(tmp_path: Path, lines: Any) -> None:
    folder = tmp_path / "out"
    with pytest.raises(InvalidInput, match=r"2 lines are bad: line 2: steps is 0.*; line 3: unknown option"):
        draw(folder, lines=lines)
    assert not folder.exists()
    assert [drawn.line for drawn in draw(folder, lines=lines, skip_bad=True)] == [1, 4]
    with pytest.raises(InvalidInput, match="1 line is bad"):
        draw(tmp_path / "other", lines=[{"sede": 1}], skip_bad=True)


def test_folders_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="not a folder"):
        draw(tmp_path / "file")
    with pytest.raises(SanaError, match="cannot write"):
        draw(tmp_path / "file" / "below")
    for content in (
        "",
        "{}\n",
        "{}",
        '\n{"a": 1}\n',
        "[1]\n",
        '{"sana_edge_series": true, "seed": 1}\n',
        "\xff\n",
    ):
        (tmp_path / FILE).write_text(content, encoding="latin-1")
        if not content:
            continue
        with pytest.raises(InvalidInput, match="no manifest of a series"):
            draw(tmp_path)
    (tmp_path / FILE).write_text('{"sana_edge_series": 2, "seed": 1}\n')
    with pytest.raises(InvalidInput, match="later sana-edge"):
        draw(tmp_path)


def test_a_manifest_that_is_a_link_stays_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for content in (None, "mine"):
        if content is not None:
            (tmp_path / "mine").write_text(content)
        (tmp_path / "folder" / FILE).unlink(missing_ok=True)
        (tmp_path / "folder" / FILE).symlink_to(tmp_path / "mine")
        with pytest.raises(SanaError):
            draw(tmp_path / "folder")
    assert (tmp_path / "mine").read_text() == "mine"


def test_links_among_pictures_stay_what_they_lead_to(tmp_path: Path) -> None:
    first = draw(tmp_path / "folder")
    (tmp_path / "mine").write_text("mine")
    first[0].path.unlink()
    first[0].path.symlink_to("../mine")
    # its line says that it is done
    draw(tmp_path / "folder")
    assert not first[0].path.is_symlink() and (tmp_path / "mine").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "folder" / "sub").symlink_to("../other")
    prompts = [{"prompt": "a", "output": "sub/a.png"}]
    with pytest.raises(InvalidInput, match="sub is a link"):
        list(generate_many(StandIn(), prompts, tmp_path / "folder", force=True))
    assert not any((tmp_path / "other").iterdir())


def test_lines_of_a_manifest_that_nobody_wrote(tmp_path: Path) -> None:
    """What they say is not believed: the pictures are looked at, or drawn again."""
    draw(tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    lines[1] = "\0" * 20
    lines[2] = "[" * 100_000
    lines[3] = json.dumps({"file": NAMES[2], "state": "done", "model": 5, "options": [1]})
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidInput, match="1 pictures"):
        draw(tmp_path)
    assert [one.path.name for one in draw(tmp_path, force=True)] == NAMES[:3]


def test_no_lock_on_this_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(manifest_room.fcntl, "flock", refuse)
    with Manifest(tmp_path, 1):
        pass


@pytest.mark.parametrize("batch", [0, 65, "many", 1.5, True])
def test_batches_that_are_none(tmp_path: Path, batch: Any) -> None:
    with pytest.raises(InvalidInput, match="batch is"):
        draw(tmp_path, batch=batch)


def test_unknown_options_are_a_type_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="stepps"):
        draw(tmp_path, stepps=3)


def test_the_bundled_graphs(tmp_path: Path) -> None:
    """A picture has the bytes that it has alone."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    lines = [{"prompt": "a red {house|house}", "seed": 7, "count": 2}, {"prompt": "a boat", "size": "40x32"}]
    options: dict[str, Any] = {"steps": 1, "size": (64, 64), "exact_size": True}
    with Sana.load("sana-tiny-int8-onnx") as sana:
        lines[1]["exact_size"] = False
        found = draw(tmp_path, sana, lines, **options)
        alone = sana.generate("a red house", seed=8, **options)
        assert found[1].path.read_bytes() == alone.png()
        assert found[2].metadata["size"] == [40, 32]
        # exported ones draw one at a time, whatever is asked for
        again = draw(tmp_path / "batch", sana, lines, batch=2, **options)
        assert [one.path.read_bytes() for one in again] == [one.path.read_bytes() for one in found]


PROGRAM = """
import sys, time
sys.path.insert(0, {support!r})
from stand_in import StandIn
from sana_edge import generate_many

def slowly(picture):
    time.sleep(0.05)

for drawn in generate_many(StandIn(slowly), ["a"] * 12, sys.argv[1], seed=1):
    print(drawn.path.name, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_by_a_signal(tmp_path: Path, number: int) -> None:
    """What it said to be drawn is, and what is left is drawn by the next one."""
    program = PROGRAM.format(support=str(Path(__file__).parents[1] / "support"))
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [process.stdout.readline().strip() for _ in range(3)]
    process.send_signal(number)
    said += process.stdout.read().split()
    process.wait()
    painter = StandIn()
    draw(tmp_path / "out", painter, ["a"] * 12, seed=None)
    assert not set(said) & set(painter.drawn)
    assert len(list((tmp_path / "out").glob("*.png"))) == 12
    # the one in work is drawn again, no other
    assert len(said) + len(painter.drawn) in (12, 13)


def test_one_that_was_quicker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look for a seed and the lock."""
    monkeypatch.setattr(series_room, "known_seed", lambda folder: Manifest(folder, 5).close())
    with pytest.raises(InvalidInput, match="has just drawn into"):
        draw(tmp_path)
    monkeypatch.undo()
    assert len(draw(tmp_path, seed=5)) == 4


def test_what_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "many.md").read_text(encoding="utf-8")
    assert [name for name in entries_room.NAMES if f"`{name}`" not in text] == []
    block = text.partition('{"prompt": "a red house"')
    lines = (block[1] + block[2]).partition("```")[0]
    found = list(entries_room.read_content(lines.encode()))
    assert len(found) == 2 and not any(isinstance(line, entries_room.Bad) for line in found)


def test_names_of_failures_are_cut(tmp_path: Path) -> None:
    def before(picture: Picture) -> None:
        raise OutOfMemory("no")

    lines = entries_room.read_prompts(["a"] * 9)
    with Series(lines, tmp_path, Settings(), seed=1) as series:
        list(series.draw(StandIn(before)))
        failures = series.failures
    assert failures is not None
    assert failures.message.startswith("9 of 9 pictures failed: 00001-1.png (line 1): no; ")
    assert failures.message.endswith("; and 4 more")
