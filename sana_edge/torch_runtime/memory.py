"""The memory that a model's pictures take on a device: an estimate of it, and whether it is there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch

from sana_edge.errors import OutOfMemory
from sana_edge.plan.memory import Stage, Work, check_smallest, fit_hint, in_turn, together, torch_stages
from sana_edge.plan.model import Facts
from sana_edge.prompt import texts_of
from sana_edge.request.plan import Plan
from sana_edge.store.tiny_autoencoder import DecoderConfig
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory, used_memory
from sana_edge.torch_runtime.stages import Stages
from sana_edge.torch_runtime.texts import KnownTexts


@dataclass(frozen=True, eq=False)
class Memory:
    """Of a device, for the networks of a model.

    ``dtype`` is the denoiser's, by its short name, ``text_dtype`` the text encoder's where it is another,
    ``limit`` bytes that may be taken, None for what is free, ``texts`` those that need no text encoder, None
    without a cache.
    """

    networks: Stages
    facts: Facts
    device: torch.device
    dtype: str
    text_dtype: str | None = None
    int8: bool = False
    limit: int | None = None
    texts: KnownTexts | None = None

    def free(self) -> int | None:
        """Bytes that may be taken now; None where nobody knows."""
        return within(available_memory(self.device), self.limit, self.device)

    def stages(self, work: Work) -> list[Stage]:
        """What a picture's stages take."""
        host, facts = self.device.type == "cpu", self.facts
        if "decoder" in self.networks.loaded:
            # a file's is known when it is read
            config = cast("DecoderConfig", self.networks.decoder.config)
            facts = facts if config == facts.decoder else dataclasses.replace(facts, decoder=config)
        return torch_stages(facts, work, self.dtype, self.text_dtype, int8=self.int8, host=host)

    def arrange(self, name: str, *, guided: bool) -> None:
        """Have the networks loaded in turn where they do not fit together for a usual picture.

        Raises:
            OutOfMemory: not even the smallest picture fits into the limit; names the model.
        """
        cells = self.facts.denoiser.sample_size
        usual = self.stages(Work(cells, cells, guided=guided))
        free = self.free()
        self.networks.in_turn = free is not None and together(usual) > free
        if self.limit is not None:
            check_smallest(name, self.stages(Work(1, 1, guided=False)), free, self.limit)

    def check(self, plan: Plan, count: int) -> None:
        """Compare an estimate of the largest stage with what is free, where that is known; computes nothing.

        Args:
            count: pictures that go through the denoiser together.

        Raises:
            OutOfMemory: it does not fit, even decoded in tiles, where these are not turned off.
        """
        cell = self.facts.decoder.spatial_compression
        sides = (plan.height // cell, plan.width // cell)
        work = Work(*sides, plan.guided, plan.tile, plan.init is not None, count)
        stages, there, free = self.stages(work), self.networks.loaded, self.free()
        if free is None:
            return
        known = self.texts is not None and self.texts.have(texts_of(plan))
        used = [stage for stage in stages if not (known and stage.name == "text")]
        if self.networks.in_turn:
            needed = in_turn(used, tiles=True)
            free += sum(stage.weights for stage in stages if stage.name in there)
        else:
            works = {s.name: s.least + (0 if s.name in there else s.weights) for s in used}
            needed = max(works.values())
            if self.device.type == "cuda":
                # what a graph was recorded with stays its own while a picture is decoded
                needed = max(needed, works["denoiser"] + works["decoder"])
        if needed > free:
            size = f"{plan.width}x{plan.height}"
            pictures = f"{size} needs" if count == 1 else f"{count} pictures of {size} at once need"
            raise OutOfMemory(
                f"{pictures} about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free",
                fit_hint(free + (used_memory(self.device) or 0)),
                needed=needed,
                free=free,
            )
