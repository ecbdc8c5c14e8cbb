"""Engines on disk: which is found, what is refused, and what a broken or full folder leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.engines.tensorrt.cache import Entry, Key, Machine, find
from sana_edge.engines.tensorrt.profiles import Sizes
from sana_edge.engines.tensorrt.trust import check_loadable
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
    folder: Path, key: Key = KEY, content: bytes = b"engine", sizes: tuple[Sizes, ...] = (), **options: Any
) -> Entry:
    """The engine that is there, or a new one of ``content``; as a build does it."""
    options = {**OPTIONS, **options}
    engine_cache.prepare(folder)
    there = engine_cache.current(folder, key, options, sizes)
    return there or engine_cache.store(folder, key, options, SOURCE, content, sizes)


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
    # other options are another engine
    assert made(cache, content=b"bigger", workspace=2).bytes == 6
    assert find(cache, KEY, SOURCE).path.read_bytes() == b"bigger"


def test_the_command_to_rebuild_has_what_was_built_with(cache: Path, tmp_path: Path) -> None:
    low, middle, high = (256, 512), (512, 512), (1024, 768)
    sizes = (Sizes(low, middle, high),)
    made(cache, sizes=sizes, workspace=1.5)
    flags = "--min 256x512 --opt 512x512 --max 1024x768 --workspace 1.5"
    command = f"sana-edge build '/my models/onnx' --output {cache}"
    entry = find(cache, KEY, "/my models/onnx")
    assert entry.rebuild() == f"{command} {flags}"
    assert entry.rebuild(force=True) == f"{command} {flags} --force"
    wider = "--min 128x512 --opt 512x512 --max 1024x2048 --workspace 1.5"
    assert entry.rebuild((128, 2048)) == f"{command} {wider}"
    # of this model's other graphs, and of this one for another machine, they are the best guess
    for key in (dataclasses.replace(KEY, graph="decoder"), with_machine(tensorrt="11.4.0")):
        with pytest.raises(SanaError) as refused:
            find(cache, key, "/my models/onnx")
        assert refused.value.hint == f"build it: {command} {flags}"
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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_writing_that_fails_leaves_the_old_engine(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old, write, before = made(cache), Path.write_bytes, sorted(cache.iterdir())

    def fails(path: Path, content: bytes) -> int:
        if path.suffix == ".json":
            raise error
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fails)
        with pytest.raises((KeyboardInterrupt, SanaError)) as caught:
            engine_cache.store(cache, KEY, OPTIONS, SOURCE, b"new")
    if isinstance(caught.value, SanaError):
        assert caught.value.message == f"cannot write {cache}: No space left on device"
        assert caught.value.hint.startswith("the disk is full")
    assert sorted(cache.iterdir()) == before
    check_loadable(old)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    # also root cannot make a folder below a file
    with pytest.raises(SanaError, match=r"cannot write .*file/engines: Not a directory"):
        made(tmp_path / "file" / "engines")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o500)
    with pytest.raises(SanaError, match=r"cannot write .*: Permission denied"):
        made(cache)


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


@pytest.mark.parametrize("value", ["Infinity", "NaN", "-1", "1e999", "null", '"5"', "[5]", "[" * 100_000])
def test_a_sidecar_with_an_odd_value_hides_no_other(cache: Path, value: str) -> None:
    entry = made(cache)
    text = (cache / f"{KEY.name}.json").read_text()
    (cache / "a.engine.json").write_text(text.replace(f'"bytes": {entry.bytes}', f'"bytes": {value}'))
    assert [found.path for found in engine_cache.entries(cache)] == [entry.path]
    assert find(cache, KEY, SOURCE).path == entry.path
