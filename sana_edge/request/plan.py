"""A request to a certain model, with nothing left open."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sana_edge import sizes
from sana_edge.config import SamplerKind
from sana_edge.init_image import InitImage


@dataclass(frozen=True)
class Plan:
    """A `Request` to a certain model, with nothing left open.

    It is drawn at ``width`` x ``height``, then resized and cropped to ``size`` (width, height).
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    size: tuple[int, int]
    exact_size: bool
    native_size: int
    steps: int
    guidance: float
    seed: int
    sampler: SamplerKind
    images: int
    flow_shift: float | None = None
    instruction: str | None = None
    tile: int | None = None
    init: InitImage | None = None
    variation: tuple[tuple[int, float], ...] = ()

    def picture(self, index: int) -> Plan:
        """The plan of one of its pictures alone: seeds count up, of variations those mixed in last."""
        seed, variation = counted(self.seed, self.variation, index)
        return dataclasses.replace(self, images=1, seed=seed, variation=variation)

    @property
    def skip(self) -> int:
        """How many steps an image leaves out at the start."""
        return 0 if self.init is None else self.init.skip(self.steps)

    @property
    def guided(self) -> bool:
        """Whether each step makes a second prediction, from the negative prompt; Sprint never does."""
        return self.guidance > 1 and self.sampler != "scm"

    @property
    def size_notes(self) -> tuple[str, ...]:
        """Sentences about a picture that is enlarged, or drawn far from what the model was trained on."""
        drawn, native = f"{self.width}x{self.height}", self.native_size
        if self.size[0] > self.width or self.size[1] > self.height:
            enlarged = f"enlarged to {self.size[0]}x{self.size[1]}"
            return (f"drawn at {drawn}, the nearest size that the model was trained on, and {enlarged}",)
        if sizes.has_buckets(native) and not self.exact_size:
            return ()
        if not 0.5 <= self.width * self.height / native**2 <= 2:
            return (f"{drawn} is far from {native}x{native}, which the model was trained for: expect debris",)
        return ()

    def metadata(self) -> dict[str, Any]:
        """What `Request` needs to make this again, as JSON values; the seed is the first picture's."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": self.seed,
            "size": list(self.size),
            **({"exact_size": True} if self.exact_size else {}),
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": self.sampler,
            **({} if self.flow_shift is None else {"flow_shift": self.flow_shift}),
            **({} if self.instruction is None else {"instruction": self.instruction}),
            **({} if self.tile is None else {"tile": self.tile}),
            **({"variation": [list(pair) for pair in self.variation]} if self.variation else {}),
            **({} if self.init is None else self.init.metadata()),
        }


def label(seed: int, variation: Sequence[tuple[int, float]]) -> str:
    """A picture's seed, and those that were mixed into its noise."""
    return "-".join(map(str, (seed, *(mixed for mixed, _ in variation))))


def counted(
    seed: int, variation: tuple[tuple[int, float], ...], index: int
) -> tuple[int, tuple[tuple[int, float], ...]]:
    """Seed and variation of a picture: the seed counts up, or where there are variations their last."""
    if not variation:
        return seed + index, ()
    *before, (mixed, strength) = variation
    return seed, (*before, (mixed + index, strength))


def random_seed() -> int:
    """A seed that is short enough to be typed again."""
    return secrets.randbelow(2**32)
