"""The prompts of an evaluation: GenEval's, sana-tiny's, or a user's, each with its number and its seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sana_edge.evaluate import geneval
from sana_edge.evaluate.judge.prompts import Prompt

SETS = ("geneval", "sana-tiny")
"""What is asked for by name."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in a fixed order; a prompt's number is its place.

    Attributes:
        name: of the set, or of the file.
        texts: at least one.
        categories: one for each text; empty where the set has none.
        facts: what sana-tiny's judge looks for in each picture; empty for other sets.
        notes: what was left out of a file, for the user.
    """

    name: str
    texts: tuple[str, ...]
    categories: tuple[str, ...] = ()
    facts: tuple[Prompt, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def checksum(self) -> str:
        """SHA-256 of the texts, in hexadecimal."""
        return hashlib.sha256("\0".join(self.texts).encode(errors="surrogatepass")).hexdigest()

    def choose(self, limit: int | None) -> list[int]:
        """The numbers of ``limit`` prompts, or of all, ascending.

        Categories take turns, and a larger limit has all of a smaller one's: what is drawn is used again.
        """
        if not self.categories:
            return list(range(len(self.texts)))[:limit]
        turn: dict[str, int] = {}
        order = []
        for number, category in enumerate(self.categories):
            turn[category] = turn.get(category, 0) + 1
            order.append((turn[category], number))
        return sorted(number for _, number in sorted(order)[:limit])


def named(name: str) -> PromptSet:
    """One of `SETS`."""
    if name == "geneval":
        return _of(name, [(prompt.category, prompt.text) for prompt in geneval.prompts()])
    # draws scenes: not before it is asked for
    from sana_edge.evaluate.judge import scene_prompts

    facts = scene_prompts.prompts()
    return _of(name, [(fact.category, fact.text) for fact in facts], facts)


def _of(name: str, pairs: Sequence[tuple[str, str]], facts: tuple[Prompt, ...] = ()) -> PromptSet:
    categories, texts = zip(*pairs, strict=True)
    return PromptSet(name, texts, categories, facts)
