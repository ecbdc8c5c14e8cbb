"""Which pictures and captions a step gets: a function of seed and step, so that a training can be resumed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .buckets import Size
from .imagefolder import Entry
from .latent_cache import Picture
from .score import probabilities


@dataclass(frozen=True)
class Item:
    """A row of a batch: the picture's checksum, and its caption, "" where it is dropped."""

    key: str
    caption: str


class Batches:
    """Batches of pictures of one size, shuffled anew in every epoch; a part of a batch is filled up."""

    def __init__(
        self, data: Sequence[tuple[Entry, Picture]], size: int, *, seed: int, tau: float, dropout: float
    ) -> None:
        """``size`` is of a whole batch, over all processes; ``tau`` and ``dropout`` are those of a recipe."""
        self.data, self.size, self.seed, self.tau, self.dropout = data, size, seed, tau, dropout
        self._buckets: dict[Size, list[int]] = {}
        for number, (_, picture) in enumerate(data):
            self._buckets.setdefault(picture.size, []).append(number)
        self.epoch_length = sum(-(-len(numbers) // size) for numbers in self._buckets.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __getitem__(self, step: int) -> list[Item]:
        """The whole batch of a step, counted from 0."""
        epoch, place = divmod(step, self.epoch_length)
        if self._epoch[0] != epoch:
            self._epoch = epoch, self._shuffled(epoch)
        return [
            self._item(number, random.Random(f"{self.seed} caption {step} {row}"))
            for row, number in enumerate(self._epoch[1][place])
        ]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed} epoch {epoch}")
        batches = []
        for numbers in self._buckets.values():
            order = rng.sample(numbers, len(numbers))
            order += rng.choices(numbers, k=-len(numbers) % self.size)
            batches += [order[i : i + self.size] for i in range(0, len(order), self.size)]
        rng.shuffle(batches)
        return batches

    def _item(self, number: int, rng: random.Random) -> Item:
        entry, picture = self.data[number]
        dropped = rng.random() < self.dropout
        return Item(picture.key, "" if dropped else choose(entry, self.tau, rng))


def choose(entry: Entry, tau: float, rng: random.Random) -> str:
    """A caption, drawn by its CLIP score where there are scores, uniformly elsewhere."""
    weights = probabilities(entry.scores, tau) if entry.scores else None
    (caption,) = rng.choices(entry.captions, weights)
    return caption
