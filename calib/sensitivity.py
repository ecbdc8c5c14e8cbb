"""How much each layer costs when it alone is quantized, and which ones are worth their 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sana_edge.errors import InvalidInput
from sana_edge.int8 import quant
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import (
    decoder_targets,
    denoiser_targets,
    quantize_decoder,
    quantize_denoiser,
    stacked,
)
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.progress import Progress, unseen
from sana_edge.request.request import Request
from sana_edge.sampler import denoise
from sana_edge.torch_runtime.runtime import TorchRuntime

Budget = int | Literal["auto", "none"]
TARGET = 0.01
"""Total error that "auto" keeps below: 1 % of the velocity, or 40 dB PSNR of the picture."""

_LARGEST_SHARE = 0.1

# pixels are -1 to 1
_PEAK = 2.0


@dataclass(frozen=True)
class Sensitivity:
    """A layer, by its name in `Statistics`, and what it costs to quantize it.

    ``error`` of a denoiser's layer is the relative L2 error of the velocity, of a decoder's the picture's
    RMS error over its range, which is 10^(-PSNR / 20).
    """

    name: str
    error: float


@dataclass(frozen=True, eq=False)
class Probe:
    """What sensitivities are measured on.

    Attributes:
        latents: (K, C, h, w) fp32, the denoiser's input at some steps of every prompt.
        timesteps: (K,) of these rows, as the sampler gives them.
        guidance: for models that embed it.
        texts: a group for each prompt; the rows of a prompt follow each other.
        clean: (prompts, C, h, w), finished latents as `LatentDecoder.decode` takes them, cropped.
    """

    latents: Tensor
    timesteps: Tensor
    guidance: float | None
    texts: Sequence[TextFeatures]
    clean: Tensor


@torch.no_grad()
def probe(
    runtime: TorchRuntime,
    prompts: Sequence[str],
    *,
    cells: int = 8,
    crop: int = 4,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
) -> Probe:
    """Denoise small latents with the float model: the first, the middle and the last step of each.

    Args:
        cells: side of the latents: every layer costs a forward pass, and 8 make these affordable on a CPU.
        crop: side of what is decoded: a pass of the decoder costs as much as several of the denoiser.
        steps, guidance: of the schedule; the model's default if left out. The n-th prompt's seed is seed + n.

    Raises:
        InvalidInput: no prompts, or an option that the model cannot serve.
    """
    if not prompts:
        raise InvalidInput("there are no prompts to measure with", "give at least one")
    side = cells * runtime.autoencoder.config.spatial_compression
    embedded: float | None = None
    latents, clean, timesteps = [], [], []
    for number, prompt in enumerate(prompts):
        request = Request(
            prompt, size=(side, side), exact_size=True, steps=steps, guidance=guidance, seed=seed + number
        )
        plan = request.plan(runtime.denoiser.config.native_size, runtime.sampler.kind)
        context, _ = runtime.read(plan)
        sampler, tables = runtime.schedule(plan)
        velocity = runtime.velocity(plan, tables, context)
        for i, step in enumerate(denoise(sampler, velocity, runtime.noise(plan))):
            if i in (0, plan.steps // 2, plan.steps - 1):
                latents.append(step.given)
                timesteps.append(float(sampler.timesteps[i]))
        clean.append(_cropped(step.x, crop) / runtime.autoencoder.config.scaling_factor)
        embedded = plan.guidance if runtime.denoiser.config.guidance_embeds else None
    return Probe(
        torch.cat(latents),
        torch.tensor(timesteps, device=runtime.device),
        embedded,
        [runtime.text_encoder.encode([prompt]) for prompt in prompts],
        torch.cat(clean),
    )


@torch.no_grad()
def denoiser_sensitivity(
    denoiser: Denoiser,
    probe: Probe,
    *,
    input_scales: Mapping[str, float] | None = None,
    static: bool = False,
    progress: Progress = unseen,
) -> list[Sensitivity]:
    """Error of the velocity when one layer is quantized, for each layer in the order of their use.

    Every row of the probe counts equally. The texts, and what comes before the layer's block, are computed
    once, in float. The denoiser
    is as it was after each layer, also where ``progress`` raises an exception.

    Args:
        input_scales, static: as `sana_edge.nets.quantize.quantize_denoiser` takes them.

    Raises:
        CheckpointError: a weight has NaN or infinite values.
    """
    names = denoiser_targets(denoiser)
    modulation = denoiser.modulation(probe.timesteps, probe.guidance)
    context = denoiser.text_context(probe.texts)
    inputs: list[Tensor] = []
    with _recorded(denoiser.blocks, inputs):
        expected = denoiser(probe.latents, modulation, context)
    results = []
    for name in names:
        with _alone(denoiser, name, names, quantize_denoiser, input_scales, static=static):
            index = int(name.split(".")[1])
            with _given(denoiser, index, inputs[index]):
                velocity = denoiser(probe.latents, modulation, context)
        results.append(Sensitivity(f"denoiser.{name}", velocity_error(velocity, expected)))
        progress("try layers of the denoiser", len(results), len(names))
    return results


@torch.no_grad()
def decoder_sensitivity(
    autoencoder: LatentDecoder,
    probe: Probe,
    *,
    input_scales: Mapping[str, float] | None = None,
    progress: Progress = unseen,
) -> list[Sensitivity]:
    """The same for the picture, clipped to its range, and the decoder's layers."""
    names = decoder_targets(autoencoder)
    latent = probe.clean.to(autoencoder.dtype)
    expected = autoencoder.decode(latent)
    results = []
    for name in names:
        with _alone(autoencoder, name, names, quantize_decoder, input_scales):
            picture = autoencoder.decode(latent)
        results.append(Sensitivity(name, picture_error(picture, expected)))
        progress("try layers of the decoder", len(results), len(names))
    return results


def velocity_error(velocity: Tensor, expected: Tensor) -> float:
    """Relative L2 error per row (K, ...), root mean square over the rows."""
    errors = [quant.relative_error(*rows) for rows in zip(velocity, expected, strict=True)]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def picture_error(picture: Tensor, expected: Tensor) -> float:
    """RMS error over the range of pictures, both -1 to 1 and clipped to it: 10^(-PSNR / 20)."""
    difference = picture.float().clamp(-1, 1) - expected.float().clamp(-1, 1)
    return float(difference.square().mean().sqrt()) / _PEAK


def predicted_error(sensitivities: Iterable[Sensitivity]) -> float:
    """Of a network with all of these layers quantized: rounding errors are independent, their squares add."""
    return math.sqrt(sum(item.error**2 for item in sensitivities))


def choose_kept(sensitivities: Sequence[Sensitivity], budget: Budget, *, target: float = TARGET) -> list[str]:
    """Names of the layers of one network that stay in 16 bit, in the network's order.

    Args:
        sensitivities: of one network: errors of denoiser and decoder do not compare.
        budget: "none"; a number, of the worst layers; or "auto", the fewest with which `predicted_error` of
            the others is at most ``target``, yet no more than a tenth of the layers.

    Raises:
        InvalidInput: another budget.
    """
    # a layer that makes NaN is the worst
    worst = sorted(sensitivities, key=lambda item: math.inf if math.isnan(item.error) else item.error)[::-1]
    if budget == "auto":
        count, most = 0, math.floor(_LARGEST_SHARE * len(worst))
        while count < most and not predicted_error(worst[count:]) <= target:
            count += 1
    elif budget == "none":
        count = 0
    elif type(budget) is int and budget >= 0:
        count = budget
    else:
        raise InvalidInput(f"layers to keep are {budget!r}", "choose auto, none or a number from 0")
    kept = {item.name for item in worst[:count]}
    return [item.name for item in sensitivities if item.name in kept]


def _cropped(latent: Tensor, size: int) -> Tensor:
    top, left = (max(side - size, 0) // 2 for side in latent.shape[2:])
    return latent[:, :, top : top + size, left : left + size]


class _Given(nn.Module):
    """In place of a block: hands on what the blocks so far make."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, *_: object) -> Tensor:
        return self.x.clone()


@contextmanager
def _recorded(blocks: Iterable[nn.Module], inputs: list[Tensor]) -> Iterator[None]:
    """Inside, the token stream before each block is appended to ``inputs``."""

    def record(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0].clone())

    hooks = [block.register_forward_pre_hook(record) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _given(denoiser: Denoiser, index: int, x: Tensor) -> Iterator[None]:
    """Inside, the blocks before ``index`` compute nothing; x is what they make."""
    blocks = denoiser.blocks
    try:
        denoiser.blocks = nn.ModuleList([*(_Given(x) for _ in range(index)), *list(blocks)[index:]])
        yield
    finally:
        denoiser.blocks = blocks


@contextmanager
def _alone(
    model: nn.Module,
    name: str,
    names: Collection[str],
    quantize: Callable[..., None],
    input_scales: Mapping[str, float] | None,
    **mode: bool,
) -> Iterator[None]:
    """Inside, one layer of a float model is quantized."""
    before = {part: model.get_submodule(part) for part in stacked(name)}
    scale = {name: input_scales[name]} if input_scales and name in input_scales else None
    try:
        quantize(model, keep=set(names) - {name}, input_scales=scale, **mode)
        yield
    finally:
        for part, layer in before.items():
            model.set_submodule(part, layer)
