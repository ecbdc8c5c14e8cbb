"""The public models' networks in full size with random weights, for machines without the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from contenders import BASELINE, COMPILED, INT8, OURS, Loader, Stage, Work, guided, weight_bytes
from torch import Tensor

from sana_edge import backends, tiling
from sana_edge.autoencoder import Autoencoder
from sana_edge.components import DTYPES, store_in_16_bit
from sana_edge.config import LATENT_CELL, AutoencoderConfig, DenoiserConfig
from sana_edge.denoiser import Denoiser
from sana_edge.errors import SanaError
from sana_edge.fused_decoder import fuse_decoder
from sana_edge.prediction import make_predictor
from sana_edge.quantized import decoder_targets, quantize_decoder, quantize_denoiser
from sana_edge.sampler import make_sampler
from sana_edge.text_encoder import MAX_TOKENS, TextFeatures
from sana_edge.weights import load_into

GUIDANCE = 4.5

BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

DENOISERS = {
    "0.6b": DenoiserConfig(
        num_layers=28,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "1.6b": DenoiserConfig(),
    # for tests
    "tiny": DenoiserConfig(
        num_layers=3,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
    ),
}
F32C32 = AutoencoderConfig(
    encoder_block_types=BLOCKS,
    decoder_block_types=BLOCKS,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
AUTOENCODERS = {
    "0.6b": F32C32,
    "1.6b": F32C32,
    "tiny": replace(
        F32C32,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        attention_head_dim=16,
    ),
}


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
    def loose(self) -> Mapping[str, float]:
        # guidance and many steps magnify what the step is held to: still the same picture of noise
        return {"loop": 0.5}

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        # 1 % for one product of heavy-tailed inputs, those of the FFN's second. The tables here give every
        # layer a weight near 0.5 in the token stream: 2 % after 28; diffusers' initial values give 0.7 %.
        return {"step": 0.03}

    @property
    def config(self) -> DenoiserConfig:
        return replace(DENOISERS[self.shapes], num_layers=self.layers)

    def loaders(self) -> dict[str, Loader]:
        with torch.device("meta"):
            shapes = Denoiser(self.config).to_diffusers()
        state = _random_weights(shapes, self)
        loaders = {
            OURS: partial(_our_denoiser, self, state),
            INT8: partial(_our_denoiser, self, state, int8=True),
            BASELINE: partial(_diffusers_denoiser, self, state),
        }
        if self.device == "cuda":
            loaders[COMPILED] = partial(_diffusers_denoiser, self, state, compiled=True)
        return loaders


@dataclass(frozen=True, kw_only=True)
class DecoderWork(Work):
    """The decoder of DC-AE. size: of the picture in pixels; tiled: whether diffusers decodes in its tiles."""

    shapes: str
    size: int
    tiled: bool

    @property
    def title(self) -> str:
        tiles = f"{BASELINE} in tiles, " if self.tiled else ""
        return f"{self.shapes} decoder, {self.size}x{self.size}, {tiles}{self.dtype} on {self.device}"

    @property
    def stages(self) -> tuple[str, ...]:
        return ("decode",)

    @property
    def unequal(self) -> tuple[str, ...]:
        # attention sees a tile only
        return ("decode",) if self.tiled else ()

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        # one scale for a whole map, in some 60 layers one after the other
        return {"decode": 0.1}

    def loaders(self) -> dict[str, Loader]:
        with torch.device("meta"):
            shapes = Autoencoder(AUTOENCODERS[self.shapes], encoder=False).state_dict()
        state = _random_weights(shapes, self)
        return {
            OURS: partial(_our_decoder, self, state),
            INT8: partial(_our_decoder, self, state, int8=True),
            BASELINE: partial(_diffusers_decoder, self, state),
        }


def _our_denoiser(work: DenoiserWork, state: Mapping[str, Tensor], *, int8: bool = False) -> dict[str, Stage]:
    denoiser = Denoiser.from_diffusers(work.config, state).requires_grad_(False).eval()
    # as with the public 1.0 weights, most of them trained in fp16
    denoiser.clamp = True
    if int8:
        quantize_denoiser(denoiser)
        # as it is loaded from a package
        store_in_16_bit(denoiser)
        denoiser.to_compute(work.device, DTYPES[work.dtype])
    latent, captions, mask = _inputs(work)
    lengths = mask.sum(dim=1).tolist()
    groups = [
        TextFeatures(captions[row : row + 1, :length], mask[row : row + 1, :length])
        for row, length in enumerate(lengths)
    ]
    times = _times(work)

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
        sampler, x = make_sampler("flow-dpm", steps=work.steps), latent
        for i in range(work.steps):
            x = sampler.step(x, velocity(x, i), i)
        return sampler.finish(x)

    with torch.inference_mode():
        texts, tables = denoiser.text_context(groups), denoiser.modulation(times)
    weights = weight_bytes(denoiser)
    return {"context": Stage(context, weights), "step": Stage(step, weights), "loop": Stage(loop, weights)}


def _diffusers_denoiser(
    work: DenoiserWork, state: Mapping[str, Tensor], *, compiled: bool = False
) -> dict[str, Stage]:
    from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel

    with torch.device("meta"):
        transformer = SanaTransformer2DModel(**asdict(work.config))
    transformer.load_state_dict(state, assign=True)
    transformer.requires_grad_(False).eval()
    latent, captions, mask = _inputs(work)
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
        return predict(latent, _times(work)[work.steps // 2])

    @torch.no_grad()
    def loop() -> Tensor:
        # as its pipeline does
        scheduler.set_timesteps(work.steps, device=work.device)
        x = latent
        for time in scheduler.timesteps:
            x = scheduler.step(guided(predict(x, time), GUIDANCE), time, x, return_dict=False)[0]
        return x

    return {"step": Stage(step, weights), "loop": Stage(loop, weights)}


def _our_decoder(work: DecoderWork, state: Mapping[str, Tensor], *, int8: bool = False) -> dict[str, Stage]:
    with torch.device("meta"):
        autoencoder = Autoencoder(AUTOENCODERS[work.shapes], encoder=False)
    load_into(autoencoder, state, where=work.title)
    if int8:
        # a CUDA kernel has no scale of its own for each map
        small = _latent(work)[..., :8, :8].to(DTYPES[work.dtype])
        quantize_decoder(
            autoencoder, input_scales=_input_scales(autoencoder, small) if _fuses(work) else None
        )
        store_in_16_bit(autoencoder)
    # the layout that the loader of a model folder gives the weights
    autoencoder.to(DTYPES[work.dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    autoencoder.requires_grad_(False).eval()
    latent = _latent(work).to(DTYPES[work.dtype])
    weights = weight_bytes(autoencoder)
    if int8 and _fuses(work):
        autoencoder = fuse_decoder(autoencoder)

    @torch.inference_mode()
    def decode() -> Tensor:
        return tiling.decode(autoencoder, latent)

    return {"decode": Stage(decode, weights)}


def _fuses(work: Work) -> bool:
    """Whether the runtime would fuse this decoder."""
    chosen = backends.choose("auto", torch.device(work.device), work.dtype, True)
    return chosen.name == "cuda" and DTYPES[work.dtype].itemsize == 2


@torch.inference_mode()
def _input_scales(autoencoder: Autoencoder, latent: Tensor) -> dict[str, float]:
    """Scales of all that can be INT8, as calibration on one latent finds them."""
    most: dict[str, Tensor] = {}
    layers = {name: autoencoder.get_submodule(name) for name in decoder_targets(autoencoder)}
    for name, layer in layers.items():

        def note(x: Tensor, name: str = name) -> None:
            most[name] = torch.maximum(most.get(name, x.new_zeros(())), x.abs().amax())

        layer.observer = note  # type: ignore[assignment]
    autoencoder.decode(latent)
    for layer in layers.values():
        layer.observer = None  # type: ignore[assignment]
    return {name: float(value) / 127 for name, value in most.items()}


def _diffusers_decoder(work: DecoderWork, state: Mapping[str, Tensor]) -> dict[str, Stage]:
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        autoencoder = AutoencoderDC(**asdict(AUTOENCODERS[work.shapes]))
    del autoencoder.encoder
    autoencoder.load_state_dict(state, assign=True)
    autoencoder.requires_grad_(False).eval()
    if work.tiled:
        autoencoder.enable_tiling()
    latent = _latent(work).to(DTYPES[work.dtype])

    @torch.no_grad()
    def decode() -> Tensor:
        pixels: Tensor = autoencoder.decode(latent, return_dict=False)[0]
        return pixels

    return {"decode": Stage(decode, weight_bytes(autoencoder))}


def _random_weights(shapes: Mapping[str, Tensor], work: Work) -> dict[str, Tensor]:
    """Normal weights that keep activations near 1, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in shapes.items():
        fan_in = like[0].numel() if like.ndim > 1 else 4
        tensor = torch.randn(like.shape, generator=generator) * (0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            tensor += 1
        state[name] = tensor.to(work.device, DTYPES[work.dtype])
    return state


def _inputs(work: DenoiserWork) -> tuple[Tensor, Tensor, Tensor]:
    """Latent (1, C, h, w) fp32; captions (2, 300, C) and their mask (2, 300), the negative prompt first."""
    generator = torch.Generator().manual_seed(1)
    captions = torch.randn(2, MAX_TOKENS, work.config.caption_channels, generator=generator)
    mask = torch.arange(MAX_TOKENS) < torch.tensor([[1], [work.tokens]])
    return _latent(work), captions.to(work.device, DTYPES[work.dtype]), mask.to(work.device)


def _latent(work: DenoiserWork | DecoderWork) -> Tensor:
    side = work.size // LATENT_CELL
    shape = (1, DenoiserConfig().in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(work.device)


def _times(work: DenoiserWork) -> Tensor:
    return torch.from_numpy(make_sampler("flow-dpm", steps=work.steps).timesteps).to(work.device)
