"""Prompts as both runtimes read them: text before tokens, how many are read, and notes about the rest."""

# ruff: noqa: E501 (the instruction is a model input: its lines may not be wrapped)

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import Protocol

from sana_edge.errors import InvalidInput
from sana_edge.request.plan import Plan

logger = logging.getLogger("sana_edge")

# SANA's complex human instruction (CHI), in front of every prompt: kept byte for byte. Source: arXiv 2410.10629
# section 2.3; the wording is the default of `complex_human_instruction` in diffusers' SanaPipeline (Apache-2.0),
# which the public checkpoints are used with; the training configuration differs only in quotes.
CHI: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:",
    "User Prompt: ",
)

# tokens that the denoiser was trained with, padding included (arXiv 2410.10629)
MAX_TOKENS = 300
# of an instruction, of which SANA's has 246 in Gemma's vocabulary: attention takes their square
MAX_INSTRUCTION_TOKENS = 2048

# a prompt, and the lines of the instruction before it
Text = tuple[str, Sequence[str] | None]


def tokenized_text(prompt: str, instruction: Sequence[str] | None) -> str:
    """What the tokenizer gets: a prompt behind its instruction, as diffusers' SanaPipeline writes it."""
    return ("\n".join(instruction) if instruction else "") + _well_formed(prompt).lower().strip()


def _well_formed(text: str) -> str:
    """Without lone surrogates, which undecodable command-line arguments bring and tokenizers refuse."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def instruction_of(plan: Plan) -> Sequence[str] | None:
    """The lines before a plan's prompt: SANA's own, those asked for, or None for an empty text."""
    if plan.instruction is None:
        return CHI
    return (_well_formed(plan.instruction),) if plan.instruction else None


def texts_of(plan: Plan) -> list[Text]:
    """What a plan reads: the negative prompt where there is guidance, without an instruction; then the prompt."""
    texts: list[Text] = [(plan.prompt, instruction_of(plan))]
    return [(plan.negative_prompt, None), *texts] if plan.guided else texts


def token_limit(instruction_tokens: int) -> int:
    """How many tokens are read; ``instruction_tokens`` is 0 without an instruction.

    The first token and the instruction's last one count among the 300.

    Raises:
        InvalidInput: the instruction has more than `MAX_INSTRUCTION_TOKENS`.
    """
    if instruction_tokens > MAX_INSTRUCTION_TOKENS:
        found = f"the instruction has {instruction_tokens} tokens"
        raise InvalidInput(found, f"give at most {MAX_INSTRUCTION_TOKENS}")
    return instruction_tokens + MAX_TOKENS - 2 if instruction_tokens else MAX_TOKENS


def known_tokens(row: Sequence[int], instruction: Sequence[int]) -> int:
    """How many tokens of a row the encoded instruction has already.

    Its end may merge with the prompt into other tokens, and one token must be left to run.
    """
    pairs = zip(row, instruction, strict=False)
    return min(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)), len(row) - 1)


class Limited(Protocol):
    """A text encoder."""

    def tokens_over_limit(self, prompt: str, *, instruction: Sequence[str] | None = CHI) -> int:
        """How many tokens of a prompt it cuts off."""


class Known(Protocol):
    """What a model was trained on: `sana_edge.store.domain.Domain`."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]: ...
    def notes(self, model: str, texts: tuple[str, ...], size: tuple[int, int]) -> tuple[str, ...]: ...


def reading_notes(
    plan: Plan, encoder: Limited, domain: Known | None = None, model: str = ""
) -> tuple[str, ...]:
    """Say, and log, what of a plan's prompts is cut or ignored, and what is foreign to the model."""
    excess = encoder.tokens_over_limit(plan.prompt, instruction=instruction_of(plan))
    notes = [_cut("prompt", excess)]
    if plan.guided:
        excess = encoder.tokens_over_limit(plan.negative_prompt, instruction=None)
        notes.append(_cut("negative prompt", excess))
    elif plan.negative_prompt.strip():
        notes.append("the negative prompt is not used: that needs guidance above 1, and no Sprint model")
    if domain is not None:
        texts = (plan.prompt, plan.negative_prompt) if plan.guided else (plan.prompt,)
        notes += domain.notes(model, texts, (plan.width, plan.height))
    # a domain says more
    if domain is None or not domain.sizes:
        notes += plan.size_notes
    said = tuple(filter(None, notes))
    for note in said:
        logger.warning(note)
    return said


def _cut(name: str, excess: int) -> str:
    return f"the {name} is too long: its last {excess} tokens are not used" if excess else ""
