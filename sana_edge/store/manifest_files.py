"""The files of an exported folder against their checksums, once for each file that has not changed since.

Reading a gigabyte takes a second or more, and a program that starts for one picture would pay it every time.
So what was good leaves a mark in the user's cache: an empty file named after `cache.file_state` and checksum.
Without a cache that can be written every file is read every time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from sana_edge.errors import CheckpointError
from sana_edge.store import onnx_values, package
from sana_edge.store.cache import file_state, user_cache
from sana_edge.store.manifest import DAMAGED, FILE, Manifest, StoredFile

# what is looked at beside the checksum: marks of earlier versions do not count
_LOOKED = "values"


def stored_files(folder: Path, *, without: Iterable[str] = ()) -> dict[str, StoredFile]:
    """Size and checksum of the files below a folder, as `Manifest.files` has them.

    Args:
        without: names that are left out, as the manifest is.

    Raises:
        CheckpointError: a file cannot be read.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {
        name: StoredFile(sha256=package.digest([paths[name]]), bytes=paths[name].stat().st_size)
        for name in sorted(paths.keys() - {FILE, *without})
    }


def verify(
    folder: Path, manifest: Manifest, names: Iterable[str] | None = None, *, again: bool = False
) -> None:
    """Compare files of an exported folder, whose sizes `manifest.read` saw, with their checksums.

    Where one is read, the constants of the graphs among them are looked at, too.

    Args:
        names: of files in the manifest; None for all.
        again: read also what is marked as good.

    Raises:
        CheckpointError: a file cannot be read or has another content, or a constant is not finite or lies
            outside; the message names it.
    """
    marks, chosen = [], list(manifest.files if names is None else names)
    for name in chosen:
        path, expected = folder / name, manifest.files[name].sha256
        mark = _mark(path, expected)
        if mark is not None and not again and mark.exists():
            continue
        found = _digest(path)
        if found != expected:
            raise CheckpointError(
                f"{path} has checksum {found[:12]}..., {FILE} says {expected[:12]}...", DAMAGED
            )
        marks.append(mark)
    graphs = {graph.file for graph in manifest.graphs.values() if graph.file in chosen}
    if marks:
        onnx_values.check_values(folder, sorted(graphs), manifest.files, DAMAGED)
    for mark in marks:
        if mark is not None:
            # a cache that is missing costs time only
            with contextlib.suppress(OSError):
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()


def _mark(path: Path, expected: str) -> Path | None:
    """Where it is noted that a file as it is now has the expected content; None where there is no cache."""
    cache = user_cache()
    try:
        state = file_state(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}", DAMAGED) from error
    if cache is None:
        return None
    name = repr((*state, expected, _LOOKED)).encode("utf-8", "surrogatepass")
    return cache / "verified" / hashlib.sha256(name).hexdigest()


def _digest(path: Path) -> str:
    try:
        return package.digest([path])
    except CheckpointError as error:
        # its hint speaks of packages
        raise CheckpointError(error.message, DAMAGED) from error
