"""The text encoder's graph and the instruction's file, run beside the torch module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sana_edge.engines.text import EngineText, RunText
from sana_edge.export.verify.agreement import Agreement
from sana_edge.export.verify.runner import Array, GraphRunner
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.prompt import CHI
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.manifest import Manifest

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
    folder: Path, described: Manifest, model: ResolvedModel, graphs: GraphRunner, agreement: Agreement
) -> dict[tuple[str, bool], Text]:
    """Compare on all of `TEXTS`, by which the result is keyed.

    Raises:
        SanaError: too far off.
        CheckpointError: a file is missing or damaged.
    """
    encoder = TextEncoder.load(
        model.path, dtype=torch.float32, device="cpu", variant=model.component_variant(GRAPH)
    )
    exported = EngineText(folder, described.text, runner(graphs))
    texts = {}
    for prompt, instructed in TEXTS:
        instruction = CHI if instructed else None
        features = encoder.encode([prompt], instruction=instruction)
        found = exported.encode(prompt, instruction=instruction)
        agreement.check(GRAPH, {"hidden": found}, hidden=features.embeddings.numpy())
        texts[prompt, instructed] = Text(features, found)
    return texts


def runner(graphs: GraphRunner) -> RunText:
    """What runs the graph for an `EngineText`."""
    return lambda ids, keys, values: graphs.run(GRAPH, ids=ids, past_keys=keys, past_values=values)["hidden"]
