"""Text features for the denoiser: the last hidden state of Gemma-2 behind SANA's instruction.

The instruction is the same for every prompt and attention is causal, so its keys and values are computed
once and kept: a prompt costs only its own tokens. Padding stands on the right, where causal attention of
valid tokens never looks, and is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from sana_edge.decoding import check_finite
from sana_edge.errors import CheckpointError
from sana_edge.nets.text_weights import load_text_model
from sana_edge.prompt import CHI, known_tokens, token_limit, tokenized_text
from sana_edge.store.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from transformers import Gemma2Model


@dataclass(frozen=True)
class TextFeatures:
    """What the denoiser reads of some prompts.

    ``embeddings`` is (rows, length, channels) floating point, zero where ``mask``, (rows, length) bool, is
    False. ``length`` is that of the longest row; valid tokens come first.
    """

    embeddings: Tensor
    mask: Tensor


# of each layer (1, heads, N, d), as the network that made them keeps them
KeysValues = list[tuple[Tensor, Tensor]]


class TextNetwork(Protocol):
    """What computes hidden states of token ids."""

    def instruct(self, ids: Tensor) -> tuple[Tensor, KeysValues]:
        """Hidden states (1, N, C) of an instruction, ids (1, N), and what texts behind it read."""

    def read(self, ids: Tensor, past: KeysValues, known: int) -> Tensor:
        """Hidden states (rows, N, C) of ids (rows, N) behind the first ``known`` tokens of an instruction.

        ``past`` is what `instruct` gave of it, or empty: texts without one.
        """

    def release(self) -> None:
        """Let go of memory that can be had again."""


class _Transformers:
    """A `TextNetwork` of the library's model."""

    def __init__(self, model: Gemma2Model) -> None:
        self._model = model

    def instruct(self, ids: Tensor) -> tuple[Tensor, KeysValues]:
        from transformers import DynamicCache

        # without a config the cache keeps all tokens of sliding layers too; masks still slide
        cache = DynamicCache()
        hidden: Tensor = self._model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden, [(layer.keys, layer.values) for layer in cache.layers]

    def read(self, ids: Tensor, past: KeysValues, known: int) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            shape = (len(ids), -1, -1, -1)
            cache.update(keys[:, :, :known].expand(shape), values[:, :, :known].expand(shape), layer)
        hidden: Tensor = self._model(ids, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden

    def release(self) -> None:
        """It keeps nothing."""


@dataclass(frozen=True)
class _Prefix:
    """An encoded instruction: its last hidden state (1, N, C), and what `TextNetwork.instruct` gave."""

    ids: list[int]
    hidden: Tensor
    layers: KeysValues


class EncodedTexts:
    """Features of some prompts, kept when the text encoder that made them has gone."""

    note = ""

    def __init__(self) -> None:
        # by prompt and instruction
        self._known: dict[tuple[str, tuple[str, ...]], TextFeatures] = {}

    def add(self, encoder: TextEncoder, prompt: str, *, instruction: Sequence[str] | None = CHI) -> None:
        """Encode a prompt that is not among them."""
        key = prompt, tuple(instruction or ())
        if key not in self._known:
            self._known[key] = encoder.encode([prompt], instruction=instruction)

    def encode(self, prompts: Sequence[str], *, instruction: Sequence[str] | None = CHI) -> TextFeatures:
        """The features of a single prompt that was added, as `TextEncoder.encode` gives them."""
        (prompt,) = prompts
        return self._known[prompt, tuple(instruction or ())]

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """Not known any more."""
        return 0

    def release(self) -> None:
        """Nothing can be had again."""


class TextEncoder:
    """A tokenizer and a frozen Gemma-2, with the instructions it has met.

    Attributes:
        network: what runs the model; the library, until another is put in its place.
        note: why a faster one could not be.
    """

    def __init__(self, tokenizer: PromptTokenizer, model: Gemma2Model) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._prefixes: dict[str, _Prefix] = {}
        self.network: TextNetwork = _Transformers(model)
        self.note = ""

    @property
    def model(self) -> Gemma2Model:
        """The library's model, of which another network may have taken the layers."""
        return self._model

    def release(self) -> None:
        """Let go of memory that can be had again."""
        self.network.release()

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        variant: str | None = None,
        int8: bool = False,
        resident: int | None = None,
        fused: bool = False,
    ) -> TextEncoder:
        """Read ``tokenizer/`` and ``text_encoder/`` of a model folder in diffusers layout.

        Args:
            folder: the model folder; nothing is downloaded.
            dtype: of the features, and of the weights that are not INT8; the public models want bf16 or fp32.
            device: where the model runs and the features are.
            variant: which of several weight files, as in `load_state`.
            int8: make float weights INT8 while they are loaded; a package is INT8 anyway.
            resident: see `load_text_model`.
            fused: also.

        Raises:
            CheckpointError: a file is missing or damaged, or is not of a Gemma-2.
        """
        tokenizer = PromptTokenizer(folder / "tokenizer")
        model = load_text_model(
            folder / "text_encoder",
            dtype=dtype,
            device=device,
            variant=variant,
            int8=int8,
            resident=resident,
            fused=fused,
        )
        return cls(tokenizer, model)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, instruction: Sequence[str] | None = CHI) -> TextFeatures:
        """Return the features of ``prompts``, one row each, equal to diffusers' SanaPipeline.encode_prompt.

        A prompt is lower-cased, stripped, and put behind the lines of ``instruction``. At most 300 tokens
        are kept: the first one and those from the instruction's last one on (arXiv 2410.10629, section 2.3).

        Args:
            prompts: at least one, any text; what is longer than fits is cut (`tokens_over_limit`).
            instruction: lines of the instruction; None for negative prompts, which have none.
        """
        # which refuses an instruction that would take minutes
        rows = self._tokenize(prompts, instruction, truncation=True)
        prefix = self._prefix("\n".join(instruction)) if instruction else None
        hidden = self._hidden_states(rows, prefix)
        lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
        first = len(prefix.ids) - 1 if prefix else 1
        mask = torch.cat([mask[:, :1], mask[:, first:]], dim=1)
        embeddings = torch.cat([hidden[:, :1], hidden[:, first:]], dim=1)
        # the embedding stays in its file, where nobody has looked at its values
        check_finite("encoded text", *map(float, embeddings[mask].aminmax()))
        return TextFeatures(embeddings.masked_fill(~mask[..., None], 0.0), mask)

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """Return how many tokens of ``prompt`` `encode` cuts off; 0 if all of it is read."""
        (row,) = self._tokenize([prompt], instruction, truncation=False)
        return max(0, len(row) - self._limit(instruction))

    def _limit(self, instruction: Sequence[str] | None) -> int:
        return token_limit(len(self._tokenizer.encode("\n".join(instruction))) if instruction else 0)

    def _tokenize(
        self, prompts: Sequence[str], instruction: Sequence[str] | None, *, truncation: bool
    ) -> list[list[int]]:
        """Return the token ids of each prompt behind the instruction, without padding."""
        limit = self._limit(instruction) if truncation else None
        texts = [tokenized_text(prompt, instruction) for prompt in prompts]
        return [self._tokenizer.encode(text, limit=limit) for text in texts]

    def _prefix(self, text: str) -> _Prefix:
        """Return the encoded instruction, computed at its first use."""
        if text not in self._prefixes:
            # of others than SANA's own the last is kept
            for old in [other for other in self._prefixes if other != "\n".join(CHI)]:
                del self._prefixes[old]
            ids = self._tokenizer.encode(text)
            self._prefixes[text] = _Prefix(ids, *self.network.instruct(self._ids([ids])))
        return self._prefixes[text]

    def _hidden_states(self, rows: list[list[int]], prefix: _Prefix | None) -> Tensor:
        """Return (rows, longest, C), arbitrary beyond the end of a row."""
        if prefix is None:
            return self.network.read(self._ids(rows), [], 0)
        known = min(known_tokens(row, prefix.ids) for row in rows)
        hidden = self.network.read(self._ids([row[known:] for row in rows]), prefix.layers, known)
        return torch.cat([prefix.hidden[:, :known].expand(len(rows), -1, -1), hidden], dim=1)

    def _ids(self, rows: list[list[int]]) -> Tensor:
        """Token ids (rows, longest) on the model's device."""
        vocabulary = self._model.config.vocab_size
        if any(max(row) >= vocabulary for row in rows):
            raise CheckpointError(
                f"the tokenizer gives tokens that a vocabulary of {vocabulary} lacks",
                "tokenizer/ and text_encoder/ are of different models; download the model again",
            )
        longest = max(len(row) for row in rows)
        return torch.tensor(
            [row + [0] * (longest - len(row)) for row in rows], device=self._model.norm.weight.device
        )
