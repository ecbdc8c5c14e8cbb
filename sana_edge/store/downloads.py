"""Removing a model from the download cache, which other programs share."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from sana_edge.errors import InvalidInput, ModelNotFound, SanaError
from sana_edge.store import hub, snapshots
from sana_edge.store.known_models import DECODERS, KNOWN


@dataclass(frozen=True)
class Download:
    """A repository in the cache, whole or broken off: its folder and the bytes of its files."""

    repository: str
    folder: Path
    size: int


def find(model: str) -> Download:
    """What `remove` would remove: the download of a name of the tables, or of a SANA model's repository.

    Raises:
        InvalidInput: the model comes with the package, is a folder of the user's, or not a SANA model.
        ModelNotFound: it is not in the cache.
    """
    if model in hub.bundled_names():
        raise InvalidInput(f"{model} comes with sana-edge", "only downloads are removed")
    named = {**KNOWN, **DECODERS}
    info = named.get(model.lower())
    if info is None and os.path.isdir(os.path.expanduser(model)):
        raise InvalidInput(f"{model} is a folder of yours", "remove it yourself; only downloads are removed")
    repository = info.repository if info else model
    folder = snapshots.cache_folder() / f"models--{repository.replace('/', '--')}"
    known = any(entry.repository == repository for entry in named.values())
    if hub.is_repository(repository) and os.path.isdir(folder):
        if os.path.islink(folder) or not (known or repository in snapshots.repositories()):
            raise InvalidInput(f"{folder} is not a SANA model", "only models of this program are removed")
        return Download(repository, folder, _size(folder))
    raise ModelNotFound(f"{model} is not in the cache", "`sana-edge models list` shows what is")


def remove(download: Download) -> None:
    """Delete a download for good; folders that its links point to stay.

    Raises:
        SanaError: a file cannot be removed; what was removed before it is gone.
    """
    try:
        shutil.rmtree(download.folder)
    except OSError as error:
        raise SanaError(
            f"cannot remove {download.folder}: {error.strerror or error}",
            "close what uses it, or remove the folder yourself",
        ) from error


def _size(folder: Path) -> int:
    """Links are not followed: each blob counts once."""
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)
