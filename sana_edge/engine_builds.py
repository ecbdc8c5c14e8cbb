"""Building TensorRT engines into a folder: once, whole or not at all, by one process at a time."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sana_edge import package
from sana_edge.engine_cache import FORMAT, VERSION, Entry, Key, read_entry
from sana_edge.engine_lock import locked
from sana_edge.errors import SanaError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def build_once(
    folder: Path,
    key: Key,
    options: Mapping[str, Any],
    source: Path,
    make: Callable[[Path], None],
    *,
    needed: int,
    on_wait: Callable[[str], None] = lambda holder: None,
) -> tuple[Entry, bool]:
    """The engine for a key and options, made unless it is there; two processes at once make it once.

    Args:
        make: writes the engine into the file that it is given; what it raises leaves nothing behind.
        needed: bytes that the engine may need on the disk.
        on_wait: called with the other process where another one is building this engine.

    Returns:
        The engine, and whether this call made it.

    Raises:
        SanaError: the folder cannot be written or the disk has not enough space.
    """
    target = folder / key.name
    with _storage(folder):
        _prepare(folder)
        with locked(folder / f".{key.name}.lock", on_wait):
            entry = read_entry(target.with_name(f"{target.name}.json"))
            if entry is not None and entry.key == key and _same(entry.options, options) and _is_whole(entry):
                return entry, False
            for partial in folder.glob(f".{key.name}.*.partial"):
                # of a process that was killed: nobody else is here under the lock
                partial.unlink(missing_ok=True)
            _check_space(folder, needed)
            partial = folder / f".{key.name}.{secrets.token_hex(4)}.partial"
            try:
                make(partial)
                return _publish(partial, target, key, options, source), True
            finally:
                partial.unlink(missing_ok=True)


def _is_whole(entry: Entry) -> bool:
    return entry.path.is_file() and entry.path.stat().st_size == entry.bytes


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether options are equal once they have been through JSON, which has no tuples."""
    return bool(json.loads(json.dumps(dict(left))) == json.loads(json.dumps(dict(right))))


def _publish(partial: Path, target: Path, key: Key, options: Mapping[str, Any], source: Path) -> Entry:
    """Give a finished engine its name and its sidecar, which makes it an engine."""
    sidecar = target.with_name(f"{target.name}.json")
    size, sha256 = partial.stat().st_size, package.digest([partial])
    described = {
        "format": FORMAT,
        "version": VERSION,
        "key": dataclasses.asdict(key),
        "options": dict(options),
        "source": str(source.absolute()),
        "sha256": sha256,
        "bytes": size,
    }
    written = partial.with_suffix(".json.partial")
    try:
        written.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        # never an engine beside another one's sidecar
        sidecar.unlink(missing_ok=True)
        os.replace(partial, target)
        os.replace(written, sidecar)
    finally:
        written.unlink(missing_ok=True)
    return Entry(target, key, options, str(source.absolute()), sha256, size)


def _prepare(folder: Path) -> None:
    """Make the folder, for this user only, and see that files can be made in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = folder / f".{secrets.token_hex(4)}.partial"
    try:
        probe.touch(exist_ok=False)
    finally:
        probe.unlink(missing_ok=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SanaError(
            f"{folder} has {free / 1e9:.1f} GB free, an engine of this graph may need {needed / 1e9:.1f} GB",
            "free some space, or choose another folder with --output",
        )


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in _FULL
        hint = "the disk is full: free some space, or choose" if full else "choose"
        reason = error.strerror or error
        raise SanaError(
            f"cannot write engines into {folder}: {reason}", f"{hint} another folder with --output"
        ) from error
