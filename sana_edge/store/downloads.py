"""Downloads: fetching a repository into the cache, which other programs share, and removing it from there."""

from __future__ import annotations

import errno
import glob
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from sana_edge.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana_edge.progress import Progress, bar, both
from sana_edge.store import blobs, snapshots
from sana_edge.store.catalogue import bundled_names, is_repository
from sana_edge.store.folder import component_files, needed_files
from sana_edge.store.known_models import DECODERS, KNOWN, close_model

# a full disk, a file system without large files, a cache folder that cannot be one
_STORAGE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
)


@dataclass(frozen=True)
class Download:
    """A repository in the cache, whole or broken off: its folder and the bytes of its files."""

    repository: str
    folder: Path
    size: int


def fetch(
    repository: str,
    variant: str | None,
    revision: str | None,
    *,
    offline: bool,
    progress: bool,
    on_progress: Progress,
    component: bool = False,
) -> Path:
    """Fetch a variant's files, or a component's repository, going on where an earlier attempt broke off."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if offline or constants.HF_HUB_OFFLINE:
        raise _not_here(repository, revision, component)
    # the HTTP client under huggingface_hub depends on its version: the base of its error is that client's;
    # hf_xet, its other way to download, raises RuntimeError
    network_errors = cast(tuple[type[Exception], ...], (OSError, RuntimeError, *HfHubHTTPError.__bases__))
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
        siblings = info.siblings or []
        names = [file.rfilename for file in siblings]
        files = component_files(names) if component else needed_files(names, variant)
        index = "config.json" if component else "model_index.json"
        if index not in files:
            close = None if component else close_model(repository, ())
            hint = "only repositories in diffusers layout can be used"
            meant = f"; did you mean {close}?" if close else ""
            raise CheckpointError(f"{repository} has no {index}", f"{hint}{meant}")
        with bar(not progress, "B") as shown:
            told = partial(both(on_progress, shown), repository)
            needed = blobs.remote_files(file for file in siblings if file.rfilename in files)
            large = sum(file.size for file in needed)
            home = snapshots.home(repository)
            blobs.fetch_blobs(
                repository,
                info.sha or revision or "main",
                needed,
                home,
                lambda before: _told(lambda done, _: told(before + done, large)),
            )
            if large:
                told(large, large)
            path = snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in files],
                # of small files alone there is nothing more to tell
                tqdm_class=_told(lambda done, total: None if large else told(done, total)),
            )
            blobs.check_small(needed, Path(path))
            return Path(path)
    except SanaError:
        raise
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repository} is gated",
            "accept its terms on its page, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        hint = "give a branch, a tag or a whole commit that the repository has"
        raise ModelNotFound(f"{repository} has no revision {revision}", hint) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = close_model(repository, ())
        hint = f"did you mean {KNOWN[close].repository}?" if close else "check the spelling"
        hint += "" if close else "; private ones need HF_TOKEN"
        raise ModelNotFound(f"no folder and no repository {repository}", hint) from error
    except network_errors as error:
        raise _broken_download(repository, error) from error
    # what the library makes of an answer that is none of the hub's, whichever its parser meets first
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise SanaError(
            f"cannot download {repository}: the answer is not the hub's ({reason})",
            "open a browser to see whether the network asks for a login, then run it again",
        ) from error


def find(model: str) -> Download:
    """What `remove` would remove: the download of a name of the tables, or of a SANA model's repository.

    Raises:
        InvalidInput: the model comes with the package, is a folder of the user's, or not a SANA model.
        ModelNotFound: it is not in the cache.
    """
    if model in bundled_names():
        raise InvalidInput(f"{model} comes with sana-edge", "only downloads are removed")
    named = {**KNOWN, **DECODERS}
    info = named.get(model.lower())
    if info is None and os.path.isdir(os.path.expanduser(model)):
        raise InvalidInput(f"{model} is a folder of yours", "remove it yourself; only downloads are removed")
    repository = info.repository if info else model
    folder = snapshots.cache_folder() / f"models--{repository.replace('/', '--')}"
    known = any(entry.repository == repository for entry in named.values())
    if is_repository(repository) and os.path.isdir(folder):
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


def _told(on_bytes: Callable[[int, int], None]) -> type:
    """A class of bars for huggingface_hub, the first of which that counts bytes calls ``on_bytes``."""
    from tqdm import tqdm

    counting: list[object] = []

    class _Told(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            if kwargs.get("unit") == "B" and not counting:
                counting.append(self)

        def update(self, n: float | None = 1) -> None:
            # a disabled bar does not count
            self.n += n or 0
            if counting and counting[0] is self:
                on_bytes(int(self.n), int(self.total or 0))

    return _Told


def _not_here(repository: str, revision: str | None, component: bool) -> ModelNotFound:
    what = repository if revision is None else f"{repository} at revision {revision}"
    message = f"{what} is not on this machine, or not whole, and offline mode is on"
    others = [path.name for path in snapshots.snapshots(repository, None)]
    if revision is None and len(others) > 1:
        return ModelNotFound(message, f"choose a revision that is here: {', '.join(others)}")
    # what `models pull` takes are whole models, and decoders that have a name
    if revision is not None or component:
        return ModelNotFound(message, "with a network, run it once without offline mode")
    return ModelNotFound(message, f"with a network, run `sana-edge models pull {repository}`")


def _broken_download(repository: str, error: Exception) -> SanaError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return SanaError(
            f"cannot store {repository}: {reason}",
            f"free some space or set HF_HOME; the cache is {snapshots.cache_folder()}",
        )
    return SanaError(
        f"cannot download {repository}: {reason}",
        "check the network and run it again; it goes on from what has arrived",
    )


def _size(folder: Path) -> int:
    """Links are not followed: each blob counts once."""
    files = (Path(root) / name for root, _, names in os.walk(folder) for name in names)
    return sum(file.lstat().st_size for file in files)
