"""A lock file: of two processes that want to make the same thing, one makes it and the other waits.

The operating system holds the lock for the process, so that a process that died, however it died, holds none;
what the file says is only for the message of those who wait.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# seconds between two tries
_POLL = 0.1
# far behind what is written: Windows lets nobody read a locked region
_REGION = 1 << 30
# file systems without locks; two processes at once then only cost time, if each works in files of its own
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def locked(path: Path, on_wait: Callable[[str], None] = lambda holder: None) -> Iterator[bool]:
    """Hold the lock file ``path`` inside; it is made where it is missing and removed at the end.

    Gives whether it is held: false on file systems without locks, where another process may be inside too.

    Args:
        on_wait: called once where another process holds it, with what that process wrote: its number.

    Raises:
        OSError: the file cannot be made.
    """
    handle, held = _acquire(path, on_wait)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()}\n".encode())
        yield held
    finally:
        # under the lock: who waits sees that its file is no longer the one with the name, and tries again
        with suppress(OSError):
            path.unlink()
        os.close(handle)


def _acquire(path: Path, on_wait: Callable[[str], None]) -> tuple[int, bool]:
    waiting = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            taken = _try_lock(handle)
            if taken is not False and _has_name(handle, path):
                return handle, taken is True
            if not waiting:
                waiting = True
                on_wait(os.read(handle, 100).decode(errors="replace").strip() or "another process")
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(_POLL)


def _has_name(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool | None:
    """Take the lock of an open file, if nobody has it; the end of the process gives it back.

    None where there are no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, _REGION, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        raise
    return True
