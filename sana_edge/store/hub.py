"""From a model's name to its folder: bundled, in the download cache, or downloaded now."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.errors import CheckpointError, InvalidInput, ModelNotFound
from sana_edge.progress import Progress, unseen
from sana_edge.store import downloads, pairing
from sana_edge.store.catalogue import GRAPHS, bundled_exports, bundled_models, is_repository
from sana_edge.store.folder import check_component, check_folder, component_variant
from sana_edge.store.identify import AGAIN, identify
from sana_edge.store.known_models import DECODERS, KNOWN, KnownModel, close_model
from sana_edge.store.manifest import FILE as MANIFEST
from sana_edge.store.manifest import REMAKE, is_exported
from sana_edge.store.snapshots import cached

# ends the name of a bundled model's quantized package
_PACKAGE = "-int8"

# ends of files that `convert` and ``--decoder`` take
CHECKPOINTS = (".pth", ".pt", ".ckpt", ".safetensors")
_WEIGHTS = (*CHECKPOINTS, ".gguf")
_MODEL_HINT = "give a folder in diffusers layout, or a model's name"
_DECODER_HINT = f"choose {', '.join(DECODERS)}, a file or folder of an autoencoder, or a repository"
_REVISION = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)*")


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is on this machine.

    ``name`` is what to show and to store in a picture, ``variant`` which of several weight files to prefer,
    ``info`` the table's entry where the model is a public one. ``decoder`` is the folder or file of an
    autoencoder that takes the place of the model's own, ``decoder_name`` what to call it.
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
        place = self.component(component)
        if place.is_file():
            return None
        return component_variant((path.name for path in place.iterdir()), self.variant)


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
            model's, a checkpoint's file, or a repository.
        on_progress: told of a download, in bytes, also from other threads; what it raises ends the download.

    Raises:
        ModelNotFound: nothing has this name or revision, or the repository is closed to the caller.
        CheckpointError: the folder is no SANA pipeline, a file is missing, or parts are of different models.
        InvalidInput: a revision of what is no repository.
        SanaError: the hub cannot be reached, the download broke off, or the disk is full.
    """
    options: dict[str, Any] = {"offline": offline, "progress": progress, "on_progress": on_progress}
    try:
        found = _find(model, int8, refresh=refresh, revision=revision, **options)
        pairing.check_model(found.path)
        if decoder is None:
            return found
        place = resolve_decoder(decoder, **options)
        pairing.check_decoder(found.path, place)
    except OSError as error:
        where, reason = error.filename or model, error.strerror or error
        raise CheckpointError(f"cannot read {where}: {reason}", "see who may read it") from error
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
    """The folder of an autoencoder, or its file; arguments and errors are those of `resolve`."""
    info, folder = DECODERS.get(decoder.lower()), Path(os.path.expanduser(decoder))
    if info is None and decoder and os.path.isdir(folder):
        place = folder / "vae" if os.path.isdir(folder / "vae") else folder
        weights = [path for path in sorted(place.iterdir()) if path.suffix in CHECKPOINTS]
        if len(weights) == 1 and not os.path.isfile(place / "config.json"):
            # in its authors' names
            return resolve_decoder(str(weights[0]), revision=revision)
        check_component(place)
        check_revision(revision, decoder)
        return place
    if info is None and folder.suffix in CHECKPOINTS and os.path.isfile(folder):
        check_revision(revision, decoder)
        if not identify(folder).convertible:
            _refuse_file(decoder, "decoder")
        return folder
    if info is None:
        _refuse_file(decoder, "decoder")
    if info is None and not is_repository(decoder):
        raise ModelNotFound(f"unknown decoder {decoder!r}", _DECODER_HINT)
    check_revision(revision)
    repository = info.repository if info else decoder
    path = None if refresh and not offline else cached(repository, None, revision, component=True)
    if path is None:
        path = downloads.fetch(
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
    bundled = bundled_models()
    if int8 and f"{model}{_PACKAGE}" in bundled:
        model = f"{model}{_PACKAGE}"
    if model in bundled:
        check_revision(revision, model)
        check_folder(bundled[model])
        return ResolvedModel(bundled[model], model)
    info = KNOWN.get(model.lower())
    folder = Path(os.path.expanduser(model))
    # os.path.isdir, unlike Path.is_dir, answers for names that no file system accepts
    if info is None and model and os.path.isdir(folder):
        check_revision(revision, model)
        check_folder(folder)
        return ResolvedModel(folder, folder.resolve().name)
    if info is None:
        _refuse_file(model)
    if info is None and not is_repository(model):
        raise _unknown(model)
    check_revision(revision)
    repository = info.repository if info else model
    info = info or next((known for known in KNOWN.values() if known.repository == model), None)
    name, variant = (info.name, info.variant) if info else (model, None)
    path = None if refresh and not offline else cached(repository, variant, revision)
    if path is None:
        path = downloads.fetch(
            repository, variant, revision, offline=offline, progress=progress, on_progress=on_progress
        )
        check_folder(path, variant)
    return ResolvedModel(path, name, info, variant)


def check_name(model: str) -> None:
    """See that something can have this name; looks at no files but the folder's name.

    Raises:
        ModelNotFound: it is no name, no folder and no repository's; says what may be meant.
    """
    named = model in bundled_models() or model.lower() in KNOWN or is_repository(model)
    if not named and not (model and os.path.isdir(os.path.expanduser(model))):
        raise _unknown(model)


def exported(model: str) -> Path | None:
    """The folder that `sana-edge export` made, if ``model`` is one and no name that `resolve` prefers.

    Raises:
        ModelNotFound: ``model`` is a file, of such a folder or any other; says what it is.
        CheckpointError: the folder has ONNX graphs, but neither a manifest nor a model.
    """
    folder = Path(os.path.expanduser(model))
    if model in bundled_exports():
        return bundled_exports()[model]
    if not model or model in bundled_models() or model.lower() in KNOWN:
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
    return bundled_exports().get(f"{name}{GRAPHS}")


def _unknown(model: str) -> ModelNotFound:
    if model in DECODERS:
        return ModelNotFound(f"{model} is a decoder, no whole model", f"add `--decoder {model}` to a model")
    close = close_model(model, bundled_models())
    if os.sep in model or model.startswith((".", "~")):
        return ModelNotFound(f"no folder {model}", "give a folder in diffusers layout, or a model's name")
    hint = f"did you mean {close}? " if close else ""
    return ModelNotFound(f"unknown model {model!r}", f"{hint}`sana-edge models list` shows all")


def _refuse_file(model: str, what: str = "whole model") -> None:
    """Raise where a model's name is a file's, or can only be: models are folders."""
    path = Path(os.path.expanduser(model))
    if os.path.isdir(path) or not model or "\0" in model:
        return
    if os.path.exists(path):
        found = identify(path)
        hint = _DECODER_HINT if what == "decoder" else _MODEL_HINT
        # what is called as weights are may have been downloaded
        if found.hint and (found.hint != AGAIN or path.suffix.lower() in _WEIGHTS):
            hint = found.hint
        raise ModelNotFound(f"{model} is no {what}: it is {found.words}", hint)
    if path.suffix.lower() in _WEIGHTS:
        hint = _DECODER_HINT if what == "decoder" else f"{_MODEL_HINT}; convert makes one of a file"
        raise ModelNotFound(f"no file {model}", hint)


def check_revision(revision: str | None, model: str | None = None) -> None:
    """Raise where a revision is none, or ``model`` is what has none."""
    if revision is not None and (model is not None or not _REVISION.fullmatch(revision)):
        what = "is no branch, tag or commit" if model is None else f"is of a repository, {model} is none"
        raise InvalidInput(f"revision {revision!r} {what}", "leave out the revision")
