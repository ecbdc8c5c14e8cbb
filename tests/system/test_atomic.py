"""Files and folders that appear whole or not at all: links, mount points, processes that die in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import zygote

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.system import atomic, scratch

KIND = "{'kind': 'model folder', 'is_kind': lambda folder: (folder / 'index').is_file()}"


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def old_folder(path: Path) -> Path:
    path.mkdir()
    for name in ("index", "weights"):
        (path / name).write_text("old")
    return path


def new_folder(output: Path) -> None:
    with atomic.new_folder(output, force=True, **eval(KIND)) as folder:
        for name in ("config", "index"):
            (folder / name).write_text("new")


def killed(output: Path, at: str) -> None:
    """A process that writes ``output`` and dies at the ``at``-th rename, or before any of them."""
    code = f"""
import os, signal, sys
from pathlib import Path
from sana_edge.system import atomic, scratch
scratch.exchange = lambda path, other: False
left, rename = [{at}], os.rename
def dying(source, target, **options):
    if Path(source).name != "lock.new":
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
    rename(source, target, **options)
os.rename = dying
inside = os.environ["INSIDE"] == "1"
atomic.os.path.ismount = lambda path: inside
with atomic.new_folder(Path({str(output)!r}), force=True, **{KIND}) as folder:
    for name in ("config", "index"):
        (folder / name).write_text("new")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("inside", ["0", "1"])
@pytest.mark.parametrize("at", range(4))
def test_the_next_writer_finds_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str, at: int
) -> None:
    output = old_folder(tmp_path / "model")
    monkeypatch.setenv("INSIDE", inside)
    if inside == "0" and at > 1:
        pytest.skip("there are two renames")
    killed(output, str(at))
    place = output if inside == "1" else tmp_path
    # any file that is written there
    atomic.write_bytes(place / "another", b"")
    (place / "another").unlink()
    assert contents(output) in ({"index": "old", "weights": "old"}, {"config": "new", "index": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in output.iterdir()} == set(contents(output))


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_name_that_somebody_took_while_its_writer_was_dead(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """What has it stays, and both of the dead one's folders have names that people see."""
    output = old_folder(tmp_path / "model")
    monkeypatch.setenv("INSIDE", "0")
    killed(output, "1")
    assert not output.exists()
    if kind == "file":
        output.write_text("mine")
    elif kind == "folder":
        output.mkdir()
        (output / "mine").write_text("mine")
    else:
        output.symlink_to("nowhere")
    (tmp_path / "model.old").write_text("mine too")
    for _ in range(2):
        atomic.write_bytes(tmp_path / "another", b"")
    names = {"model", "model.old", "model.old-2", "model.new", "another"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "model.old").read_text() == "mine too"
    assert contents(tmp_path / "model.old-2") == {"index": "old", "weights": "old"}
    assert contents(tmp_path / "model.new") == {"config": "new", "index": "new"}
    assert "the old one is now" in caplog.text and "model.old-2" in caplog.text


def test_an_entry_that_somebody_made_while_its_writer_was_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = old_folder(tmp_path / "volume")
    monkeypatch.setenv("INSIDE", "1")
    killed(output, "2")
    assert os.listdir(output) != ["index", "weights"]
    (output / "index").write_text("mine")
    atomic.write_bytes(output / "another", b"")
    assert contents(output) == {"index": "mine", "index.new": "new", "config": "new", "another": ""}


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_two_folders_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = old_folder(tmp_path / "model")
    if not scratch.exchange(output, old_folder(tmp_path / "other")):
        pytest.skip("not in this file system")
    assert not scratch.exchange(output, tmp_path / "nowhere")
    monkeypatch.setattr(os, "rename", lambda *names: pytest.fail("a second step"))
    monkeypatch.setattr(scratch, "_locked", lambda folder: (folder / "lock").open("wb"))
    new_folder(output)
    assert contents(output) == {"config": "new", "index": "new"}


def test_a_folder_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    with pytest.raises(SanaError) as caught, atomic.new_entries(tmp_path / "made") as folder:
        (folder / "a").write_text("new")
        old_folder(tmp_path / "made")
    assert "meanwhile" in caught.value.hint
    assert contents(tmp_path / "made") == {"index": "old", "weights": "old"}


@pytest.mark.parametrize("name", ["notes.sana-edge", ".notes.sana-edge"])
def test_folders_that_are_called_like_scratch_folders_stay(tmp_path: Path, name: str) -> None:
    own = old_folder(tmp_path / name)
    os.utime(own, (0, 0))
    atomic.write_bytes(tmp_path / "file", b"")
    assert contents(own) == {"index": "old", "weights": "old"}


def test_a_folder_with_others_of_the_suffix_is_not_empty(tmp_path: Path) -> None:
    output = tmp_path / "model"
    (output / "notes.sana-edge").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="is not empty"), atomic.new_folder(output, **eval(KIND)):
        pass
    assert (output / "notes.sana-edge").is_dir()


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with atomic.new_file(tmp_path / "slow") as slow:
        slow.write_text("half")
        atomic.write_bytes(tmp_path / "quick", b"1")
        slow.write_text("whole")
    assert contents(tmp_path) == {"slow": "whole", "quick": "1"}


def test_a_mount_point_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, other = old_folder(tmp_path / "volume"), old_folder(tmp_path / "model")
    (output / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)
    before = output.stat().st_ino
    for folder in (output, other):
        new_folder(folder)
        assert contents(folder) == {"config": "new", "index": "new"}
    assert output.stat().st_ino == before
    assert (output / "lost+found").is_dir()
    with pytest.raises(RuntimeError), atomic.new_folder(output, force=True, **eval(KIND)):
        raise RuntimeError
    assert contents(output) == {"config": "new", "index": "new"}


def test_what_could_not_be_renamed_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, rename = old_folder(tmp_path / "volume"), os.rename
    monkeypatch.setattr(os.path, "ismount", lambda path: path == output)

    def failing(source: Path, target: Path) -> None:
        if Path(source).parent.name == "new" and Path(source).name == "index":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(SanaError, match="Input/output error"):
        new_folder(output)
    assert contents(output) == {"index": "old", "weights": "old"}
    assert {path.name for path in output.iterdir()} == {"index", "weights"}


@pytest.mark.parametrize("inside", [False, True])
def test_what_could_not_be_put_back_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A file system that goes away in the middle, and comes back."""
    output, rename = old_folder(tmp_path / "volume"), os.rename
    monkeypatch.setattr(os.path, "ismount", lambda path: inside and path == output)
    monkeypatch.setattr(scratch, "exchange", lambda path, other: False)

    def failing(source: Path, target: Path) -> None:
        if {"new", "old"} & {Path(source).name, Path(source).parent.name}:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(SanaError, match="Input/output error"):
        patch.setattr(os, "rename", failing)
        new_folder(output)
    place = output if inside else tmp_path
    atomic.write_bytes(place / "another", b"")
    (place / "another").unlink()
    assert contents(output) == {"config": "new", "index": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name in ("model", "empty"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "file").symlink_to(tmp_path / "disk" / "target")
    old_folder(tmp_path / "disk" / "model")
    (tmp_path / "disk" / "empty").mkdir()
    for name in ("model", "empty"):
        new_folder(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert contents(tmp_path / "disk" / name) == {"config": "new", "index": "new"}
    atomic.write_bytes(tmp_path / "file", b"1")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "disk" / "target").read_text() == "1"


def test_links_of_strangers_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    for leads_to in ("mine", "nowhere", "file"):
        (tmp_path / "file").unlink(missing_ok=True)
        (tmp_path / "file").symlink_to(leads_to)
        atomic.write_bytes(tmp_path / "file", b"1", follow=False)
        assert not (tmp_path / "file").is_symlink() and (tmp_path / "file").read_text() == "1"
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_entries_appear_beside_others(tmp_path: Path) -> None:
    output = old_folder(tmp_path / "model")
    with pytest.raises(InvalidInput, match="index exists"), atomic.new_entries(output) as folder:
        (folder / "index").write_text("new")
    with atomic.new_entries(output, force=True) as folder:
        (folder / "index").write_text("new")
    assert contents(output) == {"index": "new", "weights": "old"}
    with pytest.raises(RuntimeError), atomic.new_entries(tmp_path / "more"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("replaced", [["mine"], ["../mine"], None])
def test_a_scratch_folder_that_came_with_a_download(tmp_path: Path, replaced: list[str] | None) -> None:
    """Its plan renames nothing, and what it names stays; what it calls old is not hidden any more."""
    (tmp_path / "out").mkdir()
    for place in (tmp_path, tmp_path / "out"):
        (place / "mine").write_text("mine")
    theirs = tmp_path / "out" / ".made.x.sana-edge"
    for name in ("new", "old"):
        (theirs / name).mkdir(parents=True)
    (theirs / "lock").touch()
    (theirs / "old" / "a").touch()
    (theirs / "new" / "mine").write_text("theirs")
    plan = {"inode": 1, "target": "made", "replaced": replaced, "new": ["mine", "b"]}
    (theirs / "plan.json").write_text(json.dumps(plan))
    atomic.write_bytes(tmp_path / "out" / "file", b"x")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["file", "made.old", "mine"]
    for place in (tmp_path, tmp_path / "out"):
        assert (place / "mine").read_text() == "mine"


def mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *places: Path) -> None:
    """Let the system say that something of the same file system is mounted there."""
    table = tmp_path.parent / f"{tmp_path.name}.mounts"
    lines = (
        f"36 35 98:0 / {str(place).replace(' ', chr(92) + '040')} rw - ext4 /dev/x rw" for place in places
    )
    table.write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr(atomic, "_MOUNTS", table)


def test_a_folder_of_the_same_file_system_that_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name cannot be renamed, which is known before the work and not after it."""
    output = old_folder(tmp_path / "a volume")
    mounted(monkeypatch, tmp_path, output)
    before = output.stat().st_ino
    new_folder(output)
    assert contents(output) == {"config": "new", "index": "new"} and output.stat().st_ino == before


def test_a_file_that_is_mounted_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_text("old")
    mounted(monkeypatch, tmp_path, tmp_path / "a.png")
    for write in (
        lambda: atomic.check_writable(tmp_path / "a.png"),
        lambda: atomic.write_bytes(tmp_path / "a.png", b""),
    ):
        with pytest.raises(SanaError) as caught:
            write()
        assert "mount point" in caught.value.hint
    assert contents(tmp_path) == {"a.png": "old"}


@pytest.mark.parametrize(
    "name", ["\u00e9" * 120, "\U0001f600" * 60, "a" * 255, os.fsdecode(b"bad\xff\xfe"), "a\nb"]
)
def test_names_that_the_file_system_takes(tmp_path: Path, name: str) -> None:
    if sys.platform == "darwin" and name.encode(errors="surrogateescape").startswith(b"bad"):
        pytest.skip("takes UTF-8 alone")
    atomic.write_bytes(tmp_path / name, b"1")
    (tmp_path / name).unlink()
    new_folder(tmp_path / name)
    new_folder(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert contents(tmp_path / name) == {"config": "new", "index": "new"}


def test_a_limit_of_the_size_of_files(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    code = f"""
import resource
from pathlib import Path
from sana_edge.errors import SanaError
from sana_edge.system import atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    atomic.write_bytes(Path({str(tmp_path / "file")!r}), bytes(5000))
except SanaError as error:
    print(error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ulimit -f" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_folder_above_that_goes_away(tmp_path: Path) -> None:
    for kind in (atomic.new_file, lambda path: atomic.new_folder(path, **eval(KIND))):
        above = tmp_path / "above"
        above.mkdir()
        with pytest.raises(SanaError, match="cannot write"), kind(above / "output") as path:
            above.rename(tmp_path / "gone")
            (path / "x" if path.is_dir() else path).write_text("1")
        shutil.rmtree(tmp_path / "gone")
        assert os.listdir(tmp_path) == []


def test_several_processes_that_write_the_same(tmp_path: Path) -> None:
    """The last one wins; nothing of the others stays, and nobody meets half a folder."""
    output = tmp_path / "model"
    code = f"""
from pathlib import Path
from sana_edge.errors import SanaError
from sana_edge.system import atomic
lost = 0
for number in range(40):
    try:
        with atomic.new_folder(Path({str(output)!r}), force=True, **{KIND}) as folder:
            for name in ("config", "index"):
                (folder / name).write_text("new")
    except SanaError as error:
        lost += 1
print(lost)
"""
    children = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err
    atomic.write_bytes(tmp_path / "another", b"")
    assert contents(output) == {"config": "new", "index": "new"}
    assert sorted(os.listdir(tmp_path)) == ["another", "model"]


def write_file(output: Path) -> None:
    atomic.write_bytes(output / "index", b"new")


WRITERS = dict.fromkeys(("folder", "folder inside", "folder in two steps"), new_folder) | {"file": write_file}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "writer",
    ["folder", *(pytest.param(name, marks=pytest.mark.slow) for name in WRITERS if name != "folder")],
)
def test_killed_before_any_change_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """Whichever it is, the next writer beside finds the old one or the new one, and removes all else."""
    write, number, code = WRITERS[writer], 0, -signal.SIGKILL
    output = tmp_path / "model"
    if writer == "folder inside":
        mounted(monkeypatch, tmp_path, output)
    if writer == "folder in two steps":
        monkeypatch.setattr(scratch, "exchange", lambda path, other: False)
    while code != 0:
        number += 1
        old_folder(output)
        child = os.fork()
        if child == 0:
            zygote.kill_before(number)
            write(output)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for place in (tmp_path, output):
            atomic.write_bytes(place / "another", b"")
            (place / "another").unlink()
        assert code in (0, -signal.SIGKILL)
        old, new = {"index": "old", "weights": "old"}, {"config": "new", "index": "new"}
        assert contents(output) in (old, new, {**old, "index": "new"} if writer == "file" else old), number
        assert [path.name for path in tmp_path.iterdir()] == ["model"], number
        assert {path.name for path in output.iterdir()} == set(contents(output)), number
        shutil.rmtree(output)
    assert number > 5


@pytest.mark.parametrize("entries", [(), ("lock.new",), ("lock",)])
def test_what_a_dead_process_had_only_begun(tmp_path: Path, entries: tuple[str, ...]) -> None:
    begun = tmp_path / ".made.png.abcd_123.sana-edge"
    begun.mkdir()
    for name in entries:
        (begun / name).touch()
    atomic.write_bytes(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes by name")
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, kind: str) -> None:
    """Root could put a file in the place of /dev/null."""
    path = tmp_path / "out.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    writers = partial(atomic.write_bytes, content=b"x"), partial(atomic.write_json, content=1)
    for attempt in (atomic.check_writable, *writers):
        with pytest.raises(SanaError, match=r"cannot write .*out\.json: it is no regular file") as caught:
            attempt(path)
        assert caught.value.hint == "it is a device, a pipe or a socket: choose another file"
    assert not path.is_file() and os.listdir(tmp_path) == ["out.json"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes by name")
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_an_archive_calls_a_scratch_folder(tmp_path: Path, kind: str) -> None:
    """A link to somebody's folder that has a lock in it, or a lock that would wait."""
    own, theirs = tmp_path / "own", tmp_path / "out" / ".a.abcd_123.sana-edge"
    for folder in (own, theirs.parent):
        folder.mkdir()
    for name in ("lock", "mine"):
        (own / name).write_text("mine")
    if kind == "link":
        theirs.symlink_to(own)
    else:
        theirs.mkdir()
        os.mkfifo(theirs / "lock")
    atomic.write_bytes(tmp_path / "out" / "file", b"x")
    assert contents(own) == {"lock": "mine", "mine": "mine"}
    assert sorted(os.listdir(tmp_path / "out")) == [theirs.name, "file"]


@pytest.mark.skipif(sys.platform == "win32", reason="a current folder stays")
def test_the_current_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    for write in (
        lambda: atomic.write_bytes(Path("a"), b""),
        lambda: atomic.check_writable(Path("a")),
        lambda: new_folder(Path("a")),
        lambda: atomic.new_entries(Path("a")).__enter__(),
    ):
        with pytest.raises(SanaError, match="cannot write a"):
            write()
