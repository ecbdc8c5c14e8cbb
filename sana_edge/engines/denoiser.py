"""The denoiser of an exported folder: with guidance folded into one row, or two rows side by side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sana_edge.engines.sessions import DECODER, TEXT, Graphs
from sana_edge.engines.text import Context, Floats, padding_mask, side_by_side
from sana_edge.sampler import guide


class EngineDenoiser:
    """Predicts velocities; of its two graphs the one that a plan's texts ask for is in memory."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs

    def predict(
        self, guidance: float, timesteps: Floats, context: Context
    ) -> Callable[[Floats, int], Floats]:
        """What predicts the velocity (1, C, h, w) of a latent at a step.

        Args:
            timesteps: (S,) of the steps.
        """
        scale = np.array([guidance], np.float32)
        prompt, negative = context.prompt, context.negative
        if negative is not None and negative.length == 1:
            name, text = "denoiser_folded", prompt
            fixed = {"constant": negative.constant, "scale": scale}
        else:
            name, text = "denoiser", prompt if negative is None else side_by_side(negative, prompt)
            mask = np.zeros((1, 1, 1, prompt.length), np.float32)
            fixed = {"mask": mask if negative is None else padding_mask(negative.length, prompt.length)}
        # engines on a GPU copy what cannot change only once
        fixed |= {"keys": text.keys, "values": text.values, "guidance": scale}
        for array in fixed.values():
            array.setflags(write=False)
        self._load(name)
        paired = name == "denoiser" and negative is not None

        def velocity(x: Floats, i: int) -> Floats:
            # a picture may have been decoded meanwhile
            self._load(name)
            latent = np.concatenate([x, x]) if paired else x
            found = self._graphs.run(name, latent=latent, timestep=timesteps[i : i + 1], **fixed)["velocity"]
            return guide((found[:1], found[1:]), scale) if paired else found

        return velocity

    def _load(self, name: str) -> None:
        if name not in self._graphs.loaded:
            self._graphs.make_room(TEXT, DECODER)
            self._graphs.load(name)
