"""One picture's way through the denoising steps, with one model and with another from the same noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sana_edge.image_metrics import psnr, ssim
from sana_edge.int8 import quant
from sana_edge.request.plan import Plan
from sana_edge.sampler import denoise
from sana_edge.torch_runtime.runtime import TorchRuntime

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What a model made of a plan.

    Attributes:
        latents: (S + 1, C, h, w) fp32 on the CPU: what the denoiser got at each step, and what was decoded.
        velocities: (S, C, h, w), guidance applied.
        timesteps: (S,), as the denoiser gets them.
        pixels: (H, W, 3) uint8; None until it is `decoded`.
    """

    plan: Plan
    latents: Tensor
    velocities: Tensor
    timesteps: Tensor
    pixels: Pixels | None = None


@dataclass(frozen=True, eq=False)
class Comparison:
    """A quantized model's picture beside the float model's.

    Attributes:
        velocity_errors: (S,) relative L2 errors of the velocity where both see the float model's latent: what
            each step adds by itself.
        latent_errors: (S,) relative L2 errors of the latent after each step, each model on its own way: what
            has added up.
        psnr: of the pictures, in dB; infinite for equal ones.
        ssim: of the pictures, 1 for equal ones.
        decoder_psnr: of the pictures that both decoders make of the float model's latent, in dB.
    """

    plan: Plan
    velocity_errors: list[float]
    latent_errors: list[float]
    psnr: float
    ssim: float
    decoder_psnr: float
    reference: Pixels
    picture: Pixels


@dataclass(frozen=True, eq=False)
class Retraced:
    """A quantized denoiser's own way, and its velocities' errors on another one's; see `Comparison`."""

    own: Trajectory
    velocity_errors: list[float]


def follow(runtime: TorchRuntime, plan: Plan, on_step: Callable[[], None] = lambda: None) -> Trajectory:
    """Make a picture from ``plan.seed`` as `sana_edge.Sana.stream` does, and keep what is on the way."""
    return decoded(runtime, denoised(runtime, plan, on_step))


@torch.inference_mode()
def denoised(runtime: TorchRuntime, plan: Plan, on_step: Callable[[], None] = lambda: None) -> Trajectory:
    """`follow` up to the picture: needs the denoiser alone."""
    context, _ = runtime.read(plan)
    sampler, tables = runtime.schedule(plan)
    steps = []
    for step in denoise(sampler, runtime.velocity(plan, tables, context), runtime.noise(plan)):
        steps.append(step)
        on_step()
    return Trajectory(
        plan=plan,
        latents=torch.cat([*(step.given for step in steps), steps[-1].x]).cpu(),
        velocities=torch.cat([step.velocity for step in steps]).cpu(),
        timesteps=torch.from_numpy(sampler.timesteps),
    )


@torch.inference_mode()
def decoded(runtime: TorchRuntime, trajectory: Trajectory) -> Trajectory:
    """With its picture: needs the decoder alone."""
    return replace(trajectory, pixels=runtime.decode(trajectory.latents[-1:].to(runtime.device)))


def compare(
    runtime: TorchRuntime, reference: Trajectory, on_step: Callable[[], None] = lambda: None
) -> Comparison:
    """Follow a float model's plan with a quantized one; ``on_step`` is called twice for each step."""
    return judged(runtime, reference, retraced(runtime, reference, on_step))


@torch.inference_mode()
def retraced(
    runtime: TorchRuntime, reference: Trajectory, on_step: Callable[[], None] = lambda: None
) -> Retraced:
    """`compare` up to the pictures: needs the denoiser alone."""
    plan = reference.plan
    context, _ = runtime.read(plan)
    _, tables = runtime.schedule(plan)
    velocity = runtime.velocity(plan, tables, context)
    latents, errors = reference.latents.to(runtime.device), []
    for i in range(plan.steps):
        found = velocity(latents[i : i + 1], i).cpu()
        errors.append(quant.relative_error(found, reference.velocities[i : i + 1]))
        on_step()
    return Retraced(denoised(runtime, plan, on_step), errors)


@torch.inference_mode()
def judged(runtime: TorchRuntime, reference: Trajectory, found: Retraced) -> Comparison:
    """The rest of `compare`: needs the quantized decoder alone."""
    picture, expected = decoded(runtime, found.own).pixels, reference.pixels
    assert picture is not None and expected is not None
    pairs = zip(found.own.latents[1:], reference.latents[1:], strict=True)
    return Comparison(
        plan=reference.plan,
        velocity_errors=found.velocity_errors,
        latent_errors=[quant.relative_error(*pair) for pair in pairs],
        psnr=psnr(picture, expected),
        ssim=ssim(picture, expected),
        decoder_psnr=psnr(runtime.decode(reference.latents[-1:].to(runtime.device)), expected),
        reference=expected,
        picture=picture,
    )
