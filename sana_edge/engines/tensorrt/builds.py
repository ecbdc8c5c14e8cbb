"""Building TensorRT engines into a folder: once, whole or not at all, by one process at a time."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sana_edge.engines.tensorrt.cache import FORMAT, VERSION, Entry, Key, is_whole, read_entry
from sana_edge.engines.tensorrt.lock import locked
from sana_edge.engines.tensorrt.profiles import Sizes
from sana_edge.errors import SanaError
from sana_edge.store import package

_FULL = (errno.ENOSPC, errno.EDQUOT)
# seconds after which nobody writes an engine any more
_ABANDONED = 24 * 3600
# engines that others can write are not loaded, whatever files of this user are like otherwise
_OWN = 0o600


def build_once(
    folder: Path,
    key: Key,
    options: Mapping[str, Any],
    source: Path,
    make: Callable[[Path], None],
    *,
    needed: int,
    sizes: Sequence[Sizes] = (),
    force: bool = False,
    on_wait: Callable[[str], None] = lambda holder: None,
) -> tuple[Entry, bool]:
    """The engine for a key and options, made unless it is there; two processes at once make it once.

    Args:
        make: writes the engine into the file that it is given; what it raises leaves nothing behind.
        needed: bytes that the engine may need on the disk.
        sizes: what the profiles were made of, for the command that builds it again.
        force: make it also where it is there.
        on_wait: called with the other process where another one is building this engine.

    Returns:
        The engine, and whether this call made it.

    Raises:
        SanaError: the folder cannot be written or the disk has not enough space.
    """
    target = folder / key.name
    with _storage(folder):
        _prepare(folder)
        with locked(folder / f".{key.name}.lock", on_wait) as alone:
            entry = None if force else read_entry(target.with_name(f"{target.name}.json"))
            if entry is not None and entry.key == key and _same(entry.options, options) and is_whole(entry):
                if entry.sizes != tuple(sizes):
                    # to a graph without sizes they make no difference, but in the command
                    entry = dataclasses.replace(entry, sizes=tuple(sizes))
                    _store(entry)
                return entry, False
            _remove_partials(folder, key, alone=alone)
            _check_space(folder, needed)
            partial = folder / f".{key.name}.{secrets.token_hex(4)}.partial"
            try:
                partial.touch(mode=_OWN, exist_ok=False)
                make(partial)
                sha256, size = package.digest([partial]), partial.stat().st_size
                entry = Entry(target, key, options, str(source.absolute()), sha256, size, tuple(sizes))
                _store(entry, partial)
                return entry, True
            finally:
                partial.unlink(missing_ok=True)


def _remove_partials(folder: Path, key: Key, *, alone: bool) -> None:
    """Remove what processes that were killed have left: all of it, where nobody else can be building."""
    for partial in folder.glob(f".{key.name}.*.partial"):
        with suppress(FileNotFoundError):
            if alone or time.time() - partial.stat().st_mtime > _ABANDONED:
                partial.unlink()


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether options are equal once they have been through JSON, which has no tuples."""
    return bool(json.loads(json.dumps(dict(left))) == json.loads(json.dumps(dict(right))))


def _store(entry: Entry, partial: Path | None = None) -> None:
    """Write the sidecar, which makes a file an engine, and give the finished one in ``partial`` its name."""
    sidecar = entry.path.with_name(f"{entry.path.name}.json")
    described = {
        "format": FORMAT,
        "version": VERSION,
        "key": dataclasses.asdict(entry.key),
        "options": dict(entry.options),
        "sizes": [dataclasses.astuple(size) for size in entry.sizes],
        "source": entry.source,
        "sha256": entry.sha256,
        "bytes": entry.bytes,
    }
    written = entry.path.with_name(f".{entry.path.name}.{secrets.token_hex(4)}.json.partial")
    try:
        written.touch(mode=_OWN, exist_ok=False)
        written.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        if partial is not None:
            # never an engine beside another one's sidecar
            sidecar.unlink(missing_ok=True)
            os.replace(partial, entry.path)
        os.replace(written, sidecar)
    finally:
        written.unlink(missing_ok=True)


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
