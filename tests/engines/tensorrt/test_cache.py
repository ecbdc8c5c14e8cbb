"""Engines on disk: who builds, who waits, what is refused, and what a broken or full folder leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.engines.tensorrt import lock
from sana_edge.engines.tensorrt.builds import build_once
from sana_edge.engines.tensorrt.cache import Entry, Key, Machine, check_loadable, differs, find
from sana_edge.engines.tensorrt.lock import locked
from sana_edge.engines.tensorrt.profiles import Sizes
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store import package

LAPTOP = Machine("NVIDIA GeForce RTX 4070 Laptop GPU", (8, 9), "10.16.1.11", "575.64.03")
KEY = Key("sana-tiny", "ab" * 32, "denoiser", LAPTOP)
OPTIONS = {"profiles": [{"latent": ((1, 2), (3, 4), (5, 6))}], "workspace": None}
SOURCE = Path("/models/onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's own engines."""
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def made(
    folder: Path,
    key: Key = KEY,
    content: bytes = b"engine",
    sizes: tuple[Sizes, ...] = (),
    force: bool = False,
    **options: Any,
) -> Entry:
    entry, _ = build_once(
        *(folder, key, {**OPTIONS, **options}, SOURCE, lambda path: path.write_bytes(content) and None),
        needed=1,
        sizes=sizes,
        force=force,
    )
    return entry


def with_machine(**changed: Any) -> Key:
    return dataclasses.replace(KEY, machine=dataclasses.replace(LAPTOP, **changed))


def test_names_are_readable_and_differ_with_every_part() -> None:
    name = KEY.name
    assert name.startswith(
        "sana-tiny.denoiser.NVIDIA-GeForce-RTX-4070-Laptop-GPU-sm89.trt10.16.1.11.driver575.64.03."
    )
    others = [
        *(with_machine(gpu="NVIDIA GeForce RTX 4070"), with_machine(capability=(8, 6))),
        *(with_machine(tensorrt="10.16.1.12"), with_machine(driver="575.64.04")),
        *(dataclasses.replace(KEY, checksum="ac" * 32), dataclasses.replace(KEY, graph="decoder")),
    ]
    assert len({name, *(key.name for key in others)}) == 7
    strange = dataclasses.replace(KEY, model="../../a b\0ü" + 300 * "x").name
    assert len(strange.encode()) < 255 and "/" not in strange and not strange.startswith(".")


def test_an_engine_is_built_once_and_found(cache: Path) -> None:
    entry = made(cache)
    assert made(cache, content=b"other") == dataclasses.replace(
        entry, options=json.loads(json.dumps(OPTIONS))
    )
    found = find(cache, KEY, SOURCE)
    assert found.path.read_bytes() == b"engine" and found.key == KEY
    check_loadable(found)
    # of the user's only, and nothing but the engine and its sidecar
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert len(list(cache.iterdir())) == 2
    assert made(cache, content=b"bigger", workspace=2).bytes == 6
    assert find(cache, KEY, SOURCE).path.read_bytes() == b"bigger"
    # whatever is there
    made(cache, content=b"forced", workspace=2, force=True)
    assert find(cache, KEY, SOURCE).path.read_bytes() == b"forced"


def test_the_command_to_rebuild_has_what_was_built_with(cache: Path, tmp_path: Path) -> None:
    low, middle, high = (256, 512), (512, 512), (1024, 768)
    sizes = (Sizes(low, middle, high),)
    made(cache, sizes=sizes, workspace=1.5, version_compatible=True, hardware_compatible=True)
    flags = "--min 256x512 --opt 512x512 --max 1024x768 --workspace 1.5"
    compatible = "--version-compatible --hardware-compatible"
    command = f"sana-edge build '/my models/onnx' --output {cache}"
    entry = find(cache, KEY, "/my models/onnx")
    assert entry.rebuild() == f"{command} {flags} {compatible}"
    assert entry.rebuild(force=True) == f"{command} {flags} {compatible} --force"
    wider = "--min 128x512 --opt 512x512 --max 1024x2048 --workspace 1.5"
    assert entry.rebuild((128, 2048)) == f"{command} {wider} {compatible}"
    # of this model's other graphs, and of this one for another machine, they are the best guess
    for key in (dataclasses.replace(KEY, graph="decoder"), with_machine(tensorrt="11.4.0")):
        with pytest.raises(SanaError) as refused:
            find(cache, key, "/my models/onnx")
        assert refused.value.hint == f"build it: {command} {flags} {compatible}"
    with pytest.raises(SanaError) as refused:
        find(cache, dataclasses.replace(KEY, checksum="cd" * 32), "/my models/onnx")
    assert refused.value.hint == f"build it: {command}"
    elsewhere = made(tmp_path / "elsewhere", sizes=sizes)
    with pytest.raises(SanaError) as refused:
        check_loadable(elsewhere)
    own = f"sana-edge build /models/onnx --output {cache} --min 256x512 --opt 512x512 --max 1024x768"
    assert refused.value.hint.endswith(f"build your own: {own}")


def test_an_engine_that_is_there_takes_the_sizes_of_the_last_build(cache: Path) -> None:
    # a graph without sizes has the same profiles whatever they are
    made(cache, sizes=(Sizes((512, 512), (512, 512), (1024, 1024)),))
    last = (Sizes((512, 512), (512, 512), (2048, 2048)),)
    assert made(cache, content=b"other", sizes=last).sizes == last
    found = find(cache, KEY, SOURCE)
    assert found.sizes == last and found.path.read_bytes() == b"engine"
    check_loadable(found)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (with_machine(gpu="NVIDIA GeForce RTX 3060", capability=(8, 6)),
         r"another GPU \(.*4070 Laptop GPU, compute capability 8.9, this is .*3060, .* 8.6\)"),
        (with_machine(tensorrt="11.4.0"), r"of another TensorRT version \(10.16.1.11, this is 11.4.0\)"),
        (with_machine(driver="580.1"), r"for another driver \(575.64.03, this is 580.1\)"),
        (dataclasses.replace(KEY, checksum="cd" * 32), r"another model \(sana-tiny, abababab, not cdcdcd"),
    ],
)  # fmt: skip
def test_what_an_engine_is_for_is_named_with_the_command(cache: Path, key: Key, reason: str) -> None:
    made(cache)
    with pytest.raises(SanaError, match=reason) as refused:
        find(cache, key, "/my models/onnx")
    assert refused.value.hint == f"build it: sana-edge build '/my models/onnx' --output {cache}"
    with pytest.raises(SanaError, match="has no engine of sana-tiny's decoder"):
        find(cache, dataclasses.replace(KEY, graph="decoder"), SOURCE)


def test_compatible_engines_serve_other_machines(cache: Path) -> None:
    entry = made(cache)
    by_version = dataclasses.replace(entry, options={"version_compatible": True})
    assert not differs(by_version, with_machine(tensorrt="10.16.2", driver="580.1"))
    for other in ("10.15.9", "11.0.0"):
        assert "TensorRT version" in differs(by_version, with_machine(tensorrt=other))
    by_hardware = dataclasses.replace(entry, options={"hardware_compatible": True})
    assert not differs(by_hardware, with_machine(gpu="A100", capability=(8, 0), driver="1.2"))
    assert "another GPU" in differs(by_hardware, with_machine(gpu="T4", capability=(7, 5)))
    assert "TensorRT version" in differs(by_hardware, with_machine(tensorrt="11.4"))


def test_engines_are_code_and_only_the_users_own_are_loaded(cache: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "elsewhere")
    with pytest.raises(SanaError, match=r"is outside of your engine cache .* runs the code in it") as refused:
        check_loadable(other)
    assert "--trust-engine" in refused.value.hint
    assert refused.value.hint.endswith(f"build your own: sana-edge build /models/onnx --output {cache}")
    check_loadable(other, trust=True)
    # a sidecar is foreign text, and its folder no part of a command
    with pytest.raises(SanaError) as quoted:
        check_loadable(dataclasses.replace(other, source="x; rm y"))
    assert "sana-edge build 'x; rm y'" in quoted.value.hint
    # a link into the cache is not the cache
    own = made(cache)
    own.path.unlink()
    own.path.symlink_to(other.path)
    with pytest.raises(SanaError, match="is outside"):
        check_loadable(own)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_what_others_can_write_is_not_loaded(cache: Path) -> None:
    entry = made(cache)
    for path in (entry.path, cache):
        mode = path.stat().st_mode
        path.chmod(mode | 0o020)
        with pytest.raises(SanaError, match="can be written by other users"):
            check_loadable(entry)
        path.chmod(mode)
    check_loadable(entry)
    # what is there would be kept, and in such a folder any engine be refused
    command = f"sana-edge build /models/onnx --output {cache} --force"
    for path, own in ((entry.path, command), (cache, f"chmod go-w {cache} && {command}")):
        path.chmod(path.stat().st_mode | 0o002)
        with pytest.raises(SanaError) as refused:
            check_loadable(entry)
        assert refused.value.hint.endswith(f"build your own: {own}")
        path.chmod(path.stat().st_mode & ~0o002)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_what_was_built_is_loaded_where_files_are_open_to_the_group(cache: Path) -> None:
    before = os.umask(0o002)
    try:
        entry = made(cache)
        made(cache, sizes=(Sizes((512, 512), (512, 512), (512, 512)),))
    finally:
        os.umask(before)
    check_loadable(entry)
    assert {stat.S_IMODE(path.stat().st_mode) for path in cache.iterdir()} == {0o600}


@pytest.mark.parametrize("content", [b"engin", b"", b"Engine"])
def test_truncated_and_changed_engines_are_found(cache: Path, content: bytes) -> None:
    entry = made(cache)
    entry.path.write_bytes(content)
    with pytest.raises(SanaError, match="is damaged") as refused:
        check_loadable(entry)
    assert refused.value.hint == f"build it again: sana-edge build /models/onnx --output {cache}"
    # a quick look sees the size
    if len(content) == entry.bytes:
        check_loadable(entry, quick=True)
    else:
        with pytest.raises(SanaError, match="is damaged"):
            check_loadable(entry, quick=True)
    # the command does what it is for
    check_loadable(made(cache))
    entry.path.unlink()
    for trust in (True, False):
        with pytest.raises(SanaError, match="is damaged: 0 bytes"):
            check_loadable(entry, trust=trust)
    # one that is gone as well
    assert made(cache).path.read_bytes() == b"engine"


def test_an_engine_that_cannot_be_read_is_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, digest = made(cache), package.digest

    def unreadable(files: list[Path]) -> str:
        if files == [entry.path]:
            raise CheckpointError(f"cannot read {files}: Input/output error", "make the package again")
        return digest(files)

    monkeypatch.setattr(package, "digest", unreadable)
    with pytest.raises(SanaError, match="is damaged") as refused:
        check_loadable(entry)
    assert refused.value.hint == f"build it again: sana-edge build /models/onnx --output {cache}"
    assert made(cache, content=b"again!").path.read_bytes() == b"again!"


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"format": "sana-edge-engine", "version": 2}', "[" * 9999),
        {"sizes": [[[512, 512], [256, 256], [512, 512]]]},
        {"sizes": [[[512, 512]]]},
        {"sizes": 1},
    ],
)
def test_a_damaged_sidecar_is_no_engine(cache: Path, content: str | dict[str, Any]) -> None:
    entry = made(cache)
    sidecar = entry.path.with_name(f"{entry.path.name}.json")
    if isinstance(content, dict):
        content = json.dumps({**json.loads(sidecar.read_text()), **content})
    sidecar.write_text(content)
    assert engine_cache.entries(cache) == []
    assert made(cache, content=b"again").path.read_bytes() == b"again"


def test_a_failed_build_leaves_nothing_and_the_old_engine_stays(cache: Path) -> None:
    old = made(cache)
    before = sorted(path.name for path in cache.iterdir())

    def fails(path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    for options, force in (({"other": 1}, False), (OPTIONS, True)):
        with pytest.raises(KeyboardInterrupt):
            build_once(cache, KEY, options, SOURCE, fails, needed=1, force=force)
    assert sorted(path.name for path in cache.iterdir()) == before
    check_loadable(old)


def test_a_full_disk(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 9 * 10**9, 10**9))
    with pytest.raises(
        SanaError, match=r"has 1.0 GB free, an engine of this graph may need 2.5 GB"
    ) as refused:
        build_once(cache, KEY, OPTIONS, SOURCE, lambda path: None, needed=2_500_000_000)
    assert "--output" in refused.value.hint

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SanaError, match=r"cannot write engines into .*: No space left") as refused:
        build_once(cache, KEY, OPTIONS, SOURCE, full, needed=1)
    assert refused.value.hint.startswith("the disk is full")
    assert list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # also root cannot make a folder below a file
    with pytest.raises(SanaError, match=r"cannot write engines into .*file/engines: Not a directory"):
        made(tmp_path / "file" / "engines")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o500)
    with pytest.raises(SanaError, match=r"cannot write engines into .*: Permission denied"):
        made(cache)


def test_a_folder_that_refuses_files(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *given: Any, **named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SanaError, match="Read-only file system") as refused:
        made(cache)
    assert refused.value.hint == "choose another folder with --output"


# builds for half a second and says what happened; the log shows who built when
_BUILDER = """
import sys, time
from pathlib import Path
from sana_edge.engines.tensorrt.builds import build_once
from sana_edge.engines.tensorrt.cache import Key, Machine
folder, log = map(Path, sys.argv[1:3])
def make(path):
    with open(log, "a") as file:
        file.write("start\\n")
    path.write_bytes(b"half")
    time.sleep(float(sys.argv[3]))
    path.write_bytes(b"engine")
    with open(log, "a") as file:
        file.write("end\\n")
key = Key("m", "ab", "decoder", Machine("gpu", (8, 9), "10.0", "1"))
def waits(holder):
    print("waits for", holder)
entry, made = build_once(folder, key, {}, Path("/o"), make, needed=1, on_wait=waits)
print("made" if made else "there", entry.path.read_bytes())
"""


def start(folder: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _BUILDER, str(folder), str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert log.exists()


def test_of_three_processes_one_builds_and_the_others_wait(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(cache, log, 2)
    wait_for(log)
    others = [start(cache, log, 0), start(cache, log, 0)]
    said = [process.communicate(timeout=60)[0] for process in (first, *others)]
    assert said[0] == "made b'engine'\n"
    for text in said[1:]:
        assert text.splitlines()[-1] == "there b'engine'"
        assert f"waits for process {first.pid}" in text
    assert log.read_text() == "start\nend\n"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_the_lock_of_a_process_that_was_killed_is_taken_over(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = start(cache, log, 60)
    wait_for(log)
    second = start(cache, log, 0)
    time.sleep(0.5)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    # the half engine and the lock file of the dead are there
    assert second.communicate(timeout=30)[0].splitlines()[-1] == "made b'engine'"
    assert len(list(cache.iterdir())) == 2
    # and such files alone keep nobody waiting
    (tmp_path / "lock").write_text("process 1\n")
    with locked(tmp_path / "lock", pytest.fail) as held:
        assert held
    assert not (tmp_path / "lock").exists()


def test_a_lock_on_a_file_that_lost_its_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def take(handle: int) -> bool:
        if not taken:
            # its holder is done, and the next process will make a file of its own
            (tmp_path / "lock").unlink()
        taken.append(handle)
        return True

    monkeypatch.setattr(lock, "_try_lock", take)
    with locked(tmp_path / "lock"):
        assert (tmp_path / "lock").exists() and len(taken) == 2


def test_file_systems_without_locks_build_all_the_same(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="not on Windows")

    def refuse(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", pytest.fail) as held:
        assert (tmp_path / "lock").exists() and not held
    cache.mkdir(parents=True)
    old, young = (cache / f".{KEY.name}.{name}.partial" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    # a day and a bit
    os.utime(old, (time.time() - 90_000,) * 2)

    def make(path: Path) -> None:
        path.write_bytes(b"first")
        # another process begins meanwhile, and is done sooner
        assert made(cache, content=b"second").path.read_bytes() == b"second"
        assert path.read_bytes() == b"first"

    entry, _ = build_once(cache, KEY, OPTIONS, SOURCE, make, needed=1)
    check_loadable(entry)
    assert entry.path.read_bytes() == b"first"
    assert young.exists() and not old.exists()


def test_no_home_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cache, "user_cache", lambda: None)
    with pytest.raises(SanaError, match="no home folder") as refused:
        engine_cache.engine_folder()
    assert "SANA_EDGE_CACHE" in refused.value.hint


def test_the_checksum_is_that_of_graphs_and_weights() -> None:
    files = {"a.onnx": "1", "b.data": "2", "tokenizer/tokenizer.json": "3"}
    same = engine_cache.model_checksum({**files, "tokenizer/tokenizer.json": "4"})
    assert engine_cache.model_checksum(dict(reversed(files.items()))) == same
    for changed in ({"a.onnx": "9"}, {"b.data": "9"}, {"c.data": "2"}):
        assert engine_cache.model_checksum({**files, **changed}) != same
