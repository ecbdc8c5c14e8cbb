"""Denoisers of the public models' shapes with random weights, for machines without the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.results import BASELINE, COMPILED, INT8, OURS
from harness.work import Loader, Stage, Work, guided, random_weights, weight_bytes
from sana_edge.bench.shapes import DENOISERS, random_latent
from sana_edge.config import DenoiserConfig
from sana_edge.errors import SanaError
from sana_edge.fused import backends
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.noise.schedules import make_sampler
from sana_edge.prompt import MAX_TOKENS
from sana_edge.sampler import denoise
from sana_edge.torch_runtime.device import DTYPES
from sana_edge.torch_runtime.load import store_in_16_bit
from sana_edge.torch_runtime.steps import make_predictor

GUIDANCE = 4.5


@dataclass(frozen=True, kw_only=True)
class DenoiserWork(Work):
    """Both predictions of a step with guidance, what is prepared for a schedule, and the loop of all steps.

    layers: the network is cut after so many; size: side of the picture in pixels; tokens: of the prompt, out
    of the 300 that diffusers computes, while the negative prompt is empty, one token; steps: of the schedule.
    """

    shapes: str
    layers: int
    size: int
    tokens: int
    steps: int

    @property
    def title(self) -> str:
        layers = f"{self.layers} of {DENOISERS[self.shapes].num_layers} layers"
        return (
            f"{self.shapes} denoiser, {layers}, {self.size}x{self.size}, guided, {self.tokens} tokens, "
            f"{self.dtype} on {self.device}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "all_layers": DENOISERS[self.shapes].num_layers}

    @property
    def stages(self) -> tuple[str, ...]:
        return ("context", "step", "loop")

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        # 1 % for one product of heavy-tailed inputs, those of the FFN's second. The tables here give every
        # layer a weight near 0.5 in the token stream: 2 % after 28; diffusers' initial values give 0.7 %.
        return {"step": 0.03}

    def limit(self, stage: str, name: str) -> float | None:
        # guidance and many steps magnify what the step is held to: still the same picture of noise
        return 0.5 if stage == "loop" else super().limit(stage, name)

    @property
    def config(self) -> DenoiserConfig:
        return replace(DENOISERS[self.shapes], num_layers=self.layers)

    def state(self) -> dict[str, Tensor]:
        """Weights by diffusers' names."""
        with torch.device("meta"):
            shapes = Denoiser(self.config).to_diffusers()
        return random_weights(shapes, self)

    def loaders(self) -> dict[str, Loader]:
        state = self.state()
        return {
            OURS: partial(_our_denoiser, self, state),
            INT8: partial(_our_denoiser, self, state, int8=True),
            BASELINE: partial(_diffusers_denoiser, self, state),
            COMPILED: partial(_diffusers_denoiser, self, state, compiled=True),
        }


def our_denoiser(work: DenoiserWork, state: Mapping[str, Tensor]) -> Denoiser:
    """In float."""
    denoiser = Denoiser.from_diffusers(work.config, state).requires_grad_(False).eval()
    # as with the public 1.0 weights, most of them trained in fp16
    denoiser.clamp = True
    return denoiser


def their_denoiser(work: DenoiserWork, state: Mapping[str, Tensor]) -> nn.Module:
    """diffusers' network."""
    from diffusers import SanaTransformer2DModel

    with torch.device("meta"):
        transformer: nn.Module = SanaTransformer2DModel(**asdict(work.config))
    transformer.load_state_dict(state, assign=True)
    return transformer.requires_grad_(False).eval()


def _our_denoiser(work: DenoiserWork, state: Mapping[str, Tensor], *, int8: bool = False) -> dict[str, Stage]:
    denoiser = our_denoiser(work, state)
    if int8:
        quantize_denoiser(denoiser)
        # as it is loaded from a package
        store_in_16_bit(denoiser)
        denoiser.to_compute(work.device, DTYPES[work.dtype])
    latent, groups, times = step_inputs(work)[0], text_groups(work), step_times(work)

    @torch.inference_mode()
    def context() -> None:
        denoiser.text_context(groups)
        denoiser.modulation(times)

    @torch.inference_mode()
    def step() -> Tensor:
        # before guidance, which would magnify differences by its factor
        return denoiser(torch.cat([latent] * 2), tables[work.steps // 2], texts)

    backend = backends.choose("auto", torch.device(work.device), work.dtype, int8)
    predictor = make_predictor(denoiser, backend.name, torch.device(work.device))

    @torch.inference_mode()
    def loop() -> Tensor:
        # as in a picture: recorded for the first prompt of a size, text and tables made for each
        read, schedule = denoiser.text_context(groups), denoiser.modulation(times)
        velocity, note = predictor.start(latent, schedule, read, GUIDANCE)
        if note:
            raise SanaError(note, "what is timed would not be what a picture takes")
        *_, last = denoise(make_sampler("flow-dpm", steps=work.steps), velocity, lambda: latent)
        return last.x

    with torch.inference_mode():
        texts, tables = denoiser.text_context(groups), denoiser.modulation(times)
    weights = weight_bytes(denoiser)
    return {"context": Stage(context, weights), "step": Stage(step, weights), "loop": Stage(loop, weights)}


def _diffusers_denoiser(
    work: DenoiserWork, state: Mapping[str, Tensor], *, compiled: bool = False
) -> dict[str, Stage]:
    from diffusers import DPMSolverMultistepScheduler

    transformer = their_denoiser(work, state)
    latent, captions, mask = step_inputs(work)
    weights = weight_bytes(transformer)
    network = torch.compile(transformer) if compiled else transformer
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )

    def predict(x: Tensor, time: Tensor) -> Tensor:
        predicted: Tensor = network(
            torch.cat([x] * 2).to(transformer.dtype),
            encoder_hidden_states=captions,
            encoder_attention_mask=mask.long(),
            timestep=time.expand(2),
            return_dict=False,
        )[0]
        return predicted

    @torch.no_grad()
    def step() -> Tensor:
        return predict(latent, step_times(work)[work.steps // 2])

    @torch.no_grad()
    def loop() -> Tensor:
        # as its pipeline does
        scheduler.set_timesteps(work.steps, device=work.device)
        x = latent
        for time in scheduler.timesteps:
            x = scheduler.step(guided(predict(x, time), GUIDANCE), time, x, return_dict=False)[0]
        return x

    return {"step": Stage(step, weights), "loop": Stage(loop, weights)}


def step_inputs(work: DenoiserWork) -> tuple[Tensor, Tensor, Tensor]:
    """Latent (1, C, h, w) fp32; captions (2, 300, C) and their mask (2, 300), the negative prompt first."""
    generator = torch.Generator().manual_seed(1)
    captions = torch.randn(2, MAX_TOKENS, work.config.caption_channels, generator=generator)
    mask = torch.arange(MAX_TOKENS) < torch.tensor([[1], [work.tokens]])
    return (
        random_latent(work.size, work.device),
        captions.to(work.device, DTYPES[work.dtype]),
        mask.to(work.device),
    )


def text_groups(work: DenoiserWork) -> list[TextFeatures]:
    """The negative prompt's features, one token, and the prompt's."""
    _, captions, mask = step_inputs(work)
    lengths = mask.sum(dim=1).tolist()
    return [TextFeatures(captions[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(lengths)]


def step_times(work: DenoiserWork) -> Tensor:
    """The schedule's timesteps, (S,) fp32."""
    return torch.from_numpy(make_sampler("flow-dpm", steps=work.steps).timesteps).to(work.device)
