"""Large files of a repository into the download cache: continued where a run broke off, and checked.

The cache is huggingface_hub's: a blob is named after its SHA-256, one that is under way has an ending more,
and the library's own lock guards both. The library itself begins each file anew.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sana_edge.errors import SanaError
from sana_edge.store.package import digest

_HINT = "run it again; if it happens twice, something between here and the hub changes files"


def fetch_blobs(
    repository: str,
    revision: str,
    files: Sequence[Any],
    home: Path,
    bars: Callable[[int], type],
) -> None:
    """Bring the large ones among a repository's files into its folder of the cache.

    Args:
        revision: the commit.
        files: huggingface_hub's siblings, with their metadata; those without a SHA-256 are left to it.
        home: the repository's folder in the cache.
        bars: gives, for the bytes that were there before, the class of a bar that is told of more.

    Raises:
        SanaError: what arrived is not what the hub names; and whatever huggingface_hub raises.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    done = 0
    for file in files:
        if file.lfs is None:
            continue
        blob = home / "blobs" / file.lfs.sha256
        lock = home.parent / ".locks" / home.name / f"{blob.name}.lock"
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # with the lock, none of them is under way
            left = sorted(blob.parent.glob(f"{blob.name}.*incomplete"), key=lambda path: path.stat().st_size)
            for path in left[:-1] if not blob.exists() else left:
                path.unlink(missing_ok=True)
            if not blob.exists():
                begun = left[-1] if left else blob.with_name(f"{blob.name}.{uuid.uuid4().hex[:8]}.incomplete")
                _fetch(repository, revision, file, begun, bars(done))
                os.replace(begun, blob)
        done += file.lfs.size


def check_small(files: Sequence[Any], snapshot: Path) -> None:
    """Compare the small files of a snapshot with the checksums that git has of them.

    Raises:
        SanaError: one differs; it is removed, so that the next run fetches it again.
    """
    for file in files:
        path = snapshot / file.rfilename
        if file.lfs is not None or not file.blob_id or not path.is_file():
            continue
        content = path.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != file.blob_id:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise SanaError(f"{file.rfilename} did not arrive as it is on the hub", _HINT)


def _fetch(repository: str, revision: str, file: Any, begun: Path, bar: type) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    with open(begun, "ab") as content:
        size = content.tell()
        if size > file.lfs.size:
            size = content.truncate(0)
        http_get(
            hf_hub_url(repository, file.rfilename, revision=revision),
            content,
            resume_size=size,
            headers=build_hf_headers(),
            expected_size=file.lfs.size,
            tqdm_class=bar,
        )
    if digest([begun]) != file.lfs.sha256:
        begun.unlink()
        raise SanaError(f"{file.rfilename} of {repository} did not arrive as it is on the hub", _HINT)
