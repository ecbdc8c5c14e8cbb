"""From a model's name to its folder: bundled, in the download cache, or downloaded now."""

from __future__ import annotations

import dataclasses
import errno
import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from sana_edge.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana_edge.progress import Progress, bar, both, unseen
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
from sana_edge.store.spelling import close_model

# end the names of a bundled model's quantized package, and of that as graphs
_PACKAGE, _GRAPHS = "-int8", "-onnx"

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
    on_progress: Progress = unseen,
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
        on_progress: told of a download, in bytes, also from other threads; what it raises ends the download.

    Raises:
        ModelNotFound: nothing has this name or revision, or the repository is closed to the caller.
        CheckpointError: the folder is no SANA pipeline, a file is missing, or parts are of different models.
        InvalidInput: a revision of what is no repository.
        SanaError: the hub cannot be reached, the download broke off, or the disk is full.
    """
    found = _find(
        model,
        int8,
        offline=offline,
        refresh=refresh,
        progress=progress,
        on_progress=on_progress,
        revision=revision,
    )
    pairing.check_model(found.path)
    if decoder is None:
        return found
    place = resolve_decoder(decoder, offline=offline, progress=progress, on_progress=on_progress)
    pairing.check_decoder(found.path, place)
    name = decoder.lower() if decoder.lower() in DECODERS else Path(decoder).name
    return dataclasses.replace(found, decoder=place, decoder_name=name)


def resolve_decoder(
    decoder: str,
    *,
    offline: bool = False,
    refresh: bool = False,
    progress: bool = True,
    on_progress: Progress = unseen,
    revision: str | None = None,
) -> Path:
    """The folder of an autoencoder; arguments and errors are those of `resolve`."""
    info, folder = DECODERS.get(decoder.lower()), Path(os.path.expanduser(decoder))
    if info is None and decoder and os.path.isdir(folder):
        place = folder / "vae" if os.path.isdir(folder / "vae") else folder
        check_component(place)
        _check_revision(revision, decoder)
        return place
    if info is None:
        _refuse_file(decoder)
    if info is None and not is_repository(decoder):
        hint = f"choose {', '.join(DECODERS)}, the folder of an autoencoder, or a repository"
        raise ModelNotFound(f"unknown decoder {decoder!r}", hint)
    _check_revision(revision)
    repository = info.repository if info else decoder
    path = None if refresh and not offline else cached(repository, None, revision, component=True)
    if path is None:
        path = _download(
            repository,
            None,
            revision,
            offline=offline,
            progress=progress,
            on_progress=on_progress,
            component=True,
        )
        check_component(path)
    return path


def _find(
    model: str,
    int8: bool,
    *,
    offline: bool,
    refresh: bool,
    progress: bool,
    on_progress: Progress,
    revision: str | None,
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
    if info is None and not is_repository(model):
        raise _unknown(model)
    _check_revision(revision)
    repository = info.repository if info else model
    info = info or next((known for known in KNOWN.values() if known.repository == model), None)
    name, variant = (info.name, info.variant) if info else (model, None)
    path = None if refresh and not offline else cached(repository, variant, revision)
    if path is None:
        path = _download(
            repository, variant, revision, offline=offline, progress=progress, on_progress=on_progress
        )
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
        ModelNotFound: ``model`` is a file, of such a folder or any other; says what it is.
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
    _refuse_file(model)
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
    """What has a name here: bundled models, the public table, decoders, and other SANAs in the cache."""
    bundled = [
        ListedModel(name, "bundled", BUNDLED / name, _size(BUNDLED / name)) for name in bundled_names()
    ]
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
    if model in DECODERS:
        return ModelNotFound(f"{model} is a decoder, no whole model", f"add `--decoder {model}` to a model")
    close = close_model(model, _bundled())
    if os.sep in model or model.startswith((".", "~")):
        return ModelNotFound(f"no folder {model}", "give a folder in diffusers layout, or a model's name")
    hint = f"did you mean {close}? " if close else ""
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
            close = None if component else close_model(repository, ())
            hint = "only repositories in diffusers layout can be used"
            meant = f"; did you mean {close}?" if close else ""
            raise CheckpointError(f"{repository} has no {index}", f"{hint}{meant}")
        with bar(not progress, "B") as shown:
            told = partial(both(on_progress, shown), repository)
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=[glob.escape(name) for name in files],
                    tqdm_class=_told(told),
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
