"""From a model's name to its folder: bundled, in the download cache, or downloaded now."""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sana_edge.errors import CheckpointError, ModelNotFound, SanaError
from sana_edge.store.folder import PIPELINES, check_folder, component_variant, needed_files, read_json
from sana_edge.store.known_models import BUNDLED, KNOWN, KnownModel
from sana_edge.store.manifest import FILE as MANIFEST
from sana_edge.store.manifest import REMAKE, is_exported

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
    model: str, *, int8: bool = False, offline: bool = False, refresh: bool = False, progress: bool = True
) -> ResolvedModel:
    """Find a model and check that it is whole, downloading what is missing.

    Args:
        model: in this order a bundled name ("sana-tiny"), a name of the table ("sana-0.6b-1024"), a folder in
            diffusers layout, or a repository "owner/name".
        int8: of a bundled model take the quantized package, "sana-tiny-int8", where there is one.
        offline: use only what is on this machine; HF_HUB_OFFLINE=1 says the same.
        refresh: ask the hub for a newer revision even if the cache has the model.
        progress: show the download on stderr.

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
    if info is None and not _REPOSITORY.fullmatch(model):
        raise _unknown(model)
    repository = info.repository if info else model
    info = info or next((known for known in KNOWN.values() if known.repository == model), None)
    name, variant = (info.name, info.variant) if info else (model, None)
    path = None if refresh and not offline else _cached(repository, variant)
    if path is None:
        path = _download(repository, variant, offline=offline, progress=progress)
        check_folder(path, variant)
    return ResolvedModel(path, name, info, variant)


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
    names = [*_bundled(), *_bundled_graphs()]
    bundled = [ListedModel(name, "bundled", BUNDLED / name, _size(BUNDLED / name)) for name in names]
    known = []
    for info in KNOWN.values():
        path = _cached(info.repository, info.variant)
        known.append(ListedModel(info.name, "public", path, _size(path) if path else None, info))
    table = {info.repository for info in KNOWN.values()}
    others = [
        ListedModel(repository, "cached", path, _size(path))
        for repository in _cached_repositories()
        if repository not in table and (path := _cached(repository, None))
    ]
    return [*bundled, *known, *others]


def cache_folder() -> Path:
    """Where downloads go: the cache of huggingface_hub, which HF_HOME and HF_HUB_CACHE move."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _bundled() -> list[str]:
    return sorted(index.parent.name for index in BUNDLED.glob("*/model_index.json"))


def _bundled_graphs() -> list[str]:
    return sorted(path.name for path in BUNDLED.glob(f"*{_GRAPHS}") if is_exported(path))


def _unknown(model: str) -> ModelNotFound:
    close = difflib.get_close_matches(model.lower(), [*_bundled(), *KNOWN], n=1, cutoff=0.5)
    if os.sep in model or model.startswith((".", "~")):
        return ModelNotFound(f"no folder {model}", "give a folder in diffusers layout, or a model's name")
    hint = f"did you mean {close[0]}? " if close else ""
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


def _cached_repositories() -> list[str]:
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


def _download(repository: str, variant: str | None, *, offline: bool, progress: bool) -> Path:
    """Fetch the files of one variant into the download cache, going on where an earlier attempt broke off."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )
    from tqdm import tqdm

    class _Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

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
            raise CheckpointError(
                f"{repository} has no model_index.json", "only repositories in diffusers layout can be used"
            )
        return Path(
            snapshot_download(
                repository,
                allow_patterns=[glob.escape(name) for name in files],
                tqdm_class=None if progress else _Silent,
            )
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repository} is gated",
            "accept its terms on its page, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = difflib.get_close_matches(repository, [info.repository for info in KNOWN.values()], n=1)
        hint = f"did you mean {close[0]}?" if close else "check the spelling; private ones need HF_TOKEN"
        raise ModelNotFound(f"no folder and no repository {repository}", hint) from error
    except network_errors as error:
        raise _broken_download(repository, error) from error


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
