"""Where what can be made again is kept between runs, and checksums of files that are read once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from pathlib import Path

from sana_edge.errors import SanaError
from sana_edge.store.package import digest
from sana_edge.system import atomic
from sana_edge.system.json_values import read_bounded

VARIABLE = "SANA_EDGE_CACHE"

# path, size, times of change and inode
FileState = tuple[str, int, int, int, int]

_SHA256 = re.compile(b"[0-9a-f]{64}")


def user_cache() -> Path | None:
    """The folder, which may not exist yet: $SANA_EDGE_CACHE, or sana-edge among the user's caches.

    None where the user has no home.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    above = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if above and os.path.isabs(above):
        return Path(above) / "sana-edge"
    try:
        return Path.home() / ".cache" / "sana-edge"
    except RuntimeError:
        return None


def file_state(path: Path) -> FileState:
    """What changes with a file's content.

    Programs may put back the time of the content, which they show, but not that of the entry itself (Windows
    has only the first).

    Raises:
        OSError: there is no such file.
    """
    now = os.stat(path)
    return os.path.realpath(path), now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino


def known_digest(path: Path) -> str:
    """SHA-256 of a file's content, noted in the user's cache and read once for each state of the file.

    Raises:
        CheckpointError: it cannot be read.
        OSError: there is no such file.
    """
    return _digest(path, file_state(path))


@functools.lru_cache(maxsize=256)
def _digest(path: Path, state: FileState) -> str:
    cache = user_cache()
    if cache is None:
        return digest([path])
    note = cache / "digests" / hashlib.sha256(repr(state).encode("utf-8", "surrogatepass")).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        known = read_bounded(note, 64)
        if _SHA256.fullmatch(known):
            return known.decode()
    found = digest([path])
    # a cache that cannot be written costs time only
    with contextlib.suppress(SanaError):
        atomic.write_bytes(note, found.encode())
    return found
