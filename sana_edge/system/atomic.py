"""Files and folders that appear whole or not at all.

All writing goes to a scratch folder in the same file system as its target; at the end everything is flushed
and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.system.scratch import (
    flush,
    flush_folder,
    flush_tree,
    is_scratch,
    scratch_folder,
    take_entries,
    take_folder,
)

_MOUNTS = Path("/proc/self/mountinfo")
_ROOM = "free some space or choose another folder"
_HINTS = {
    errno.ENOSPC: f"the disk is full: {_ROOM}",
    errno.EDQUOT: f"the quota is used up: {_ROOM}",
    errno.ENOENT: "create the folder first, or choose another one",
    errno.EEXIST: "it was taken meanwhile, or a file is in the way: choose another folder",
    errno.ENOTEMPTY: "it was taken meanwhile, or a file is in the way: choose another folder",
    errno.ENOTDIR: "a part of the path is a file: choose another folder",
    errno.EISDIR: "it is a folder: give the name of a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system, or a limit of this process (ulimit -f), has no room for so large a file",
    errno.EBUSY: "it is a mount point: mount the folder above, or choose another one",
    errno.ENXIO: "it is a device, a pipe or a socket: choose another file",
    errno.EBADF: "it was opened for reading alone: choose another file",
    errno.EROFS: "the file system is read-only: choose another folder",
}
_HINT = "check the free space and the permissions, or choose another folder"


def hint_of(error: OSError) -> str:
    """What to do about a file that cannot be written, or used."""
    return _HINTS.get(error.errno or 0, _HINT)


def cannot_write(path: Path, error: Exception) -> SanaError:
    """What to say when ``path`` could not be written."""
    if isinstance(error, OSError):
        return SanaError(f"cannot write {path}: {error.strerror or error}", hint_of(error))
    return SanaError(f"cannot write {path}: {' '.join(str(error).split()) or type(error).__name__}", _HINT)


@contextlib.contextmanager
def new_file(
    path: Path,
    *,
    force: bool = True,
    parents: bool = True,
    private: bool = False,
    follow: bool = True,
    failures: tuple[type[Exception], ...] = (),
) -> Iterator[Path]:
    """Give an unused name to write to; at the end, and only then, that file gets the name ``path``.

    Args:
        force: replace what is at ``path``.
        parents: make the folder where it is missing.
        private: only the user may read it.
        follow: replace the file that a link leads to, which stays a link, as where users name it. A link that
            came with a folder may lead to anybody's file: it is replaced itself.
        failures: exceptions of a library that mean, as OSError does, that the file could not be written.

    Raises:
        FileExistsError: without ``force``, something is or has appeared at ``path``.
        SanaError: it cannot be written.
    """
    target = _real(path) if follow else _real(path.parent) / path.name
    try:
        if parents:
            target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target, target.parent) as scratch:
            temporary = scratch / target.name
            _refuse_lasting(target)
            yield temporary
            # some libraries make files that only their owner reads
            temporary.chmod((scratch / "mode").stat().st_mode & (0o600 if private else 0o666))
            # a full disk may show only here, and the name must not appear before the content
            flush(temporary)
            if force:
                os.replace(temporary, target)
            else:
                _name(temporary, target)
            flush_folder(target.parent)
    except Exception as error:
        taken = isinstance(error, FileExistsError) and not force
        if taken or not isinstance(error, (OSError, *failures)):
            raise
        raise cannot_write(path, error) from error


def write_bytes(path: Path, content: bytes, *, private: bool = False, follow: bool = True) -> None:
    """Write a file, whole or not at all; the other arguments and errors are those of `new_file`."""
    with new_file(path, private=private, follow=follow) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, content: Any, *, follow: bool = True) -> None:
    """Write JSON that people can read; NaN and infinity, which JSON lacks, are a ValueError."""
    write_bytes(path, f"{json.dumps(content, indent=2, allow_nan=False)}\n".encode(), follow=follow)


def check_writable(path: Path) -> None:
    """Raise `SanaError` where no file can be made at ``path``; found out by making one beside it."""
    target = _real(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with scratch_folder(target, target.parent) as scratch:
            (scratch / target.name).touch()
            _refuse_lasting(target)
    except OSError as error:
        raise cannot_write(path, error) from error


def _refuse_lasting(target: Path) -> None:
    """What no file may take the place of: devices, pipes and sockets, which root could replace.

    A file that is mounted by itself, as containers may have one, cannot be replaced.
    """
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)):
        raise OSError(errno.ENXIO, "it is no regular file")
    if stat.S_ISREG(mode) and _is_mounted(target):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))


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
    target = _real(output)
    try:
        _check_taken(output, force=force, kind=kind, is_kind=is_kind)
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target, _room(target)):
            # a dead process's may just have been put in place
            _check_taken(output, force=force, kind=kind, is_kind=is_kind)
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
    target = _real(output)
    try:
        with scratch_folder(target, _room(target)) as scratch:
            folder = scratch / "new"
            folder.mkdir()
            yield folder
            flush_tree(folder)
            _check_taken(output, force=force, kind=kind, is_kind=is_kind)
            if scratch.parent == target:
                take_entries(scratch, target, [path.name for path in _entries(target)])
            else:
                take_folder(scratch, target)
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
    target = _real(output)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target, target if target.is_dir() else target.parent) as scratch:
            folder = scratch / "new"
            folder.mkdir()
            yield folder
            flush_tree(folder)
            replaced = [path.name for path in folder.iterdir() if os.path.lexists(target / path.name)]
            if replaced and not force:
                hint = "choose another --output, or add --force"
                raise InvalidInput(f"{output / min(replaced)} exists", hint)
            if scratch.parent == target:
                take_entries(scratch, target, replaced)
            else:
                # refused where somebody has put anything there meanwhile
                os.rename(folder, target)
                flush_folder(target.parent)
    except OSError as error:
        raise cannot_write(output, error) from error


def _real(path: Path) -> Path:
    """A path without links; raises `SanaError` where the current folder is gone, from which it leads."""
    try:
        return Path(os.path.realpath(path))
    except OSError as error:
        raise cannot_write(path, error) from error


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
    return [path for path in folder.iterdir() if not is_scratch(path.name) and path.name != "lost+found"]


def _room(target: Path) -> Path:
    """Where a scratch folder for a folder is made: beside it, or inside."""
    inside = target.is_dir() and (_is_mounted(target) or not os.access(target.parent, os.W_OK))
    return target if inside else target.parent


def _is_mounted(path: Path) -> bool:
    """Whether something is mounted at an absolute path, also of the same file system, and also a file."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    # spaces and the like are in octal
    places = (re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split()[4]) for line in lines)
    return os.path.ismount(path) or os.fsencode(path) in places


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
