"""What a caller is told about prompts that were not read whole, or ask for what the model never saw."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from sana_edge.instruction import CHI
from sana_edge.request import Plan

logger = logging.getLogger("sana_edge")


class Limited(Protocol):
    """A text encoder."""

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """How many tokens of a prompt it cuts off."""


class Known(Protocol):
    """What a model was trained on: `sana_edge.store.domain.Domain`."""

    def notes(self, model: str, texts: tuple[str, ...], size: tuple[int, int]) -> tuple[str, ...]: ...


def reading_notes(
    plan: Plan, encoder: Limited, domain: Known | None = None, model: str = ""
) -> tuple[str, ...]:
    """Say, and log, what of a plan's prompts is cut or ignored, and what is foreign to the model."""
    notes = [_cut("prompt", encoder.tokens_over_limit(plan.prompt))]
    if plan.guided:
        excess = encoder.tokens_over_limit(plan.negative_prompt, instruction=None)
        notes.append(_cut("negative prompt", excess))
    elif plan.negative_prompt.strip():
        notes.append("the negative prompt is not used: that needs guidance above 1, and no Sprint model")
    if domain is not None:
        texts = (plan.prompt, plan.negative_prompt) if plan.guided else (plan.prompt,)
        notes += domain.notes(model, texts, (plan.width, plan.height))
    said = tuple(filter(None, notes))
    for note in said:
        logger.warning(note)
    return said


def _cut(name: str, excess: int) -> str:
    return f"the {name} is too long: its last {excess} tokens are not used" if excess else ""
