"""Runs the float pipeline over a set of prompts and listens to the input of every layer to be quantized."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_edge.calib.listener import SAMPLE_ROWS, Listener, nothing, targets
from sana_edge.calib.prompts import PromptSet
from sana_edge.calib.statistics import Statistics, checksum
from sana_edge.calib.statistics_store import StatisticsStore
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.progress import Progress, unseen
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.sampler import denoise
from sana_edge.system.memory import memory_errors
from sana_edge.torch_runtime.runtime import TorchRuntime

logger = logging.getLogger("sana_edge")


def observe(
    runtime: TorchRuntime,
    prompts: PromptSet | Sequence[str],
    *,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress = unseen,
    note: Callable[[str], None] = logger.warning,
) -> Statistics:
    """Make a picture of each prompt and collect the statistics of all denoising steps and of the decoder.

    The n-th prompt has the noise of seed + n. After each prompt the statistics so far are stored in
    ``folder``, in a file of its own for these weights, prompts and options. The same call after an
    interruption goes on behind the last finished prompt, and ends with the same bits as without it, given
    the same machine and threads; after the end, it returns what is stored.

    Args:
        runtime: a float model, in the dtype it will be used in.
        steps: the model's default if left out, and so are ``size`` (width, height) and ``guidance``.
        folder: made if it is missing; None stores nothing.
        progress: called after each denoising step of all; an exception from it ends the observation.
        note: is told of stored statistics that are used, or cannot be.

    Returns:
        Statistics of every target; ``info`` has model, model_checksum (of the weights of denoiser and
        decoder), dtype, prompt_set, prompt_checksum, prompts (how many), observed (how many of them), steps,
        size, guidance, seed, sampler, flow_shift and sample_rows.

    Raises:
        InvalidInput: an option that the model cannot serve, or no prompts.
        OutOfMemory: the pictures do not fit.
        SanaError: a layer's input is not finite (the message names layer, step and prompt), or ``folder``
            cannot be written.
    """
    observation = Observation(
        runtime,
        prompts if isinstance(prompts, PromptSet) else _prompt_set(prompts, note),
        weights_checksum(runtime.denoiser, runtime.autoencoder),
        steps=steps,
        size=size,
        guidance=guidance,
        seed=seed,
        folder=folder,
        progress=progress,
        note=note,
    )
    observation.denoise(runtime)
    observation.decode(runtime)
    return observation.statistics


class Observation:
    """`observe` network after network, so that one of them needs to be in memory at a time.

    Args:
        runtime: whose networks need no weights here.
        weights: `weights_checksum` of them. The other arguments and errors are those of `observe`.

    Attributes:
        statistics: so far; complete after `decode`.
    """

    def __init__(
        self,
        runtime: TorchRuntime,
        prompts: PromptSet,
        weights: str,
        *,
        steps: int | None,
        size: tuple[int, int] | None,
        guidance: float | None,
        seed: int,
        folder: Path | None,
        progress: Progress,
        note: Callable[[str], None],
    ) -> None:
        self._prompts, self._progress = prompts.prompts, progress
        request = Request(
            prompts.prompts[0],
            steps=steps,
            size=size,
            guidance=guidance,
            seed=seed,
            images=len(prompts.prompts),
            exact_size=size is not None,
        )
        self._plan = plan = request.plan(runtime.denoiser.config.native_size, runtime.sampler.kind)
        runtime.check_plan(plan)
        info = _info(runtime, prompts, plan, weights)
        self.statistics = Statistics(nothing(targets(runtime), plan.steps), info)
        self._store = StatisticsStore(folder, self.statistics, note) if folder is not None else None
        if self._store is not None:
            self.statistics = self._store.load()
        self._listener = Listener(self.statistics)

    def denoise(self, runtime: TorchRuntime) -> None:
        """All prompts' steps: needs the denoiser alone. What is to be decoded stays with the statistics."""
        with self._listening(runtime):
            for number in range(self.statistics.info["observed"], len(self._prompts)):
                self.statistics.latents.append(self._denoise(runtime, number).cpu())
                self.statistics.info["observed"] = number + 1
                self._save()

    def decode(self, runtime: TorchRuntime) -> None:
        """All prompts' pictures: needs the decoder alone."""
        latents, count = self.statistics.latents, len(self._prompts)
        with self._listening(runtime):
            while latents:
                number = count - len(latents)
                with self._listener.step(number, self._plan.steps):
                    runtime.decode(latents[0].to(runtime.device))
                del latents[0]
                self._progress("observe the decoder", number + 1, count)
                self._save()

    def _denoise(self, runtime: TorchRuntime, number: int) -> Tensor:
        """The stages of one picture, as `sana_edge.Sana.stream` runs them, up to its latent."""
        plan = self._plan
        # the empty negative prompt goes through cross_out here, once for all steps
        with self._listener.step(number, 0, sampled=False):
            context, _ = runtime.read(dataclasses.replace(plan, prompt=self._prompts[number]))
        sampler, tables = runtime.schedule(plan)
        predict = runtime.velocity(plan, tables, context)

        def velocity(x: Tensor, i: int) -> Tensor:
            with self._listener.step(number, i):
                return predict(x, i)

        for i, step in enumerate(denoise(sampler, velocity, runtime.noise(plan, number))):
            latent = step.x
            self._progress("observe", number * plan.steps + i + 1, len(self._prompts) * plan.steps)
        return latent

    @contextmanager
    def _listening(self, runtime: TorchRuntime) -> Iterator[None]:
        size = f"{self._plan.width}x{self._plan.height}"
        with memory_errors(size), torch.no_grad(), self._listener.attached(targets(runtime)):
            yield

    def _save(self) -> None:
        if self._store is not None:
            self._store.save(self.statistics)


def _prompt_set(prompts: Sequence[str], note: Callable[[str], None]) -> PromptSet:
    chosen = PromptSet.of(prompts)
    for text in chosen.notes:
        note(text)
    return chosen


def weights_checksum(*networks: Denoiser | LatentDecoder) -> str:
    """Of a denoiser's and a decoder's weights, in any order."""
    return checksum({name: tensor for network in networks for name, tensor in named_weights(network)})


def named_weights(network: Denoiser | LatentDecoder) -> Iterator[tuple[str, Tensor]]:
    """A network's tensors by the names that they have in a model's checksum."""
    prefix = "denoiser." if isinstance(network, Denoiser) else ""
    return ((f"{prefix}{name}", tensor) for name, tensor in network.state_dict().items())


def _info(runtime: TorchRuntime, prompts: PromptSet, plan: Plan, weights: str) -> dict[str, Any]:
    return {
        "model": runtime.name,
        "model_checksum": weights,
        "dtype": runtime.dtype,
        "prompt_set": prompts.name,
        "prompt_checksum": prompts.checksum,
        "prompts": len(prompts.prompts),
        "observed": 0,
        "steps": plan.steps,
        "size": [plan.width, plan.height],
        "guidance": plan.guidance,
        "seed": plan.seed,
        "sampler": plan.sampler,
        "flow_shift": runtime.sampler.flow_shift,
        "sample_rows": SAMPLE_ROWS,
    }
