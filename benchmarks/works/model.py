"""A whole model from its folder: both implementations load the same files and make the same picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.results import BASELINE, INT8, OURS
from harness.work import Loader, Stage, Work, guided, weight_bytes
from sana_edge import Sana
from sana_edge.config import DenoiserConfig, SamplerConfig
from sana_edge.errors import InvalidInput
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.prompt import CHI
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub
from sana_edge.store.folder import read_json
from sana_edge.store.package import is_package
from sana_edge.torch_runtime.device import DTYPES
from sana_edge.torch_runtime.runtime import TorchRuntime


@dataclass(frozen=True, kw_only=True)
class ModelWork(Work):
    """Prompt to picture.

    model: a name or folder that is on this machine; size: side in pixels, None for the native one.
    """

    model: str
    prompt: str
    size: int | None
    steps: int
    seed: int = 7

    @property
    def title(self) -> str:
        plan = self.plan()
        return f"{self.name}, {plan.width}x{plan.height}, {plan.steps} steps, {self.dtype} on {self.device}"

    @property
    def name(self) -> str:
        return hub.resolve(self.model, offline=True).name

    @property
    def facts(self) -> dict[str, Any]:
        # not the folder's path
        package = hub.resolve(self.model, int8=True, offline=True).name
        return {**super().facts, "model": self.name, "int8_model": package, "size": self.plan().width}

    @property
    def stages(self) -> tuple[str, ...]:
        return ("text-first", "text", "context", "step", "decode", "picture")

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        # a step: 1 % of each prediction; guidance takes 4.5 of one and -3.5 of the other, and independent
        # errors grow by the root of the sum of squares, 5.7. The decoder has one scale for a whole map in
        # each of its layers. The picture is not limited: 20 steps may lead elsewhere.
        return {"text-first": 0.05, "text": 0.05, "step": 0.06, "decode": 0.06}

    def limit(self, stage: str, name: str) -> float | None:
        # guidance and many steps magnify the rounding of 16 bits
        free = stage == "picture" and self.dtype != "fp32"
        return None if free else super().limit(stage, name)

    def loaders(self) -> dict[str, Loader]:
        return {
            OURS: partial(_our_stages, self),
            INT8: partial(_our_stages, self, int8=True),
            BASELINE: partial(_diffusers_stages, self),
        }

    def plan(self) -> Plan:
        """The settings with the model's defaults filled in.

        Raises: InvalidInput for a model or settings that cannot be measured.
        """
        folder = hub.resolve(self.model, offline=True).path
        if is_package(folder):
            raise InvalidInput(
                f"{folder.name} is INT8 already", "give the float model: it is measured in both"
            )
        config = DenoiserConfig.from_dict(read_json(folder / "transformer" / "config.json"))
        sampler = SamplerConfig.from_dict(read_json(folder / "scheduler" / "scheduler_config.json"))
        if sampler.kind == "scm":
            raise InvalidInput(
                f"{folder.name} is a Sprint model", "choose a model with Flow-DPM-Solver or Euler"
            )
        size = None if self.size is None else (self.size, self.size)
        request = Request(self.prompt, size=size, exact_size=True, steps=self.steps, seed=self.seed)
        return request.plan(config.native_size, sampler.kind)


class _Ours:
    @torch.inference_mode()
    def __init__(self, work: ModelWork, *, int8: bool) -> None:
        self.plan = plan = work.plan()
        found = hub.resolve(work.model, int8=int8, offline=True)
        device = torch.device(work.device)
        self.runtime = TorchRuntime.load(found, device=device, dtype=work.dtype, int8=int8, backend="auto")
        self.sana = Sana(self.runtime)
        self.groups = self._encoded(self.runtime.text_encoder)
        self.texts = self.runtime.denoiser.text_context(self.groups)
        self.sampler, self.tables = self.runtime.schedule(plan)
        self.noise = self.runtime.noise(plan)()

    @torch.inference_mode()
    def text_first(self) -> Tensor:
        # one that has not met the instruction yet
        known = self.runtime.text_encoder
        return _valid(self._encoded(TextEncoder(known._tokenizer, known._model)))

    @torch.inference_mode()
    def text(self) -> Tensor:
        return _valid(self._encoded(self.runtime.text_encoder))

    @torch.inference_mode()
    def context(self) -> None:
        self.runtime.denoiser.text_context(self.groups)
        self.runtime.schedule(self.plan)

    @torch.inference_mode()
    def step(self) -> Tensor:
        return self.runtime.velocity(self.plan, self.tables, self.texts)(self.noise, 0)

    @torch.inference_mode()
    def decode(self) -> NDArray[np.uint8]:
        return self.runtime.decode(self.noise)

    def picture(self) -> NDArray[np.uint8]:
        plan = self.plan
        size = (plan.width, plan.height)
        return self.sana.generate(plan.prompt, seed=plan.seed, size=size, steps=plan.steps).pixels

    def _encoded(self, encoder: TextEncoder) -> list[TextFeatures]:
        negative = encoder.encode([self.plan.negative_prompt], instruction=None)
        return [negative, encoder.encode([self.plan.prompt])]


class _Diffusers:
    @torch.no_grad()
    def __init__(self, work: ModelWork) -> None:
        from diffusers import SanaPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        self.plan = plan = work.plan()
        found = hub.resolve(work.model, offline=True)
        self.pipeline = pipeline = SanaPipeline.from_pretrained(
            found.path, variant=found.component_variant("transformer"), torch_dtype=DTYPES[work.dtype]
        ).to(work.device)
        if work.dtype == "fp16":
            # as here, and as diffusers' documentation wants it
            pipeline.text_encoder.to(torch.bfloat16)
            pipeline.vae.to(torch.bfloat16)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler.set_timesteps(plan.steps, device=work.device)
        self.time = pipeline.scheduler.timesteps[0]
        embeddings, mask, negative, negative_mask = self._encoded()
        self.embeddings, self.mask = torch.cat([negative, embeddings]), torch.cat([negative_mask, mask])
        cell = pipeline.vae_scale_factor
        shape = (1, pipeline.transformer.config.in_channels, plan.height // cell, plan.width // cell)
        self.noise = torch.randn(shape, generator=_generator(plan)).to(work.device)

    @torch.no_grad()
    def text(self) -> Tensor:
        embeddings, mask, negative, negative_mask = self._encoded()
        return torch.cat([negative[negative_mask.bool()], embeddings[mask.bool()]])

    @torch.no_grad()
    def step(self) -> Tensor:
        transformer = self.pipeline.transformer
        predicted = transformer(
            torch.cat([self.noise] * 2).to(transformer.dtype),
            encoder_hidden_states=self.embeddings.to(transformer.dtype),
            encoder_attention_mask=self.mask,
            timestep=self.time.expand(2) * transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return guided(predicted, self.plan.guidance)

    @torch.no_grad()
    def decode(self) -> NDArray[np.uint8]:
        vae = self.pipeline.vae
        pixels = vae.decode(self.noise.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return np.asarray(self.pipeline.image_processor.postprocess(pixels)[0])

    def picture(self) -> NDArray[np.uint8]:
        result = self.pipeline(
            self.plan.prompt,
            num_inference_steps=self.plan.steps,
            guidance_scale=self.plan.guidance,
            width=self.plan.width,
            height=self.plan.height,
            generator=_generator(self.plan),
            use_resolution_binning=False,
        )
        return np.asarray(result.images[0])

    def _encoded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings (1, 300, C) and mask (1, 300) of the prompt, then of the negative prompt."""
        encoded: tuple[Tensor, Tensor, Tensor, Tensor] = self.pipeline.encode_prompt(
            self.plan.prompt,
            negative_prompt=self.plan.negative_prompt,
            complex_human_instruction=list(CHI),
        )
        return encoded


def _our_stages(work: ModelWork, *, int8: bool = False) -> dict[str, Stage]:
    ours = _Ours(work, int8=int8)
    runtime = ours.runtime
    found = _stages(ours, runtime.text_encoder._model, runtime.denoiser, runtime.autoencoder)
    found["text-first"] = Stage(ours.text_first, found["text"].weights)
    found["context"] = Stage(ours.context, found["step"].weights)
    return found


def _diffusers_stages(work: ModelWork) -> dict[str, Stage]:
    theirs = _Diffusers(work)
    pipeline = theirs.pipeline
    # its encoder is not used
    found = _stages(theirs, pipeline.text_encoder, pipeline.transformer, pipeline.vae.decoder)
    return {**found, "text-first": found["text"]}


def _stages(loaded: _Ours | _Diffusers, *modules: nn.Module) -> dict[str, Stage]:
    """The stages that both have, with the weights of text encoder, denoiser and decoder."""
    weights = dict(zip(("text", "step", "decode"), map(weight_bytes, modules), strict=True))
    found = {name: Stage(getattr(loaded, name), count) for name, count in weights.items()}
    return {**found, "picture": Stage(loaded.picture, sum(weights.values()))}


def _valid(groups: list[TextFeatures]) -> Tensor:
    return torch.cat([group.embeddings[group.mask] for group in groups])


def _generator(plan: Plan) -> torch.Generator:
    return torch.Generator().manual_seed(plan.seed)
