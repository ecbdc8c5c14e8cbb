"""CLIP score (Hessel et al. 2021, arXiv 2104.08718) through torchmetrics: 100 cos of picture and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sana_edge.errors import CheckpointError, MissingDependency, ModelNotFound, torch_extra
from sana_edge.init_image import read_image
from sana_edge.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT = "openai/clip-vit-large-patch14"
"""What torchmetrics takes; used where it is in the download cache."""


def find_clip(name: str | None, *, offline: bool, progress: bool) -> Path:
    """The folder of a CLIP: a folder, a repository, which is downloaded, or `DEFAULT` where it is cached.

    Raises:
        SanaError: there is none, or torch or torchmetrics is missing.
    """
    if find_spec("torchmetrics") is None:
        raise MissingDependency(
            "CLIP score needs torchmetrics, which is not installed", "pip install 'sana-edge[evaluate]'"
        )
    with torch_extra():
        from sana_edge.store.pretrained import resolve_pretrained
    if name is not None:
        return resolve_pretrained(name, download=not offline, progress=progress)
    try:
        return resolve_pretrained(DEFAULT, download=False)
    except ModelNotFound as error:
        hint = f"give a folder with --clip, or `--clip {DEFAULT}`, which downloads it"
        raise ModelNotFound(f"no CLIP was given, and {DEFAULT} is not on this machine", hint) from error


def import_torchmetrics(name: str) -> Any:
    """A module of torchmetrics, by what follows that.

    Raises:
        MissingDependency: it, or what it imports, does not work here: torchvision of another torch, say.
    """
    try:
        return import_module(f"torchmetrics.{name}")
    except Exception as error:  # whatever a library's own imports meet
        message = f"torchmetrics cannot be imported: {type(error).__name__}: {error}"
        hint = "pip install 'sana-edge[evaluate]'; torchvision, if it is there, from where torch came from"
        raise MissingDependency(message, hint) from error


class ClipScore:
    """A CLIP of transformers, fp32.

    Attributes:
        limit: tokens of a prompt that it reads.
        cut: prompts so far that were longer.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: CheckpointError: the folder holds no CLIP with its processor."""
        with torch_extra():
            import torch
            from transformers import CLIPModel

            from sana_edge.store.pretrained import foreign, load_pair
        import_torchmetrics("functional.multimodal")
        self._foreign = partial(foreign, f"the CLIP in {folder} fails")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        processor, self.model = load_pair(CLIPModel, folder, self.device, torch.float32)
        if self.model.config.model_type != "clip":
            raise CheckpointError(f"{folder} holds a {self.model.config.model_type}, no CLIP", "give a CLIP")
        self.limit: int = self.model.config.text_config.max_position_embeddings
        self._pair = (_Towers(self.model), _Reader(processor, self.limit))
        self._tokenizer = processor.tokenizer
        self.cut = 0

    def score(self, path: Path, text: str) -> float:
        """Of one picture and its prompt, 0 to 100; a negative cosine counts as 0.

        Raises:
            CheckpointError: the model fails.
        """
        import torch
        from torchmetrics.functional.multimodal import clip_score

        # channels first
        pixels = torch.from_numpy(np.moveaxis(read_image(path), -1, 0).copy()).to(self.device)
        with torch.inference_mode(), self._foreign():
            self.cut += len(self._tokenizer(text, verbose=False).input_ids) > self.limit
            return float(clip_score(pixels, text, lambda: self._pair))

    def scores(self, paths: Sequence[Path], texts: Sequence[str], tell: Progress) -> list[float]:
        """Of each picture and its own prompt."""
        found = []
        for path, text in zip(paths, texts, strict=True):
            found.append(self.score(path, text))
            tell("CLIP score", len(found), len(paths))
        return found


class _Towers:
    """The model as torchmetrics 1 knows it: features are tensors, which transformers 5 has in an output."""

    def __init__(self, model: Any) -> None:
        self._model, self.config = model, model.config

    def to(self, device: Any) -> _Towers:
        self._model.to(device)
        return self

    def get_image_features(self, pixels: Tensor) -> Any:
        return _tensor(self._model.get_image_features(pixel_values=pixels))

    def get_text_features(self, ids: Tensor, mask: Tensor) -> Any:
        return _tensor(self._model.get_text_features(input_ids=ids, attention_mask=mask))


class _Reader:
    """The processor, which cuts long texts before their end token: torchmetrics would cut that off."""

    def __init__(self, processor: Any, limit: int) -> None:
        self._processor, self._limit = processor, limit

    def __call__(self, **inputs: Any) -> Any:
        if "text" in inputs:
            inputs |= {"truncation": True, "max_length": self._limit}
        return self._processor(**inputs)


def _tensor(output: Any) -> Any:
    return getattr(output, "pooler_output", output)
