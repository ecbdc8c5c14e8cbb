"""What the exported graphs do for a picture, on numpy arrays; `sana_edge.torch_runtime` without torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sana_edge.decoding import PREVIEW_CELLS, check_finite, resize_and_crop, shrink
from sana_edge.engines.model import EngineModel
from sana_edge.engines.noise import NoiseSource
from sana_edge.engines.sessions import DENOISER, DENOISERS, TEXT
from sana_edge.engines.text import Context, Floats, ProjectedText
from sana_edge.errors import InvalidInput
from sana_edge.noise.schedules import sampler_of
from sana_edge.noise.variations import varied
from sana_edge.progress import Progress, unseen
from sana_edge.prompt import reading_notes, texts_of
from sana_edge.request.plan import Plan
from sana_edge.sampler import Origin, Sampler


class EngineRuntime(EngineModel):
    """What `sana_edge.runtime.Runtime` promises, of an exported folder. Latents are (1, C, h, w) fp32."""

    def computing(self) -> AbstractContextManager[None]:
        """Nothing is set for numpy."""
        return nullcontext()

    def mark(self) -> None:
        """Nothing is queued."""

    def synchronize(self) -> None:
        """Engines return when they are done."""

    def check_plan(self, plan: Plan, count: int = 1) -> None:
        """See that the graphs know the size, and that its pixels fit; computes nothing.

        Raises:
            InvalidInput: they were exported, or their engines built, for other sizes.
            OutOfMemory: not even the decoded picture would fit.
        """
        size, asked = self._manifest.size, f"{plan.width}x{plan.height}"
        if size is not None and (plan.width, plan.height) != size:
            made = "x".join(map(str, size))
            hint = f"choose size {made}, or export again: `{self._manifest.export_command(size=asked)}`"
            raise InvalidInput(
                f"{self.name} was exported for {made} alone, not for {asked}",
                f"{hint}; without --size for any",
            )
        if size is not None and plan.tile and plan.tile < max(size):
            made = f"`{self._manifest.export_command()}` without --size makes graphs that can"
            found = f"{self.name} was exported for one size, tiles of {plan.tile} are another"
            raise InvalidInput(found, made)
        if plan.init is not None:
            self._encoder.check()
        # which of them a prompt needs shows when it has been read
        for name in DENOISERS:
            self.graphs.check(name, latent=self._latent_shape(plan))
        self._memory.check(plan)

    def read(self, plan: Plan) -> tuple[Context, tuple[str, ...]]:
        """Encode the prompt, and the negative one where it is used; say what was cut or ignored."""
        texts = texts_of(plan)
        missing = range(len(texts)) if self._known is None else self._known.last.missing(texts)
        # all of them before the first is projected, for which the text encoder makes room
        features = {i: self._text.encode(texts[i][0], instruction=texts[i][1]) for i in missing}
        notes = reading_notes(plan, self._text, self._domain, self.name)
        self.graphs.make_room(TEXT)

        def project(number: int) -> ProjectedText:
            return ProjectedText(**self.graphs.run("text_projection", embeddings=features[number]))

        found = [*map(project, missing)] if self._known is None else self._known.last.get(texts, project)
        return Context(found[-1], found[0] if plan.guided else None), (*self.notes, *notes)

    def schedule(self, plan: Plan) -> tuple[Sampler, Floats]:
        """Make the sampler; its timesteps (S,) are what the denoiser gets."""
        sampler = sampler_of(self.sampler, plan.sampler, plan.steps, plan.flow_shift, plan.skip)
        return sampler, sampler.timesteps

    def noises(self, plans: Sequence[Plan]) -> Callable[[], Floats]:
        """`noise` of a batch, a row for each plan."""
        sources = [self.noise(plan) for plan in plans]
        return lambda: np.concatenate([draw() for draw in sources])

    def join(self, contexts: Sequence[Context]) -> Context:
        """Texts of a batch: the graphs that fold guidance have one row.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(f"{self.name} is exported for one picture at a time", "leave out the batch")

    def predict(
        self, plan: Plan, tables: Floats, context: Context, count: int = 1
    ) -> tuple[Callable[[Floats, int], Floats], tuple[str, ...]]:
        """What predicts the velocities of the plan's steps; ``count`` is 1."""
        return self._denoiser.predict(plan.guidance, tables, context), ()

    def origin(self, plan: Plan) -> Origin[Floats]:
        """Encode the plan's image."""
        return self._encoder.encode(plan)

    def noise(self, plan: Plan, picture: int = 0) -> Callable[[], Floats]:
        """What draws N(0, 1) for one of the plan's pictures, as with torch."""
        one, shape = plan.picture(picture), self._latent_shape(plan)
        return varied(lambda seed: partial(NoiseSource(seed).normal, shape), one.seed, one.variation)

    def decode(
        self,
        latent: Floats,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
        *,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Turn a latent into (H, W, 3) uint8, resized and cropped to ``size`` (width, height).

        Tells ``on_progress`` between strips or tiles; what that raises ends the decode. ``tile`` and
        ``on_tiled`` are those of `EngineDecoder.decode`.

        Raises:
            SanaError: the latent, or what the decoder makes of it, has NaN or infinite values.
        """
        self.graphs.make_room(DENOISER)
        told = on_progress or unseen
        decode = partial(self._decoder.decode, on_progress=told, tile=tile, on_tiled=on_tiled)
        return self._picture(latent, decode, size)

    def _picture(
        self, latent: Floats, decode: Callable[[Floats], Floats], size: tuple[int, int] | None = None
    ) -> NDArray[np.uint8]:
        check_finite("latent", float(latent.min()), float(latent.max()))
        pixels = decode(latent)
        check_finite("decoded picture", float(pixels.min()), float(pixels.max()))
        picture = pixels[0] if size is None else resize_and_crop(pixels[0], size)
        levels = np.clip(picture * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
        return np.ascontiguousarray(np.rint(levels).astype(np.uint8).transpose(1, 2, 0))

    def preview(self, latent: Floats, linear: bool = False) -> NDArray[np.uint8]:
        """Decode a latent shrunk to at most 8 cells a side, or map its cells where there is a map."""
        if linear and self._map is not None:
            check_finite("latent", float(latent.min()), float(latent.max()))
            return self._map.pixels(latent)
        if not isinstance(self._manifest.graphs["decoder"].inputs["latent"][1][2], str):
            # the graph knows only the height of the whole picture
            return self._picture(latent, self._decoder.decode)
        small = shrink(latent, -(-max(latent.shape[-2:]) // PREVIEW_CELLS))
        return self._picture(small, self._decoder.decode)

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int, int]:
        cell = self._manifest.cell
        return 1, self._manifest.latent_channels, plan.height // cell, plan.width // cell
