"""Locked scratch folders beside what is being written, and what dead processes left of theirs.

A scratch folder is locked while its process lives, so that the next writer beside it can tell what was left
behind, and removes it. Where a new folder cannot change places with the old one in a single step, renames are
written into `plan.json` before the first; whoever removes the scratch folder finishes what was interrupted.
What then finds its name taken is kept under another.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sana_edge.errors import CheckpointError, one_line
from sana_edge.system.json_values import Reader, read_json
from sana_edge.system.regular import open_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("sana_edge.system")

_SUFFIX, _LOCK = ".sana-edge", "lock"
# of Linux's fcntl.h and stdio.h
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# characters of a name of which 255 bytes are taken
_STEM = 60
# as `mkdtemp` names it
_MADE = re.compile(r"\..*\.[a-z0-9_]{8}\.sana-edge", re.DOTALL)
# seconds; a scratch folder without a lock is being made, or lies where there are no locks
_YOUNG = 24 * 3600.0


@contextlib.contextmanager
def scratch_folder(target: Path, folder: Path) -> Iterator[Path]:
    """A locked folder in ``folder``, removed at the end with what is in it."""
    _sweep(folder)
    scratch, lock = _made(target, folder)
    kept = False
    try:
        (scratch / "mode").touch()
        yield scratch
    except BaseException:
        # what could be neither taken nor put back waits for the next writer
        kept = _holds_old(scratch)
        raise
    finally:
        lock.close()
        if not kept:
            _remove(scratch)


def _made(target: Path, folder: Path) -> tuple[Path, IO[bytes]]:
    """A new folder and its lock; another writer may take it for a dead one's before it is locked."""
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:16]}.", suffix=_SUFFIX, dir=folder))
        try:
            return scratch, _locked(scratch)
        except (FileNotFoundError, BlockingIOError):
            if not os.path.isdir(folder):
                raise


def _remove(scratch: Path) -> None:
    """The lock goes last: whoever is interrupted leaves what the next writer knows."""
    with contextlib.suppress(OSError):
        if os.path.lexists(scratch / "old"):
            # half an old one must not be taken for what was still to be renamed
            os.rename(scratch / "old", scratch / "gone")
            flush_folder(scratch)
        for path in scratch.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink()
        (scratch / _LOCK).unlink(missing_ok=True)
        scratch.rmdir()


def is_scratch(name: str) -> bool:
    return name.startswith(".") and name.endswith(_SUFFIX)


def _holds_old(scratch: Path) -> bool:
    old = scratch / "old"
    return old.is_dir() and not old.is_symlink() and any(old.iterdir())


def _locked(scratch: Path) -> IO[bytes]:
    if fcntl is None:
        return open(scratch / _LOCK, "wb")
    unnamed = scratch / f"{_LOCK}.new"
    lock = open(unnamed, "wb")  # noqa: SIM115 (held until the end)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise
    except OSError:
        # where there are no locks it gets no name
        return lock
    os.rename(unnamed, scratch / _LOCK)
    return lock


def _sweep(folder: Path) -> None:
    """Remove scratch folders whose processes are dead."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as found:
            # a link leads to somebody's own
            left = [Path(e.path) for e in found if is_scratch(e.name) and e.is_dir(follow_symlinks=False)]
        for scratch in left:
            with contextlib.suppress(OSError), _unlocked(scratch) as dead:
                if dead:
                    _finish(scratch)
                    _remove(scratch)


@contextlib.contextmanager
def _unlocked(scratch: Path) -> Iterator[bool]:
    """Whether the process that made a scratch folder is dead; its lock is held until the end."""
    lock, unnamed = scratch / _LOCK, scratch / f"{_LOCK}.new"
    if fcntl is None and lock.exists():
        # Windows does not remove what is open
        lock.unlink()
        yield True
    elif fcntl is not None and (lock.exists() or unnamed.exists()):
        # a pipe, as an archive may bring one, would wait
        with open_regular(lock if lock.exists() else unnamed) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError:
                # no locks here
                yield time.time() - scratch.stat().st_mtime > _YOUNG
                return
            yield True
    else:
        # nothing of it is there yet, or no longer; anything else is somebody's own
        yield _MADE.fullmatch(scratch.name) is not None and not any(scratch.iterdir())


def take_folder(scratch: Path, target: Path) -> None:
    """Rename a whole folder; an interruption after `plan.json` is finished by `_finish`."""
    new, old = scratch / "new", scratch / "old"
    if os.path.lexists(target) and exchange(new, target):
        flush_folder(scratch)
        flush_folder(target.parent)
        return
    _write_plan(scratch, target, None)
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
        raise
    flush_folder(target.parent)


def exchange(path: Path, other: Path) -> bool:
    """Let two things of one file system change places in one step, or say that this cannot be done here."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    # as `os.rename` would
    sys.audit("os.rename", str(path), str(other), -1, -1)
    names = (os.fsencode(path), _AT_FDCWD, os.fsencode(other))
    return bool(rename(_AT_FDCWD, *names, ctypes.c_uint(_RENAME_EXCHANGE)) == 0)


def take_entries(scratch: Path, target: Path, replaced: list[str]) -> None:
    """Rename entry by entry; an interruption after `plan.json` is finished by `_finish`."""
    new, old = scratch / "new", scratch / "old"
    old.mkdir()
    _write_plan(scratch, target, replaced)
    moved: list[str] = []
    try:
        for name in replaced:
            os.rename(target / name, old / name)
        for path in sorted(new.iterdir()):
            os.rename(path, target / path.name)
            moved.append(path.name)
    except BaseException:
        for name in moved:
            os.rename(target / name, new / name)
        for path in list(old.iterdir()):
            os.rename(path, target / path.name)
        raise
    flush_folder(target)


def _write_plan(scratch: Path, target: Path, replaced: list[str] | None) -> None:
    entries = sorted(path.name for path in (scratch / "new").iterdir())
    plan = {"inode": scratch.stat().st_ino, "target": target.name, "replaced": replaced, "new": entries}
    unnamed = scratch / "plan.json.new"
    unnamed.write_text(json.dumps(plan), encoding="utf-8")
    flush(unnamed)
    os.replace(unnamed, scratch / "plan.json")
    flush_folder(scratch)


@dataclass(frozen=True)
class _Plan:
    """What a process is about to rename; ``replaced`` is None for a whole folder.

    ``inode`` is the scratch folder's own: one that came with a download has another, and nothing is renamed
    for it.
    """

    inode: int
    target: str
    replaced: tuple[str, ...] | None
    new: tuple[str, ...]


def _is_name(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & {"/", os.sep, "\0"}


def _finish(scratch: Path) -> None:
    """Rename to the end what a dead process had begun to rename; what it had not begun stays as it was.

    An old folder that has no way back, as its name is taken or its plan of another scratch folder, stays too.
    """
    new, old, plan = scratch / "new", scratch / "old", _plan(scratch)
    if plan is None:
        if _holds_old(scratch):
            _keep(old, scratch.parent / scratch.name[1:].rsplit(".", 2)[0], "old")
    elif plan.replaced is not None:
        _finish_entries(scratch, plan)
    elif old.exists() and new.exists():
        target = scratch.parent / plan.target
        try:
            os.rename(new, target)
        except OSError:
            if not os.path.lexists(target):
                raise
            # the old one first, which cannot be made again
            _keep(old, target, "old")
            _keep(new, target, "new")


def _finish_entries(scratch: Path, plan: _Plan) -> None:
    new, old, above = scratch / "new", scratch / "old", scratch.parent
    if not old.is_dir() or not new.is_dir():
        return
    left = {path.name for path in new.iterdir()}
    if not any(old.iterdir()) and left == set(plan.new):
        return
    for name in plan.replaced or ():
        if not os.path.lexists(old / name) and os.path.lexists(above / name):
            os.rename(above / name, old / name)
    for name in sorted(left):
        if os.path.lexists(above / name):
            _keep(new / name, above / name, "new")
        else:
            os.rename(new / name, above / name)


def _plan(scratch: Path) -> _Plan | None:
    """What is to be finished; None where there is nothing, or it came with a download."""
    try:
        plan: _Plan = Reader("plan.json").convert(read_json(scratch / "plan.json"), _Plan)
    except (OSError, ValueError, CheckpointError):
        return None
    names = (plan.target, *(plan.replaced or ()), *plan.new)
    linked = any((scratch / name).is_symlink() for name in ("new", "old"))
    own = plan.inode == scratch.stat().st_ino and not linked and all(map(_is_name, names))
    return plan if own else None


def _keep(path: Path, place: Path, kind: str) -> None:
    """Give what a dead process left in ``path`` a name beside ``place``, and say which."""
    for number in itertools.count(1):
        kept = place.with_name(f"{place.name[:_STEM]}.{kind}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(kept):
            os.rename(path, kept)
            note = f"{place} was taken after its writer had died: the {kind} one is now {kept}"
            logger.warning(one_line(note))
            return


def flush(path: Path) -> None:
    # Windows flushes only what could be written
    with contextlib.suppress(PermissionError), open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    for above, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(above, name)):
                flush(Path(above, name))
        flush_folder(Path(above))


def flush_folder(folder: Path) -> None:
    """Names too are on the disk; Windows does not open folders."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
