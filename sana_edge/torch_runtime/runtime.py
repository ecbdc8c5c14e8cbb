"""What a model does for a picture, on torch: each part of the way from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sana_edge.decoding import PREVIEW_CELLS, check_finite
from sana_edge.nets.denoiser import Modulation
from sana_edge.nets.text_context import TextContext, join_texts
from sana_edge.noise.schedules import sampler_of
from sana_edge.noise.variations import varied
from sana_edge.progress import Progress
from sana_edge.prompt import reading_notes, texts_of
from sana_edge.request.plan import Plan
from sana_edge.sampler import Origin, Sampler, guide
from sana_edge.torch_runtime import decoding
from sana_edge.torch_runtime.device import full_precision, torch_threads
from sana_edge.torch_runtime.encoding import encode
from sana_edge.torch_runtime.model import TorchModel
from sana_edge.torch_runtime.steps import Velocity

IN_TURN = "memory is short: text encoder, denoiser and decoder are loaded in turn, for each picture"


@dataclass(frozen=True, eq=False)
class TorchRuntime(TorchModel):
    """What turns a prompt into a picture, one method for each part of the way.

    Latents are (1, C, h, w) fp32 on ``device``.
    """

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Be inside of it for all work on a picture; the caller's own grad mode is left alone."""
        exact = full_precision() if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), exact, torch_threads(self.threads):
            yield

    def synchronize(self) -> None:
        """Wait for what was queued."""
        if self.device.type == "cuda":
            # not the device, which another model may be recording on
            torch.cuda.current_stream(self.device).synchronize()

    def mark(self) -> Callable[[], None] | None:
        """What waits for all that was queued until now; None where nothing is queued."""
        if self.device.type != "cuda":
            return None
        # the host sleeps meanwhile
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        wait: Callable[[], None] = event.synchronize
        return wait

    def check_plan(self, plan: Plan, count: int = 1) -> None:
        """See that pictures fit into the memory that is free, where that is known: `Memory.check`."""
        self.memory.check(plan, count)

    def read(self, plan: Plan) -> tuple[TextContext, tuple[str, ...]]:
        """Encode the prompt, and the negative one where it is used; say what was cut or ignored."""
        texts = texts_of(plan)
        if self.texts is not None:
            # others make room
            self.texts.forget(texts)
        encoder = self.texts or self.networks.text
        groups = [encoder.encode([prompt], instruction=instruction) for prompt, instruction in texts]
        notes = reading_notes(plan, encoder, self.domain, self.name)
        notes = (*notes, encoder.note) if encoder.note else notes
        # which may have to go for the denoiser
        del encoder
        if self.texts is not None:
            context = self.texts.context(texts, groups, lambda: self.networks.denoiser)
        else:
            context = self.networks.denoiser.text_context(groups)
        return context, (*self.notes, *notes)

    def schedule(self, plan: Plan) -> tuple[Sampler, Modulation]:
        """Make the sampler, and the denoiser's modulation tables for all of its steps."""
        sampler = sampler_of(self.sampler, plan.sampler, plan.steps, plan.flow_shift, plan.skip)
        embedded = plan.guidance if self.facts.denoiser.guidance_embeds else None
        timesteps = torch.from_numpy(sampler.timesteps).to(self.device)
        return sampler, self.networks.denoiser.modulation(timesteps, embedded)

    def origin(self, plan: Plan) -> Origin[Tensor]:
        """Encode the plan's image, with an encoder that is loaded for the first one.

        Raises:
            InvalidInput: the model has no encoder.
            OutOfMemory: it does not fit, even in strips.
        """
        assert plan.init is not None
        encoder, drawn = self.networks.encoder, (plan.width, plan.height)
        weight = next(encoder.parameters())
        pixels = torch.from_numpy(plan.init.at(drawn)).to(weight.device, weight.dtype)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        latent = encode(encoder, pixels, memory_limit=self.memory.free()).float()
        cells = plan.init.cells(drawn, self.facts.decoder.spatial_compression)
        mask = None if cells is None else torch.from_numpy(cells).to(self.device)
        return Origin(latent * encoder.scaling_factor, mask)

    def noise(self, plan: Plan, picture: int = 0) -> Callable[[], Tensor]:
        """What draws N(0, 1) for one of the plan's pictures, as diffusers does for a generator on the CPU.

        A generator of its own, on the CPU, makes a seed the same picture alone and on every device.
        """
        one, shape = plan.picture(picture), self._latent_shape(plan)

        def source(seed: int) -> Callable[[], NDArray[np.float32]]:
            generator = torch.Generator().manual_seed(seed)
            return lambda: torch.randn(shape, generator=generator).numpy()

        draw = varied(source, one.seed, one.variation)
        return lambda: self._sent(draw())

    def _sent(self, array: NDArray[np.float32]) -> Tensor:
        """An array on the device, without waiting for what was queued."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def noises(self, plans: Sequence[Plan]) -> Callable[[], Tensor]:
        """`noise` of a batch, a row for each plan: what each of them gets alone."""
        sources = [self.noise(plan) for plan in plans]
        return lambda: torch.cat([draw() for draw in sources])

    def join(self, contexts: Sequence[TextContext]) -> TextContext:
        """The texts of a batch.

        Raises:
            InvalidInput: some have one token and others several.
        """
        return join_texts(contexts)

    def predict(
        self, plan: Plan, tables: Modulation, context: TextContext, count: int = 1
    ) -> tuple[Velocity, tuple[str, ...]]:
        """Make ready for the plan's steps, until another plan is; say what stood in the way of a graph.

        Args:
            count: latents of the batch, whose texts are the context's.
        """
        latent = torch.zeros((count, *self._latent_shape(plan)[1:]), device=self.device)
        guidance = plan.guidance if plan.guided else None
        networks = self.networks
        started, note = networks.predictor.start(latent, tables, context, guidance)
        notes = (note,) if note else ()
        if not networks.in_turn:
            return started, notes
        notes = (*notes, IN_TURN)
        networks.velocity = started
        # a name here would keep the denoiser
        del started

        def velocity(x: Tensor, i: int) -> Tensor:
            # a picture may have been decoded meanwhile
            if networks.velocity is None:
                networks.velocity, _ = networks.predictor.start(latent, tables, context, guidance)
            return networks.velocity(x, i)

        return velocity, notes

    def release(self) -> None:
        """Let go of memory that can be had again: after an error, everything that was not loaded."""
        if self.texts is not None:
            self.texts.forget()
        self.networks.release()
        if self.device.type == "cuda":
            # which torch refuses after a failed capture
            with suppress(RuntimeError):
                torch.cuda.empty_cache()

    def close(self) -> None:
        """Let go of what was recorded; the networks go with the last reference to them."""
        self.release()

    def velocity(self, plan: Plan, tables: Modulation, context: TextContext) -> Velocity:
        """`predict` with the denoiser as it is: where calibration listens."""

        def velocity(x: Tensor, i: int) -> Tensor:
            predicted: Tensor = self.denoiser(torch.cat([x, x]) if plan.guided else x, tables[i], context)
            return guide(predicted.chunk(2), plan.guidance) if plan.guided else predicted

        return velocity

    def decode(
        self,
        latent: Tensor,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
        *,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]:
        """Turn a latent into (H, W, 3) uint8: `decoding.decode`."""
        return decoding.decode(
            self.networks,
            self.memory,
            latent,
            size,
            on_progress,
            tile=tile,
            on_tiled=on_tiled,
            release=self.release if self.device.type == "cuda" else None,
        )

    @torch.inference_mode()
    def preview(self, latent: Tensor, linear: bool = False) -> NDArray[np.uint8]:
        """Decode a latent shrunk to at most 8 cells a side, or map its cells where there is a map."""
        if linear and self.preview_map is not None:
            check_finite("latent", *map(float, latent.aminmax()))
            return self.preview_map.pixels(latent.float().cpu().numpy())
        factor = -(-max(latent.shape[-2:]) // PREVIEW_CELLS)
        return self.decode(F.avg_pool2d(latent, factor, ceil_mode=True))

    def _latent_shape(self, plan: Plan) -> tuple[int, int, int, int]:
        cell = self.facts.decoder.spatial_compression
        return 1, self.facts.denoiser.in_channels, plan.height // cell, plan.width // cell
