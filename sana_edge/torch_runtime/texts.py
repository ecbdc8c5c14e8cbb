"""Prompts that were read before, in this process or another: the text encoder is loaded for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_edge.errors import CheckpointError, torch_extra
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.text_context import TextContext, beside
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.prompt import CHI, Text
from sana_edge.store.cache import known_digest
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.identify import explain
from sana_edge.store.prompt_cache import Entry, LastTexts, PromptCache
from sana_edge.store.weights import weight_files
from sana_edge.system.regular import open_regular
from sana_edge.system.threads import processor
from sana_edge.torch_runtime.device import thread_count
from sana_edge.torch_runtime.stages import Stages

# what safetensors calls them
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class KnownTexts:
    """A text encoder that is loaded for what its cache does not have; see `TextEncoder`, which it stands for.

    Args:
        networks: with the text encoder.
        identity: of it, see `PromptCache`.
        dtype, channels: of its features.
        device: where they are wanted.
    """

    def __init__(
        self,
        networks: Stages,
        identity: Callable[[], Any],
        *,
        dtype: torch.dtype,
        channels: int,
        device: torch.device,
    ) -> None:
        self._networks, self._dtype, self._device = networks, dtype, device
        self._cache = PromptCache(identity, _STORED[dtype], channels)
        self._last = LastTexts[TextContext]()

    @property
    def note(self) -> str:
        """That of the text encoder, where it is in memory."""
        return self._networks.text.note if "text" in self._networks.loaded else ""

    def have(self, texts: Sequence[Text]) -> bool:
        """Whether no text encoder is needed for these."""
        return all(self._cache.find(text) is not None for text in texts)

    def encode(self, prompts: Sequence[str], *, instruction: Sequence[str] | None = CHI) -> TextFeatures:
        """The features of a single prompt, as `TextEncoder.encode` gives them."""
        (prompt,) = prompts
        entry = self._entry((prompt, instruction))
        values = torch.frombuffer(bytearray(entry.content), dtype=self._dtype).view(entry.shape)
        mask = torch.ones(entry.shape[:2], dtype=torch.bool)
        return TextFeatures(values.to(self._device), mask.to(self._device))

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """How many tokens of a prompt are cut off."""
        return self._entry((prompt, instruction)).excess

    def context(
        self, texts: Sequence[Text], groups: Sequence[TextFeatures], denoiser: Callable[[], Denoiser]
    ) -> TextContext:
        """`Denoiser.text_context` of texts with their features; computes what the last call did not.

        So a negative prompt's keys, values or constants are computed once, as long as it stays the same.
        """
        return beside(self._last.get(texts, lambda number: denoiser().text_context([groups[number]])))

    def forget(self, texts: Sequence[Text] = ()) -> None:
        """Let go of the keys and values of all but these."""
        self._last.keep(texts)

    def _entry(self, text: Text) -> Entry:
        def encode() -> Entry:
            # transformers is imported now
            with torch_extra():
                encoder = self._networks.text
            prompt, instruction = text
            features = encoder.encode([prompt], instruction=instruction).embeddings
            excess = encoder.tokens_over_limit(prompt, instruction=instruction)
            _, length, channels = features.shape
            return Entry(_STORED[features.dtype], (1, length, channels), _bytes(features), excess)

        return self._cache.get(text, encode)


def check_files(model: ResolvedModel) -> None:
    """See that a text encoder's files are what their names say, long before the first prompt needs them.

    Of JSON only how it begins: a tokenizer's has tens of megabytes.

    Raises:
        CheckpointError: weights are missing or cut off, or something else lies in a file's place.
    """
    text, tokenizer = model.path / "text_encoder", model.path / "tokenizer"
    weights = weight_files(text, variant=model.component_variant("text_encoder"))
    for path in (*weights, tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"):
        if path.suffix == ".json" and not _is_other_text(path):
            continue
        known, hint = explain(path, "download the model again")
        if known:
            raise CheckpointError(f"cannot read {path}{known}", hint)


def _is_other_text(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            begin = file.read(64).lstrip()
    except OSError:
        return False
    return (begin[:1].isascii() and begin[:1].isalnum()) or begin[:1] == b"<"


def text_identity(
    model: ResolvedModel, *, device: torch.device, int8: bool, backend: str, threads: int | None
) -> Callable[[], list[Any]]:
    """What the features of a model folder's text encoder depend on, but for their dtype; see `PromptCache`.

    Args:
        int8: its float weights are made INT8 while they are loaded.
        backend: of the steps.
    """
    place: tuple[Any, ...] = (processor(), torch.backends.cpu.get_cpu_capability(), thread_count(threads))
    if device.type == "cuda":
        place = (torch.cuda.get_device_name(device), torch.version.cuda)
    libraries = [torch.__version__, *map(_version, ("transformers", "bitsandbytes"))]
    fixed = ["torch", *libraries, *place, int8, backend]

    def identity() -> list[Any]:
        folder, text = model.path / "tokenizer", model.path / "text_encoder"
        files = [text / "config.json", folder / "tokenizer.json", folder / "tokenizer_config.json"]
        found = weight_files(text, variant=model.component_variant("text_encoder"))
        return [*fixed, *(known_digest(path) for path in (*found, *files) if path.is_file())]

    return identity


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
