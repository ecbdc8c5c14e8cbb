"""A model of transformers with its processor, such as a CLIP: its folder, found or fetched, and loading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sana_edge.errors import CheckpointError, InvalidInput, ModelNotFound, SanaError
from sana_edge.progress import Progress, unseen
from sana_edge.store import downloads
from sana_edge.store.catalogue import is_repository
from sana_edge.store.folder import check_component, read_json
from sana_edge.store.snapshots import cached
from sana_edge.system.json_values import shown
from sana_edge.system.memory import is_memory

_AGAIN = "the folder is damaged; download the model again"
# a CLIP has at most some fifty, a language model some hundred
_MOST_LAYERS = 1000


def resolve_pretrained(
    name: str, *, download: bool, progress: bool = True, on_progress: Progress = unseen
) -> Path:
    """The folder of a model: ``name`` itself, or a repository's in the download cache.

    Args:
        download: fetch a repository that is not there.

    Raises:
        ModelNotFound: nothing has this name, or it is not on this machine.
        CheckpointError: the folder has no config or no safetensors.
        SanaError: the download broke off.
    """
    folder = Path(os.path.expanduser(name))
    if name and os.path.isdir(folder):
        check_component(folder)
        return folder
    if not is_repository(name):
        hint = "give a folder with config.json, safetensors and a processor, or a repository"
        raise ModelNotFound(f"{name!r} is no folder, and no repository's name", hint)
    path = cached(name, None, component=True)
    if path is None and not download:
        raise ModelNotFound(f"{name} is not on this machine", "give its folder, or name it to download it")
    if path is None:
        path = downloads.fetch(
            name, None, None, offline=False, progress=progress, on_progress=on_progress, component=True
        )
        check_component(path)
    return path


def load_pair(kind: Any, folder: Path, device: str, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """Processor and frozen model of a local folder.

    Args:
        kind: the class of transformers, or an Auto class.
        dtype: bf16 on CUDA and fp32 elsewhere if left out.

    Raises:
        InvalidInput: no folder.
        CheckpointError: it lacks something, or is of another kind.
    """
    from transformers import AutoProcessor

    if not folder.is_dir():
        raise InvalidInput(f"{folder} is not a folder", "download the model, and give its folder")
    if dtype is None:
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    local = {"local_files_only": True, "trust_remote_code": False}
    with foreign(f"{folder} cannot be loaded as {kind.__name__} with a processor"):
        _check_size(kind, folder, local)
        processor = AutoProcessor.from_pretrained(str(folder), **local)
        model = kind.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, **local)
        # with neither of them it is a tokenizer, or reads no pictures
        _ = processor.tokenizer, processor.image_processor
        return processor, model.eval().to(device)


def _check_size(kind: Any, folder: Path, local: Mapping[str, bool]) -> None:
    """See that the weights can be those of the configuration, before memory is taken for them.

    What is missing in the files would be made up, in any size. A number takes a byte at least.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    layers = [n for name, n in _numbers(read_json(path)) if "layers" in name or "depth" in name]
    if max(layers, default=0) > _MOST_LAYERS:
        raise CheckpointError(f"{path} asks for {shown(max(layers))} layers", _AGAIN)
    own = getattr(kind, "config_class", None)
    described = (own or AutoConfig).from_pretrained(str(folder), **local)
    with torch.device("meta"):
        empty = kind(described) if own else kind.from_config(described)
    numbers = sum(parameter.numel() for parameter in empty.parameters())
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # that there are none says the library
    if 0 < stored < numbers:
        found = (
            f"{path} is that of a model of {numbers:,} numbers, the weights beside it have {stored:,} bytes"
        )
        raise CheckpointError(found, _AGAIN)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in JSON, however deep, each with its own name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Turn whatever a model of a folder raises, a panic of its tokenizer's included, into one error."""
    try:
        yield
    except SanaError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit) or is_memory(error):
            raise
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise CheckpointError(
            f"{what}: {reason}",
            "it needs config.json, safetensors and the processor's files of a model without code of its own",
        ) from error
