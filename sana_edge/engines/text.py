"""What the denoiser reads of a prompt, by the exported graphs: `nets.text_encoder` without torch.

The instruction before every prompt was run at export; ``instruction.safetensors`` has what it left behind,
and a prompt costs only its own tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sana_edge.decoding import check_finite
from sana_edge.engines.engine import EngineKind
from sana_edge.errors import CheckpointError
from sana_edge.prompt import CHI, Text, known_tokens, token_limit, tokenized_text
from sana_edge.store.cache import FileState, file_state
from sana_edge.store.manifest import DAMAGED, INSTRUCTION, TOKENIZER, Manifest, TextShape
from sana_edge.store.prompt_cache import Entry, LastTexts, PromptCache
from sana_edge.store.tokenizer import PromptTokenizer
from sana_edge.system.threads import processor

Floats = NDArray[np.float32]

# hidden (1, T, C) of ids (1, T) int64 behind past keys and values (layers, kv heads, P, d)
RunText = Callable[[NDArray[np.int64], Floats, Floats], Floats]


# added to the scores of what pads a shorter text
_PADDING = np.float32(-1e30)


@dataclass(frozen=True, eq=False)
class Instruction:
    """An instruction's ids (P,), last hidden state (1, P, C), keys and values (layers, kv heads, P, d)."""

    ids: list[int]
    hidden: Floats
    keys: Floats
    values: Floats

    @classmethod
    def read(cls, path: Path, shape: TextShape) -> Instruction:
        """Read ``instruction.safetensors``.

        Raises:
            CheckpointError: it cannot be read, or has not the tensors of a text encoder of ``shape``.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            tensors = load_file(path)
        # KeyError: dtypes that numpy lacks
        except (OSError, RuntimeError, ValueError, TypeError, SafetensorError, KeyError) as error:
            raise CheckpointError(f"cannot read {path}: {_one_line(error)}", DAMAGED) from error
        count = tensors["ids"].size if "ids" in tensors else 0
        past = (shape.layers, shape.kv_heads, count, shape.head_dim)
        expected = {"ids": (count,), "hidden": (1, count, shape.channels), "keys": past, "values": past}
        for name, wanted in expected.items():
            found = tensors[name].shape if name in tensors else "missing"
            if found != wanted:
                raise CheckpointError(f"{path}: {name} is {found}, expected {wanted}", DAMAGED)
        floats = {name: tensors[name].astype(np.float32) for name in ("hidden", "keys", "values")}
        for name, values in floats.items():
            if not np.isfinite(values).all():
                raise CheckpointError(f"{path}: {name} has NaN or infinite values", DAMAGED)
        return cls([int(token) for token in tensors["ids"]], **floats)


class EngineText:
    """A tokenizer, the text encoder's graph, and the instruction.

    Args:
        folder: the exported folder.
        run: runs the graph.

    Raises:
        CheckpointError: a file is missing, damaged or of another model.
    """

    def __init__(self, folder: Path, shape: TextShape, run: RunText) -> None:
        self._run = run
        self._tokenizer = PromptTokenizer((folder / TOKENIZER).parent, DAMAGED)
        self._instruction = Instruction.read(folder / INSTRUCTION, shape)
        if self._tokenizer.encode("\n".join(CHI)) != self._instruction.ids:
            raise CheckpointError(
                f"{folder}: {INSTRUCTION} is of another tokenizer than {TOKENIZER}", DAMAGED
            )

    def encode(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> Floats:
        """Return the (1, L, C) features of a prompt as `sana_edge.nets.text_encoder.TextEncoder.encode` does.

        Args:
            instruction: None for negative prompts, which have none. Another than the folder's own is run with
                every prompt.
        """
        row = self._tokenize(prompt, instruction, truncation=True)
        before = self._instruction
        # exported with SANA's own instruction
        known = known_tokens(row, before.ids) if instruction is CHI else 0
        ids = np.array([row[known:]], np.int64)
        keys, values = (np.ascontiguousarray(past[:, :, :known]) for past in (before.keys, before.values))
        hidden = np.concatenate([before.hidden[:, :known], self._run(ids, keys, values)], axis=1)
        first = self._length(instruction) - 1 if instruction else 1
        features = np.concatenate([hidden[:, :1], hidden[:, first:]], axis=1)
        check_finite("encoded text", float(features.min()), float(features.max()))
        return features

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """Return how many tokens of ``prompt`` `encode` cuts off; 0 if all of it is read."""
        return max(0, len(self._tokenize(prompt, instruction, truncation=False)) - self._limit(instruction))

    def _limit(self, instruction: Sequence[str] | None) -> int:
        return token_limit(self._length(instruction) if instruction else 0)

    def _length(self, instruction: Sequence[str]) -> int:
        if instruction is CHI:
            return len(self._instruction.ids)
        return len(self._tokenizer.encode("\n".join(instruction)))

    def _tokenize(self, prompt: str, instruction: Sequence[str] | None, *, truncation: bool) -> list[int]:
        limit = self._limit(instruction) if truncation else None
        return self._tokenizer.encode(tokenized_text(prompt, instruction), limit=limit)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, eq=False)
class ProjectedText:
    """keys (layers, B, heads, d, L), values (layers, B, heads, L, d), constant (layers, 1, 1, dim).

    ``constant`` is what the denoiser reads of the first token alone, as of an empty negative prompt.
    """

    keys: Floats
    values: Floats
    constant: Floats

    @property
    def length(self) -> int:
        """L."""
        return int(self.keys.shape[-1])


class KnownText:
    """`EngineText`, made for what the user's cache does not have: see `PromptCache`.

    Args:
        read: reads the tokenizer and the instruction.

    Attributes:
        last: keys, values and constants of the last plan's texts.
    """

    def __init__(
        self, folder: Path, described: Manifest, kind: EngineKind, read: Callable[[], EngineText]
    ) -> None:
        self._read = read
        self._text: EngineText | None = None
        self._cache = PromptCache(_identity(folder, described, kind), "F32", described.text.channels)
        self.last = LastTexts[ProjectedText]()

    def have(self, texts: Sequence[Text]) -> bool:
        """Whether no text encoder is needed for these."""
        return all(self._cache.find(text) is not None for text in texts)

    def encode(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> Floats:
        """As `EngineText.encode`."""
        entry = self._entry((prompt, instruction))
        found: Floats = np.frombuffer(entry.content, np.float32).reshape(entry.shape).copy()
        return found

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """As `EngineText.tokens_over_limit`."""
        return self._entry((prompt, instruction)).excess

    def _entry(self, text: Text) -> Entry:
        def encode() -> Entry:
            if self._text is None:
                self._text = self._read()
            prompt, instruction = text
            features = self._text.encode(prompt, instruction=instruction)
            excess = self._text.tokens_over_limit(prompt, instruction=instruction)
            _, length, channels = features.shape
            return Entry("F32", (1, length, channels), features.tobytes(), excess)

        return self._cache.get(text, encode)


def _identity(folder: Path, described: Manifest, kind: EngineKind) -> Callable[[], list[Any] | None]:
    """What features depend on: the files of the text encoder, which were verified, and what runs it."""
    stem = described.graphs["text_encoder"].file.removesuffix(".onnx")
    inside = TOKENIZER.partition("/")[0]
    checksums = {
        name: file.sha256
        for name, file in sorted(described.files.items())
        if name.partition(".")[0] == stem or name == INSTRUCTION or name.partition("/")[0] == inside
    }
    fixed = [kind.name, kind.device, kind.precision, kind.title, processor(), checksums]

    def states() -> list[FileState]:
        try:
            return [file_state(folder / name) for name in checksums]
        except OSError:
            return []

    verified = states()
    return lambda: fixed if states() == verified else None


@dataclass(frozen=True, eq=False)
class Context:
    """The texts of a plan; ``negative`` is None without guidance."""

    prompt: ProjectedText
    negative: ProjectedText | None


def side_by_side(one: ProjectedText, two: ProjectedText) -> ProjectedText:
    """Two texts as a batch, the shorter one padded with zeros; see `padding_mask`."""
    longest = max(one.length, two.length)

    def pad(array: Floats, axis: int) -> Floats:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, longest - array.shape[axis])
        return np.pad(array, widths)

    keys, values = (
        np.concatenate([pad(a, axis), pad(b, axis)], axis=1)
        for a, b, axis in ((one.keys, two.keys, 4), (one.values, two.values, 3))
    )
    return ProjectedText(keys, values, np.concatenate([one.constant, two.constant], axis=1))


def padding_mask(*lengths: int) -> Floats:
    """(B, 1, 1, L) to add to the scores of texts with so many tokens: 0, and -1e30 beyond their ends."""
    beyond = np.arange(max(lengths)) >= np.array(lengths)[:, None]
    mask: Floats = np.where(beyond, _PADDING, np.float32(0))[:, None, None]
    return mask
