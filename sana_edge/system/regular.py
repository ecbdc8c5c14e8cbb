"""Regular files alone: a pipe would wait for its writer, a device might never end, a link leads elsewhere."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedRandom, BufferedReader
from pathlib import Path

# a pipe must not wait, and Windows not change what is written
_FLAGS = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_regular(path: Path | str) -> BufferedReader:
    """A file for reading in binary.

    Raises:
        OSError: it cannot be read, or is no regular file.
    """
    return open(_regular(path, os.O_RDONLY), "rb")


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[Path]:
    """A name of a file for libraries that take UTF-8 alone, as Linux has other bytes in names as well."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        file = os.open(path, os.O_RDONLY | _FLAGS)
        try:
            yield Path(f"/proc/self/fd/{file}")
        finally:
            os.close(file)
    else:
        yield path


def append_regular(path: Path | str) -> BufferedRandom:
    """A file for reading and appending in binary, which is made where it is missing.

    A link is not followed: one that came with a folder may lead to anybody's file.

    Raises:
        OSError: it cannot be written, or is no regular file.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    if os.path.islink(path):
        raise OSError(errno.EINVAL, "it is a link", str(path))
    return open(_regular(path, flags), "a+b")


def _regular(path: Path | str, flags: int) -> int:
    descriptor = os.open(path, flags | _FLAGS, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return descriptor
