"""Trust in TensorRT engines: loading one runs the code in it, so only the user's own are loaded unasked."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from sana_edge.engines.tensorrt.cache import Entry, engine_folder, is_whole
from sana_edge.errors import SanaError


def check_loadable(entry: Entry, *, trust: bool = False, quick: bool = False) -> None:
    """Check that an engine is this user's own, or trusted, and that its file is what was built.

    Args:
        quick: look at the file's size only; loading it needs the whole check.

    Raises:
        SanaError: ``trust`` is false and it lies outside of the user's cache or others may write to it; or it
            is not the file that its sidecar describes. The hint has the command that builds it again.
    """
    there = entry.path.is_file()
    reason = "" if trust or not there else _untrusted(entry.path, engine_folder())
    if reason:
        raise SanaError(
            f"{entry.path} {reason}, and loading an engine runs the code in it",
            f"if you built it, pass --trust-engine; or build your own: {_own(entry, engine_folder())}",
        )
    if not is_whole(entry, quick=quick):
        size = entry.path.stat().st_size if there else 0
        built = "it is not what was" if size == entry.bytes else f"{size} bytes, {entry.bytes} were"
        raise SanaError(f"{entry.path} is damaged: {built} built", f"build it again: {entry.rebuild()}")


def _untrusted(path: Path, cache: Path) -> str:
    """Why a file may not be loaded without a word of the user; empty where it may."""
    if not path.resolve().is_relative_to(cache.resolve()):
        return f"is outside of your engine cache {cache}"
    if sys.platform != "win32":
        for part in (path, path.parent):
            if part.stat().st_uid != os.getuid() or _is_open(part):
                return "can be written by other users"
    return ""


def _own(entry: Entry, cache: Path) -> str:
    """What makes an engine of this user's own in the place of one that may not be loaded."""
    # one that is in that place already would be found there, and kept
    inside = entry.path.parent == cache
    build = entry.rebuild(folder=cache, force=inside)
    return f"{shlex.join(['chmod', 'go-w', str(cache)])} && {build}" if inside and _is_open(cache) else build


def _is_open(path: Path) -> bool:
    return sys.platform != "win32" and bool(path.stat().st_mode & 0o022)
