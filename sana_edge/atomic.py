"""Files and folders that appear whole or not at all, and what dead processes left of theirs.

All writing goes to a hidden scratch folder in the same file system as its target; at the end everything is
flushed and renamed. A scratch folder is locked while its process lives, so that the next writer beside it can
tell what was left behind, and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.json_values import Reader, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_SUFFIX, _LOCK = ".sana-edge", "lock"
# seconds; a scratch folder without a lock is being made, or lies where there are no locks
_YOUNG = 24 * 3600.0

_ROOM = "free some space or choose another folder"
_HINTS = {
    errno.ENOSPC: f"the disk is full: {_ROOM}",
    errno.EDQUOT: f"the quota is used up: {_ROOM}",
    errno.ENOENT: "create the folder first, or choose another one",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_HINT = "check the free space and the permissions, or choose another folder"


def cannot_write(path: Path, error: Exception) -> SanaError:
    """What to say when ``path`` could not be written."""
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return SanaError(f"cannot write {path}: {reason}", _HINTS.get(error.errno or 0, _HINT))
    return SanaError(f"cannot write {path}: {' '.join(str(error).split()) or type(error).__name__}", _HINT)


@contextlib.contextmanager
def new_file(
    path: Path, *, force: bool = True, parents: bool = True, failures: tuple[type[Exception], ...] = ()
) -> Iterator[Path]:
    """Give an unused name to write to; at the end, and only then, that file gets the name ``path``.

    A link is followed: the file that it names is replaced, and it stays a link.

    Args:
        force: replace what is at ``path``.
        parents: make the folder where it is missing.
        failures: exceptions of a library that mean, as OSError does, that the file could not be written.

    Raises:
        FileExistsError: without ``force``, something is or has appeared at ``path``.
        SanaError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(target, target.parent) as scratch:
            temporary = scratch / target.name
            yield temporary
            # some libraries make files that only their owner reads
            temporary.chmod((scratch / "mode").stat().st_mode & 0o666)
            # a full disk may show only here, and the name must not appear before the content
            _flush(temporary)
            if force:
                os.replace(temporary, target)
            else:
                _name(temporary, target)
            _flush_folder(target.parent)
    except Exception as error:
        taken = isinstance(error, FileExistsError) and not force
        if taken or not isinstance(error, (OSError, *failures)):
            raise
        raise cannot_write(path, error) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; errors are those of `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read; NaN and infinity, which JSON lacks, are a ValueError."""
    write_bytes(path, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode())


def check_writable(path: Path) -> None:
    """Raise `SanaError` where no file can be made at ``path``; found out by making one beside it."""
    target = Path(os.path.realpath(path))
    try:
        with _scratch(target, target.parent) as scratch:
            (scratch / target.name).touch()
            with contextlib.suppress(FileNotFoundError):
                target.lstat()
    except OSError as error:
        raise cannot_write(path, error) from error


def check_folder(output: Path, *, force: bool, kind: str, is_kind: Callable[[Path], bool]) -> None:
    """See that a folder can be made at ``output``, or an empty one replaced, before any work.

    Args:
        force: replace a folder of this kind; an empty one is taken without, any other never.
        kind: what the folder is called in messages, such as "model folder".
        is_kind: whether a folder is one.

    Raises:
        InvalidInput: something is there that is not replaced.
        SanaError: the folder, or the one above, cannot be written.
    """
    target = Path(os.path.realpath(output))
    try:
        _check_taken(output, force=force, kind=kind, is_kind=is_kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(target, _room(target)):
            pass
    except OSError as error:
        raise cannot_write(output, error) from error


@contextlib.contextmanager
def new_folder(
    output: Path, *, force: bool = False, kind: str, is_kind: Callable[[Path], bool]
) -> Iterator[Path]:
    """Give an empty folder to write in; at the end, and only then, it takes the place of ``output``.

    It lies beside ``output``, or inside where that is a mount point or the folder above cannot be written; it
    is then taken entry by entry, and a process that dies meanwhile leaves that to the next one. Arguments and
    errors are those of `check_folder`.
    """
    check_folder(output, force=force, kind=kind, is_kind=is_kind)
    target = Path(os.path.realpath(output))
    try:
        with _scratch(target, _room(target)) as scratch:
            folder = scratch / "new"
            folder.mkdir()
            yield folder
            _flush_tree(folder)
            _check_taken(output, force=force, kind=kind, is_kind=is_kind)
            if scratch.parent == target:
                _take_entries(scratch, target, [path.name for path in _entries(target)])
            else:
                _take_folder(scratch, target)
    except OSError as error:
        raise cannot_write(output, error) from error


@contextlib.contextmanager
def new_entries(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder to write in, whose entries appear in ``output`` at the end, beside those there.

    Args:
        force: replace entries of the same names.

    Raises:
        InvalidInput: without ``force``, an entry of that name is there; all stays as it was.
        SanaError: they cannot be written.
    """
    target = Path(os.path.realpath(output))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(target, target if target.is_dir() else target.parent) as scratch:
            folder = scratch / "new"
            folder.mkdir()
            yield folder
            _flush_tree(folder)
            replaced = [path.name for path in folder.iterdir() if os.path.lexists(target / path.name)]
            if replaced and not force:
                hint = "choose another --output, or add --force"
                raise InvalidInput(f"{output / min(replaced)} exists", hint)
            if scratch.parent == target:
                _take_entries(scratch, target, replaced)
            else:
                _take_folder(scratch, target)
    except OSError as error:
        raise cannot_write(output, error) from error


def _check_taken(output: Path, *, force: bool, kind: str, is_kind: Callable[[Path], bool]) -> None:
    if os.path.lexists(output) and not output.is_dir():
        raise InvalidInput(f"{output} exists and is not a folder", "choose another --output")
    taken = output.is_dir() and bool(_entries(output))
    if taken and not is_kind(output):
        raise InvalidInput(f"{output} exists, is not empty and no {kind}", "choose another --output")
    # said only where it helps
    if taken and not force:
        raise InvalidInput(f"{output} exists", "choose another --output, or add --force")


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, but for scratch folders and what every new file system has."""
    return [path for path in folder.iterdir() if not _is_scratch(path.name) and path.name != "lost+found"]


def _is_scratch(name: str) -> bool:
    return name.startswith(".") and name.endswith(_SUFFIX)


def _room(target: Path) -> Path:
    """Where a scratch folder for a folder is made: beside it, or inside."""
    inside = target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK))
    return target if inside else target.parent


def _name(temporary: Path, path: Path) -> None:
    """Give a written file a name that nothing has."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # no hard links here: an empty file holds the name until it is replaced
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except BaseException:
            path.unlink()
            raise


def _take_folder(scratch: Path, target: Path) -> None:
    """Rename a whole folder; an interruption after `plan.json` is finished by `_finish`."""
    _write_plan(scratch, target, None)
    old = scratch / "old"
    try:
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(scratch / "new", target)
    except BaseException:
        if old.exists() and not os.path.lexists(target):
            os.rename(old, target)
        raise
    _flush_folder(target.parent)


def _take_entries(scratch: Path, target: Path, replaced: list[str]) -> None:
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
    _flush_folder(target)


def _write_plan(scratch: Path, target: Path, replaced: list[str] | None) -> None:
    entries = sorted(path.name for path in (scratch / "new").iterdir())
    plan = {"inode": scratch.stat().st_ino, "target": target.name, "replaced": replaced, "new": entries}
    unnamed = scratch / "plan.json.new"
    unnamed.write_text(json.dumps(plan), encoding="utf-8")
    _flush(unnamed)
    os.replace(unnamed, scratch / "plan.json")
    _flush_folder(scratch)


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
    """Rename to the end what a dead process had begun to rename; what it had not begun stays as it was."""
    try:
        plan = Reader("plan.json").convert(read_json(scratch / "plan.json"), _Plan)
    except (OSError, ValueError, SanaError):
        return
    names = (plan.target, *(plan.replaced or ()), *plan.new)
    linked = any((scratch / name).is_symlink() for name in ("new", "old"))
    if plan.inode != scratch.stat().st_ino or linked or not all(map(_is_name, names)):
        return
    new, old = scratch / "new", scratch / "old"
    if plan.replaced is None:
        target = scratch.parent / plan.target
        if old.exists() and new.exists() and not os.path.lexists(target):
            os.rename(new, target)
        return
    left = {path.name for path in new.iterdir()}
    if not any(old.iterdir()) and left == set(plan.new):
        return
    for name in plan.replaced:
        if not os.path.lexists(old / name) and os.path.lexists(scratch.parent / name):
            os.rename(scratch.parent / name, old / name)
    for name in left:
        os.rename(new / name, scratch.parent / name)


@contextlib.contextmanager
def _scratch(target: Path, folder: Path) -> Iterator[Path]:
    """A locked folder in ``folder``, removed at the end with what is in it."""
    _sweep(folder)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:64]}.", suffix=_SUFFIX, dir=folder))
    lock: IO[bytes] | None = None
    kept = False
    try:
        lock = _locked(scratch)
        (scratch / "mode").touch()
        yield scratch
    except BaseException:
        # what could be neither taken nor put back waits for the next writer
        kept = _holds_old(scratch)
        raise
    finally:
        if lock is not None:
            lock.close()
        if not kept:
            shutil.rmtree(scratch, ignore_errors=True)


def _holds_old(scratch: Path) -> bool:
    old = scratch / "old"
    return old.is_dir() and any(old.iterdir())


def _locked(scratch: Path) -> IO[bytes]:
    if fcntl is None:
        return open(scratch / _LOCK, "wb")
    unnamed = scratch / f"{_LOCK}.new"
    lock = open(unnamed, "wb")  # noqa: SIM115 (held until the end)
    # where there are no locks it gets no name
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unnamed, scratch / _LOCK)
    return lock


def _sweep(folder: Path) -> None:
    """Remove scratch folders whose processes are dead."""
    with contextlib.suppress(OSError):
        with os.scandir(folder) as found:
            left = [Path(entry.path) for entry in found if _is_scratch(entry.name)]
        for scratch in left:
            with contextlib.suppress(OSError), _unlocked(scratch) as dead:
                if dead:
                    _finish(scratch)
                    shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _unlocked(scratch: Path) -> Iterator[bool]:
    """Whether the process that made a scratch folder is dead; its lock is held until the end."""
    lock = scratch / _LOCK
    if not lock.exists():
        # anything without the file that every scratch folder begins with is somebody's own
        ours = (scratch / f"{_LOCK}.new").exists()
        yield ours and time.time() - scratch.stat().st_mtime > _YOUNG
    elif fcntl is None:
        # Windows does not remove what is open
        lock.unlink()
        yield True
    else:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield True


def _flush(path: Path) -> None:
    # Windows flushes only what could be written
    with contextlib.suppress(PermissionError), open(path, "rb+") as file:
        os.fsync(file.fileno())


def _flush_tree(folder: Path) -> None:
    for above, _, names in os.walk(folder):
        for name in names:
            if not os.path.islink(os.path.join(above, name)):
                _flush(Path(above, name))
        _flush_folder(Path(above))


def _flush_folder(folder: Path) -> None:
    """Names too are on the disk; Windows does not open folders."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
