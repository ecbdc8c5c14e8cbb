"""The text encoder's graph and the instruction's file, run beside the torch module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sana_edge.errors import CheckpointError
from sana_edge.export.agreement import Agreement
from sana_edge.export.graph_runner import Array, GraphRunner
from sana_edge.hub import ResolvedModel
from sana_edge.instruction import CHI
from sana_edge.manifest import DAMAGED, INSTRUCTION
from sana_edge.text_encoder import TextEncoder, TextFeatures

GRAPH = "text_encoder"
PROMPT, NEGATIVE = "A red house left of a yellow star, on a green hill", "blurry, low quality"
# more than 300 tokens
LONG = "two blue fish above a green tree. " * 60
# (prompt, whether the instruction stands before it)
TEXTS = ((PROMPT, True), ("", True), (LONG, True), (NEGATIVE, False), ("", False))


@dataclass(frozen=True)
class Text:
    """What was made of a prompt: the torch module's features, and the graph's embeddings (1, L, C)."""

    expected: TextFeatures
    found: Array


def compare_text(
    folder: Path, model: ResolvedModel, graphs: GraphRunner, agreement: Agreement
) -> dict[tuple[str, bool], Text]:
    """Compare on all of `TEXTS`, by which the result is keyed.

    Raises:
        SanaError: too far off.
        CheckpointError: a file is missing or damaged.
    """
    encoder = TextEncoder.load(
        model.path, dtype=torch.float32, device="cpu", variant=model.component_variant(GRAPH)
    )
    stored = _stored(folder / INSTRUCTION)
    nothing = {name: tensor[:, :, :0] for name, tensor in stored.items() if tensor.ndim == 4}
    nothing |= {"ids": stored["ids"][:0], "hidden": stored["hidden"][:, :0]}
    texts = {}
    for prompt, instructed in TEXTS:
        instruction = CHI if instructed else None
        features = encoder.encode([prompt], instruction=instruction)
        (row,) = encoder._tokenize([prompt], instruction, truncation=True)
        found = read(graphs, row, stored if instructed else nothing)
        agreement.check(GRAPH, {"hidden": found}, hidden=features.embeddings.numpy())
        texts[prompt, instructed] = Text(features, found)
    return texts


def read(graphs: GraphRunner, row: list[int], instruction: Mapping[str, Array]) -> Array:
    """Embeddings (1, L, C) of a prompt's tokens, behind an instruction of ids, hidden, keys and values."""
    ids = instruction["ids"].tolist()
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(row, ids, strict=False)))
    known = min(same, len(row) - 1)
    past_keys, past_values = (instruction[name][:, :, :known] for name in ("keys", "values"))
    new = graphs.run(
        GRAPH,
        ids=np.array([row[known:]], dtype=np.int64),
        past_keys=past_keys.astype(np.float32),
        past_values=past_values.astype(np.float32),
    )
    hidden = np.concatenate([instruction["hidden"][:, :known].astype(np.float32), new["hidden"]], axis=1)
    first = len(ids) - 1 if ids else 1
    return np.concatenate([hidden[:, :1], hidden[:, first:]], axis=1)


def _stored(path: Path) -> dict[str, Array]:
    try:
        stored: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", DAMAGED) from error
    missing = {"ids", "hidden", "keys", "values"} - set(stored)
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}", DAMAGED)
    return stored
