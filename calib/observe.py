"""Runs the float pipeline over a set of prompts and listens to the input of every layer to be quantized."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sana_edge.calib.listener import SAMPLE_ROWS, Listener, nothing, targets
from sana_edge.calib.prompts import PromptSet
from sana_edge.calib.statistics import Statistics, checksum
from sana_edge.calib.statistics_store import StatisticsStore
from sana_edge.memory import memory_errors
from sana_edge.progress import Progress, unseen
from sana_edge.request import Plan, Request
from sana_edge.sampler import denoise
from sana_edge.torch_runtime.runtime import Stages

logger = logging.getLogger("sana_edge")


def observe(
    stages: Stages,
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
        stages: a float model, in the dtype it will be used in.
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
    chosen = prompts if isinstance(prompts, PromptSet) else _prompt_set(prompts, note)
    request = Request(
        chosen.prompts[0],
        steps=steps,
        size=size,
        guidance=guidance,
        seed=seed,
        images=len(chosen.prompts),
        exact_size=size is not None,
    )
    plan = request.plan(stages.denoiser.config.native_size, stages.sampler.kind)
    stages.check_plan(plan)
    layers = targets(stages)
    statistics = Statistics(nothing(layers, plan.steps), _info(stages, chosen, plan))
    store = StatisticsStore(folder, statistics, note) if folder is not None else None
    if store is not None:
        statistics = store.load()
    listener = Listener(statistics)
    with memory_errors(f"{plan.width}x{plan.height}"), torch.no_grad(), listener.attached(layers):
        for number in range(statistics.info["observed"], len(chosen.prompts)):
            _observe_prompt(stages, plan, chosen.prompts, number, listener, progress)
            statistics.info["observed"] = number + 1
            if store is not None:
                store.save(statistics)
    return statistics


def _prompt_set(prompts: Sequence[str], note: Callable[[str], None]) -> PromptSet:
    chosen = PromptSet.of(prompts)
    for text in chosen.notes:
        note(text)
    return chosen


def _observe_prompt(
    stages: Stages,
    plan: Plan,
    prompts: Sequence[str],
    number: int,
    listener: Listener,
    progress: Progress,
) -> None:
    """The stages of one picture, as `sana_edge.Sana.stream` runs them."""
    # the empty negative prompt goes through cross_out here, once for all steps
    with listener.step(number, 0, sampled=False):
        context, _ = stages.read(dataclasses.replace(plan, prompt=prompts[number]))
    sampler, tables = stages.schedule(plan)
    predict = stages.velocity(plan, tables, context)

    def velocity(x: Tensor, i: int) -> Tensor:
        with listener.step(number, i):
            return predict(x, i)

    for i, step in enumerate(denoise(sampler, velocity, stages.noise(plan, number))):
        latent = step.x
        progress("observe", number * plan.steps + i + 1, len(prompts) * plan.steps)
    with listener.step(number, plan.steps):
        stages.decode(latent)


def _info(stages: Stages, prompts: PromptSet, plan: Plan) -> dict[str, Any]:
    weights = {f"denoiser.{name}": tensor for name, tensor in stages.denoiser.state_dict().items()}
    return {
        "model": stages.name,
        "model_checksum": checksum({**weights, **stages.autoencoder.state_dict()}),
        "dtype": stages.dtype,
        "prompt_set": prompts.name,
        "prompt_checksum": prompts.checksum,
        "prompts": len(prompts.prompts),
        "observed": 0,
        "steps": plan.steps,
        "size": [plan.width, plan.height],
        "guidance": plan.guidance,
        "seed": plan.seed,
        "sampler": plan.sampler,
        "flow_shift": stages.sampler.flow_shift,
        "sample_rows": SAMPLE_ROWS,
    }
