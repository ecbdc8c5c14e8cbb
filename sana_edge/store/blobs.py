"""Large files of a repository into the download cache: continued where a run broke off, and checked.

The cache is huggingface_hub's: a blob is named after its SHA-256, one that is under way has an ending more,
and the library's own lock guards both. The library itself begins each file anew.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.errors import SanaError
from sana_edge.store.package import digest
from sana_edge.system.json_values import read_bounded
from sana_edge.system.regular import append_regular

_HINT = "run it again; if it happens twice, something between here and the hub changes files"
_SHA1, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
# bytes of a file, and of one without a SHA-256, of which the hub takes no larger ones
_LARGEST, _SMALL = 1 << 44, 64 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, with slashes, and git's SHA-1 of it where the hub tells.

    A large one has a size in bytes and a SHA-256, others 0 and none.
    """

    name: str
    sha1: str | None
    size: int = 0
    sha256: str | None = None


def remote_files(siblings: Iterable[Any]) -> list[RemoteFile]:
    """Files of huggingface_hub's listing, whose names and checksums become names on this disk.

    Raises:
        ValueError: one is none; says which.
    """
    files = []
    for sibling in siblings:
        name, large = sibling.rfilename, sibling.lfs
        file = RemoteFile(name, sibling.blob_id or None, *((large.size, large.sha256) if large else ()))
        inside = not set(name) & {"\\", "\0"} and not {"", ".", ".."} & set(name.split("/"))
        if not inside or (file.sha1 and not _SHA1.fullmatch(file.sha1)):
            raise ValueError(f"{name[:100]!r} is no file's name, or its checksum is none")
        if large and not (_SHA256.fullmatch(large.sha256) and 0 <= int(large.size) <= _LARGEST):
            raise ValueError(f"the size or the checksum of {name} is none")
        files.append(file)
    return files


def fetch_blobs(
    repository: str,
    revision: str,
    files: Sequence[RemoteFile],
    home: Path,
    bars: Callable[[int], type],
) -> None:
    """Bring the large ones among a repository's files into its folder of the cache.

    Args:
        revision: the commit.
        files: those without a SHA-256 are left to huggingface_hub, but for what a killed run left of them.
        home: the repository's folder in the cache.
        bars: gives, for the bytes that were there before, the class of a bar that is told of more.

    Raises:
        SanaError: what arrived is not what the hub names; and whatever huggingface_hub raises.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    done = 0
    for file in files:
        # the library names it so, too
        name = file.sha256 or file.sha1
        if name is None:
            continue
        blob = home / "blobs" / name
        lock = home.parent / ".locks" / home.name / f"{name}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # with the lock, none of them is under way
            left = sorted(blob.parent.glob(f"{name}.*incomplete"), key=lambda path: path.stat().st_size)
            wanted = file.sha256 is not None and not blob.exists()
            for path in left[:-1] if wanted else left:
                path.unlink(missing_ok=True)
            if wanted:
                begun = left[-1] if left else blob.with_name(f"{name}.{uuid.uuid4().hex[:8]}.incomplete")
                _fetch(repository, revision, file, begun, bars(done))
                os.replace(begun, blob)
        done += file.size


def check_small(files: Sequence[RemoteFile], snapshot: Path) -> None:
    """Compare the small files of a snapshot with the checksums that git has of them.

    Raises:
        SanaError: one differs; it is removed, so that the next run fetches it again.
    """
    for file in files:
        path = snapshot / file.name
        if file.sha256 is not None or file.sha1 is None or not path.is_file():
            continue
        if _sha1(path) != file.sha1:
            blob = path.resolve()
            # a link that leads elsewhere is none of the library's
            if blob.parent == snapshot.parents[1].resolve() / "blobs":
                blob.unlink()
            path.unlink(missing_ok=True)
            raise SanaError(f"{file.name} did not arrive as it is on the hub", _HINT)


def _sha1(path: Path) -> str:
    """As git has it of a small file; empty where it is none."""
    try:
        content = read_bounded(path, _SMALL)
    except (OSError, ValueError):
        return ""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _fetch(repository: str, revision: str, file: RemoteFile, begun: Path, bar: type) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with append_regular(begun) as content:
        size = content.seek(0, os.SEEK_END)
        if size > file.size:
            size = content.truncate(0)
        http_get(
            hf_hub_url(repository, file.name, revision=revision),
            content,
            resume_size=size,
            headers=build_hf_headers(),
            expected_size=file.size,
            tqdm_class=bar,
        )
    if digest([begun]) != file.sha256:
        begun.unlink()
        raise SanaError(f"{file.name} of {repository} did not arrive as it is on the hub", _HINT)
