"""From a model's name to its folder: bundled, in the download cache, or downloaded now."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sana_edge.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana_edge.store import pairing
from sana_edge.store.folder import (
    check_component,
    check_folder,
    component_files,
    component_variant,
    needed_files,
)
from sana_edge.store.identify import identify
from sana_edge.store.known_models import BUNDLED, DECODERS, KNOWN, KnownModel
from sana_edge.store.manifest import FILE as MANIFEST
from sana_edge.store.manifest import REMAKE, is_exported
from sana_edge.store.snapshots import cache_folder, cached, repositories, snapshots

# ends the name of a bundled model's quantized package
_PACKAGE = "-int8"

# a full disk, a file system without large files, a cache folder that cannot be one
_STORAGE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR),
)
_WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors", ".gguf")
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    ``name`` is what to show and to store in a picture, ``variant`` which of several weight files to prefer,
    ``info`` the table's entry where the model is a public one. ``decoder`` is the folder of an autoencoder
    that takes the place of the model's own, ``decoder_name`` what to call it.
    """

    path: Path
    name: str
    info: KnownModel | None = None
    variant: str | None = None
    decoder: Path | None = None
    decoder_name: str | None = None

    def component(self, name: str) -> Path:
        """The folder of ``transformer``, ``vae`` or ``text_encoder``."""
        return self.decoder if name == "vae" and self.decoder is not None else self.path / name

    def component_variant(self, component: str) -> str | None:
        """What to pass as ``variant`` to `load_state` for ``transformer``, ``vae`` or ``text_encoder``."""
        return component_variant((path.name for path in self.component(component).iterdir()), self.variant)


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
    revision: str | None = None,
    decoder: str | None = None,
) -> ResolvedModel:
    """Find a model and check that it is whole and of one piece, downloading what is missing.

    Args:
        model: in this order a bundled name ("sana-tiny"), a name of the table ("sana-0.6b-1024"), a folder in
            diffusers layout, or a repository "owner/name".
        int8: of a bundled model take the quantized package, "sana-tiny-int8", where there is one.
        offline: use only what is on this machine; HF_HUB_OFFLINE=1 says the same.
        refresh: ask the hub for a newer revision even if the cache has the model.
        progress: show the download on stderr.
        revision: of a repository, a branch, a tag or a commit; None takes its main branch, or of a cache that
            has none its only snapshot.
        decoder: an autoencoder in place of the model's own: "dc-ae-lite", a folder with its config.json or a
            model's, or a repository.

    Raises:
        ModelNotFound: nothing has this name or revision, or the repository is closed to the caller.
        CheckpointError: the folder is no SANA pipeline, a file is missing, or parts are of different models.
        InvalidInput: a revision of what is no repository.
        SanaError: the hub cannot be reached, the download broke off, or the disk is full.
    """
    found = _find(model, int8, offline=offline, refresh=refresh, progress=progress, revision=revision)
    pairing.check_model(found.path)
    if decoder is None:
        return found
    place = resolve_decoder(decoder, offline=offline, progress=progress)
    pairing.check_decoder(found.path, place)
    name = decoder.lower() if decoder.lower() in DECODERS else Path(decoder).name
    return dataclasses.replace(found, decoder=place, decoder_name=name)


def resolve_decoder(
    decoder: str, *, offline: bool = False, refresh: bool = False, progress: bool = True
) -> Path:
    """The folder of an autoencoder; arguments and errors are those of `resolve`."""
    info, folder = DECODERS.get(decoder.lower()), Path(os.path.expanduser(decoder))
    if info is None and decoder and os.path.isdir(folder):
        place = folder / "vae" if os.path.isdir(folder / "vae") else folder
        check_component(place)
        return place
    if info is None:
        _refuse_file(decoder)
    if info is None and not _REPOSITORY.fullmatch(decoder):
        hint = f"choose {', '.join(DECODERS)}, the folder of an autoencoder, or a repository"
        raise ModelNotFound(f"unknown decoder {decoder!r}", hint)
    repository = info.repository if info else decoder
    path = None if refresh and not offline else cached(repository, None, component=True)
    if path is None:
        path = _download(repository, None, None, offline=offline, progress=progress, component=True)
        check_component(path)
    return path


def _find(
    model: str, int8: bool, *, offline: bool, refresh: bool, progress: bool, revision: str | None
) -> ResolvedModel:
    bundled = _bundled()
    if int8 and f"{model}{_PACKAGE}" in bundled:
        model = f"{model}{_PACKAGE}"
    if model in bundled:
        _check_revision(revision, model)
        check_folder(BUNDLED / model)
        return ResolvedModel(BUNDLED / model, model)
    info = KNOWN.get(model.lower())
    folder = Path(os.path.expanduser(model))
    # os.path.isdir, unlike Path.is_dir, answers for names that no file system accepts
    if info is None and model and os.path.isdir(folder):
        _check_revision(revision, model)
        check_folder(folder)
        return ResolvedModel(folder, folder.resolve().name)
    if info is None:
        _refuse_file(model)
    if info is None and not _REPOSITORY.fullmatch(model):
        raise _unknown(model)
    _check_revision(revision)
    repository = info.repository if info else model
    info = info or next((known for known in KNOWN.values() if known.repository == model), None)
    name, variant = (info.name, info.variant) if info else (model, None)
    path = None if refresh and not offline else cached(repository, variant, revision)
    if path is None:
        path = _download(repository, variant, revision, offline=offline, progress=progress)
        check_folder(path, variant)
    return ResolvedModel(path, name, info, variant)


def exported(model: str) -> Path | None:
    """The folder that `sana-edge export` made, if ``model`` is one and no name that `resolve` prefers.

    Raises:
        ModelNotFound: ``model`` is a file, of such a folder or any other; says what it is.
        CheckpointError: the folder has ONNX graphs, but neither a manifest nor a model.
    """
    folder = Path(os.path.expanduser(model))
    if not model or model in _bundled() or model.lower() in KNOWN:
        return None
    if is_exported(folder):
        return folder
    # os.path's functions answer for names that no file system accepts
    if os.path.isfile(folder) and is_exported(folder.parent):
        raise ModelNotFound(f"{model} is one file of an exported folder", f"give the folder: {folder.parent}")
    _refuse_file(model)
    is_model = os.path.isfile(folder / "model_index.json")
    if os.path.isdir(folder) and not is_model and any(folder.glob("*.onnx")):
        hint = f"copy the whole folder, or make it again: {REMAKE}"
        raise CheckpointError(f"{folder} has ONNX graphs, but their {MANIFEST} is missing", hint)
    return None


def list_models() -> list[ListedModel]:
    """What has a name here: bundled models, the public table, decoders, and other SANAs in the cache."""
    bundled = [ListedModel(name, "bundled", BUNDLED / name, _size(BUNDLED / name)) for name in _bundled()]
    known = []
    for info in KNOWN.values():
        path = cached(info.repository, info.variant)
        known.append(ListedModel(info.name, "public", path, _size(path) if path else None, info))
    decoders = []
    for info in DECODERS.values():
        path = cached(info.repository, None, component=True)
        decoders.append(ListedModel(info.name, "decoder", path, _size(path) if path else None, info))
    table = {info.repository for info in KNOWN.values()}
    others = [
        ListedModel(repository, "cached", path, _size(path))
        for repository in repositories()
        if repository not in table and (path := cached(repository, None))
    ]
    return [*bundled, *known, *decoders, *others]


def _bundled() -> list[str]:
    return sorted(index.parent.name for index in BUNDLED.glob("*/model_index.json"))


def _unknown(model: str) -> ModelNotFound:
    if model in DECODERS:
        return ModelNotFound(f"{model} is a decoder, no whole model", f"add `--decoder {model}` to a model")
    close = difflib.get_close_matches(model.lower(), [*_bundled(), *KNOWN], n=1, cutoff=0.5)
    if os.sep in model or model.startswith((".", "~")):
        return ModelNotFound(f"no folder {model}", "give a folder in diffusers layout, or a model's name")
    hint = f"did you mean {close[0]}? " if close else ""
    return ModelNotFound(f"unknown model {model!r}", f"{hint}`sana-edge models list` shows all")


def _refuse_file(model: str) -> None:
    """Raise where a model's name is a file's, or can only be: models are folders."""
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) or not model or "\0" in model:
        return
    if os.path.exists(path):
        found = identify(path)
        hint = found.hint or "give a folder in diffusers layout, or a model's name"
        raise ModelNotFound(f"{model} is no whole model: it is {found.words}", hint)
    if path.suffix.lower() in _WEIGHTS:
        raise ModelNotFound(f"no file {model}", "give a model's name or folder; convert makes one of a file")


def _check_revision(revision: str | None, model: str | None = None) -> None:
    """Raise where a revision is none, or ``model`` is what has none."""
    if revision is not None and (model is not None or not _REVISION.fullmatch(revision)):
        what = "is no branch, tag or commit" if model is None else f"is of a repository, {model} is none"
        raise InvalidInput(f"revision {revision!r} {what}", "leave out the revision")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _download(
    repository: str,
    variant: str | None,
    revision: str | None,
    *,
    offline: bool,
    progress: bool,
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
    from tqdm import tqdm

    class _Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    if offline or constants.HF_HUB_OFFLINE:
        raise _not_here(repository, revision)
    # the HTTP client under huggingface_hub depends on its version: the base of its error is that client's;
    # hf_xet, its other way to download, raises RuntimeError
    network_errors = cast(tuple[type[Exception], ...], (OSError, RuntimeError, *HfHubHTTPError.__bases__))
    try:
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
        names = [file.rfilename for file in siblings]
        files = component_files(names) if component else needed_files(names, variant)
        index = "config.json" if component else "model_index.json"
        if index not in files:
            raise CheckpointError(
                f"{repository} has no {index}", "only repositories in diffusers layout can be used"
            )
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in files],
                tqdm_class=None if progress else _Silent,
            )
        )
    except GatedRepoError as error:
        raise ModelNotFound(
            f"{repository} is gated",
            "accept its terms on its page, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        hint = "give a branch, a tag or a whole commit that the repository has"
        raise ModelNotFound(f"{repository} has no revision {revision}", hint) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        close = difflib.get_close_matches(repository, [info.repository for info in KNOWN.values()], n=1)
        hint = f"did you mean {close[0]}?" if close else "check the spelling; private ones need HF_TOKEN"
        raise ModelNotFound(f"no folder and no repository {repository}", hint) from error
    except network_errors as error:
        raise _broken_download(repository, error) from error


def _not_here(repository: str, revision: str | None) -> ModelNotFound:
    what = repository if revision is None else f"{repository} at revision {revision}"
    message = f"{what} is not on this machine, or not whole, and offline mode is on"
    others = [path.name for path in snapshots(repository, None)]
    if revision is None and len(others) > 1:
        return ModelNotFound(message, f"choose a revision that is here: {', '.join(others)}")
    if revision is not None:
        return ModelNotFound(message, "with a network, run it once without offline mode")
    return ModelNotFound(message, f"with a network, run `sana-edge models pull {repository}`")


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
