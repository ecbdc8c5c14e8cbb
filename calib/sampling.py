"""Which rows of the activations are kept or counted: a rule of names and numbers, so that runs repeat."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2


def quota(rows: int, step: int, steps: int, prompt: int, prompts: int) -> int:
    """How many of ``rows`` samples of a layer come from one step of one prompt.

    Every step gives its share of the rows, one after the other, and row r is of prompt r · q modulo
    ``prompts``, with the q nearest to the golden section: any rows in succession are spread evenly.
    """
    start, stop = rows * step // steps, rows * (step + 1) // steps
    coprime = (q for q in range(1, prompts + 1) if math.gcd(q, prompts) == 1)
    q = min(coprime, key=lambda q: abs(q - prompts * _GOLDEN))
    # the prompt's rows are those that are this modulo prompts
    first = prompt * pow(q, -1, prompts) % prompts
    return (stop - 1 - first) // prompts - (start - 1 - first) // prompts


def generator(*key: object) -> torch.Generator:
    """A source of random numbers on the CPU that depends on the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def strata(count: int, rows: int, source: torch.Generator) -> Tensor:
    """One random row out of each of ``count`` equal parts of ``rows``, in order: (count,) int64."""
    places = torch.arange(count) + torch.rand(count, generator=source, dtype=torch.float64)
    return (places * (rows / count)).long().clamp_(max=rows - 1)


class Reservoir:
    """A few rows out of all that a layer sees in one step of one prompt, in however many calls."""

    def __init__(self, rows: int) -> None:
        self._wanted = rows
        self._seen = 0
        self._kept: list[Tensor] = []

    def offer(self, x: Tensor, source: torch.Generator) -> None:
        """Let rows of x (N, C) take the places of earlier ones, each with the probability N / all so far."""
        if not self._wanted or not len(x):
            return
        self._seen += len(x)
        # more than before where an earlier call had too few rows
        count = max(min(self._wanted, len(x)), len(self._kept))
        rows = strata(count, len(x), source)
        taken = torch.rand(count, generator=source, dtype=torch.float64) < len(x) / self._seen
        # (count, C), a copy: layers overwrite their inputs
        offered = list(x[rows.to(x.device)].float().cpu())
        for place, take in enumerate(taken[: len(self._kept)]):
            if take:
                self._kept[place] = offered[place]
        self._kept += offered[len(self._kept) :]

    def rows(self) -> list[Tensor]:
        """The rows, (C,) fp32 on the CPU; fewer than asked for where no call had as many."""
        return self._kept
