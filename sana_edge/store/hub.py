"""From a model's name to its folder: bundled, in the download cache, or downloaded now."""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from sana_edge.errors import CheckpointError, ModelNotFound, SanaError
from sana_edge.progress import Progress, bar, both, unseen
from sana_edge.store.folder import PIPELINES, check_folder, component_variant, needed_files, read_json
from sana_edge.store.known_models import BUNDLED, KNOWN, KnownModel
from sana_edge.store.manifest import FILE as MANIFEST
from sana_edge.store.manifest import REMAKE, is_exported
from sana_edge.store.spelling import close_model

# end the names of a bundled model's quantized package, and of that as graphs
_PACKAGE, _GRAPHS = "-int8", "-onnx"

# a full disk, a file system without large files, a cache folder that cannot be one
_STORAGE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    ``name`` is what to show and to store in a picture, ``variant`` which of several weight files to prefer,
    ``info`` the table's entry where the model is a public one.
    """

    path: Path
    name: str
    info: KnownModel | None = None
    variant: str | None = None

    def component_variant(self, component: str) -> str | None:
        """What to pass as ``variant`` to `load_state` for ``transformer``, ``vae`` or ``text_encoder``."""
        return component_variant((path.name for path in (self.path / component).iterdir()), self.variant)


@dataclass(frozen=True)
class ListedModel:
    """A line of `list_models`: ``path`` and ``size`` (bytes) are None where it is not on this machine."""

    name: str
    origin: str
    path: Path | None = None
    size: int | None = None
    info: KnownModel | None = None


def resolve(
    model: str,
    *,
    int8: bool = False,
    offline: bool = False,
    refresh: bool = False,
    progress: bool = True,
    on_progress: Progress = unseen,
) -> ResolvedModel:
    """Find a model and check that it is whole, downloading what is missing.

    Args:
        model: in this order a bundled name ("sana-tiny"), a name of the table ("sana-0.6b-1024"), a folder in
            diffusers layout, or a repository "owner/name".
        int8: of a bundled model take the quantized package, "sana-tiny-int8", where there is one.
        offline: use only what is on this machine; HF_HUB_OFFLINE=1 says the same.
        refresh: ask the hub for a newer revision even if the cache has the model.
        progress: show the download on stderr.
        on_progress: told of a download, in bytes, also from other threads; what it raises ends the download.

    Raises:
        ModelNotFound: nothing has this name, or the repository is closed to the caller.
        CheckpointError: the folder is no SANA pipeline, or a file is missing.
        SanaError: the hub cannot be reached, the download broke off, or the disk is full.
    """
    bundled = _bundled()
    if int8 and f"{model}{_PACKAGE}" in bundled:
        model = f"{model}{_PACKAGE}"
    if model in bundled:
        check_folder(BUNDLED / model)
        return ResolvedModel(BUNDLED / model, model)
    info = KNOWN.get(model.lower())
    folder = Path(os.path.expanduser(model))
    # os.path.isdir, unlike Path.is_dir, answers for names that no file system accepts
    if info is None and model and os.path.isdir(folder):
        check_folder(folder)
        return ResolvedModel(folder, folder.resolve().name)
    if info is None and not is_repository(model):
        raise _unknown(model)
    repository = info.repository if info else model
    info = info or next((known for known in KNOWN.values() if known.repository == model), None)
    name, variant = (info.name, info.variant) if info else (model, None)
    path = None if refresh and not offline else _cached(repository, variant)
    if path is None:
        with bar(not progress, "B") as shown:
            path = _download(repository, variant, offline=offline, on_progress=both(on_progress, shown))
        check_folder(path, variant)
    return ResolvedModel(path, name, info, variant)


def check_name(model: str) -> None:
    """See that something can have this name; looks at no files but the folder's name.

    Raises:
        ModelNotFound: it is no name, no folder and no repository's; says what may be meant.
    """
    named = model in _bundled() or model.lower() in KNOWN or is_repository(model)
    if not named and not (model and os.path.isdir(os.path.expanduser(model))):
        raise _unknown(model)


def exported(model: str) -> Path | None:
    """The folder that `sana-edge export` made, if ``model`` is one and no name that `resolve` prefers.

    Raises:
        ModelNotFound: ``model`` is a file of such a folder, or some ONNX file.
        CheckpointError: the folder has ONNX graphs, but neither a manifest nor a model.
    """
    folder = Path(os.path.expanduser(model))
    if model in _bundled_graphs():
        return BUNDLED / model
    if not model or model in _bundled() or model.lower() in KNOWN:
        return None
    if is_exported(folder):
        return folder
    # os.path's functions answer for names that no file system accepts
    if os.path.isfile(folder) and is_exported(folder.parent):
        raise ModelNotFound(f"{model} is one file of an exported folder", f"give the folder: {folder.parent}")
    if os.path.isfile(folder) and folder.suffix == ".onnx":
        hint = "give a folder that `sana-edge export MODEL --output DIR` made"
        raise ModelNotFound(f"{model} is no whole model", hint)
    is_model = os.path.isfile(folder / "model_index.json")
    if os.path.isdir(folder) and not is_model and any(folder.glob("*.onnx")):
        hint = f"copy the whole folder, or make it again: {REMAKE}"
        raise CheckpointError(f"{folder} has ONNX graphs, but their {MANIFEST} is missing", hint)
    return None


def bundled_graphs(model: str, *, int8: bool = False) -> Path | None:
    """The exported folder that comes with a bundled model; with ``int8`` that of its package."""
    name = f"{model}{_PACKAGE}" if int8 and not model.endswith(_PACKAGE) else model
    return BUNDLED / f"{name}{_GRAPHS}" if f"{name}{_GRAPHS}" in _bundled_graphs() else None


def list_models() -> list[ListedModel]:
    """Every model that has a name here: bundled, the public table, and other SANA models in the cache."""
    bundled = [
        ListedModel(name, "bundled", BUNDLED / name, _size(BUNDLED / name)) for name in bundled_names()
    ]
    known = []
    for info in KNOWN.values():
        path = _cached(info.repository, info.variant)
        known.append(ListedModel(info.name, "public", path, _size(path) if path else None, info))
    table = {info.repository for info in KNOWN.values()}
    others = [
        ListedModel(repository, "cached", path, _size(path))
        for repository in cached_repositories()
        if repository not in table and (path := _cached(repository, None))
    ]
    return [*bundled, *known, *others]


def cache_folder() -> Path:
    """Where downloads go: the cache of huggingface_hub, which HF_HOME and HF_HUB_CACHE move."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def bundled_names() -> list[str]:
    """The models that come with the package, and the exported ones."""
    return [*_bundled(), *_bundled_graphs()]


def is_repository(model: str) -> bool:
    """Whether it is written as a repository, "owner/name"."""
    return _REPOSITORY.fullmatch(model) is not None


def _bundled() -> list[str]:
    return sorted(index.parent.name for index in BUNDLED.glob("*/model_index.json"))


def _bundled_graphs() -> list[str]:
    return sorted(path.name for path in BUNDLED.glob(f"*{_GRAPHS}") if is_exported(path))


def _unknown(model: str) -> ModelNotFound:
    close = close_model(model, _bundled())
    if os.sep in model or model.startswith((".", "~")):
        return ModelNotFound(f"no folder {model}", "give a folder in diffusers layout, or a model's name")
    hint = f"did you mean {close}? " if close else ""
    return ModelNotFound(f"unknown model {model!r}", f"{hint}`sana-edge models list` shows all")


def _cached(repository: str, variant: str | None) -> Path | None:
    """The newest complete snapshot of a repository in the download cache."""
    home = cache_folder() / f"models--{repository.replace('/', '--')}"
    try:
        revision = (home / "refs" / "main").read_text(encoding="utf-8").strip()
        path = home / "snapshots" / revision
        check_folder(path, variant)
    except (OSError, SanaError):
        return None
    return path


def cached_repositories() -> list[str]:
    """The repositories in the download cache that hold a SANA pipeline, whole or not."""
    indexes = glob.glob(str(cache_folder() / "models--*--*" / "snapshots" / "*" / "model_index.json"))
    found = set()
    for index in map(Path, indexes):
        try:
            pipeline = read_json(index).get("_class_name")
        except CheckpointError:
            continue
        if pipeline in PIPELINES:
            found.add(index.parents[2].name.removeprefix("models--").replace("--", "/"))
    return sorted(found)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _download(repository: str, variant: str | None, *, offline: bool, on_progress: Progress) -> Path:
    """Fetch the files of one variant into the download cache, going on where an earlier attempt broke off."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    if offline or constants.HF_HUB_OFFLINE:
        raise ModelNotFound(
            f"{repository} is not on this machine, or not whole, and offline mode is on",
            f"with a network, run `sana-edge models pull {repository}`",
        )
    # the HTTP client under huggingface_hub depends on its version: the base of its error is that client's;
    # hf_xet, its other way to download, raises RuntimeError
    network_errors = cast(tuple[type[Exception], ...], (OSError, RuntimeError, *HfHubHTTPError.__bases__))
    try:
        siblings = HfApi().model_info(repository).siblings or []
        files = needed_files((file.rfilename for file in siblings), variant)
        if "model_index.json" not in files:
            close = close_model(repository, ())
            hint = "only repositories in diffusers layout can be used"
            meant = f"; did you mean {close}?" if close else ""
            raise CheckpointError(f"{repository} has no model_index.json", f"{hint}{meant}")
        return Path(
            snapshot_download(
                repository,
                allow_patterns=[glob.escape(name) for name in files],
                tqdm_class=_told(partial(on_progress, repository)),
            )
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repository} is gated",
            "accept its terms on its page, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = close_model(repository, ())
        hint = f"did you mean {KNOWN[close].repository}?" if close else "check the spelling"
        hint += "" if close else "; private ones need HF_TOKEN"
        raise ModelNotFound(f"no folder and no repository {repository}", hint) from error
    except network_errors as error:
        raise _broken_download(repository, error) from error


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


def _broken_download(repository: str, error: Exception) -> SanaError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.errno in _STORAGE:
        return SanaError(
            f"cannot store {repository}: {reason}",
            f"free some space or set HF_HOME; the cache is {cache_folder()}",
        )
    return SanaError(
        f"cannot download {repository}: {reason}",
        "check the network and run it again; whole files that have arrived are kept",
    )
