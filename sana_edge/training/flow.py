"""Rectified flow (arXiv 2410.10629, 3.2): x_t = (1 - sigma) x_0 + sigma noise, velocity noise - x_0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# the model's timestep is sigma times this
TIMESTEPS = 1000


@dataclass(frozen=True)
class Noised:
    """A batch as the denoiser gets it, and what it is to predict; all fp32, x_t and target (B, C, h, w)."""

    x_t: Tensor
    timesteps: Tensor
    target: Tensor


def shifted(u: Tensor, shift: float) -> Tensor:
    """sigma = s u / (1 + (s - 1) u), as the sampler's schedule is."""
    return shift * u / (1 + (shift - 1) * u)


def noised(clean: Tensor, generators: list[torch.Generator], shift: float) -> Noised:
    """Noise a scaled latent (B, C, h, w) fp32: sigma is logit-normal (mean 0, deviation 1), then shifted.

    Each row draws from its own CPU generator, so that it does not matter who computes it.
    """
    u = torch.stack([torch.randn((), generator=g) for g in generators]).sigmoid()
    noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean.device)
    sigma = shifted(u, shift).to(clean.device)
    level = sigma[:, None, None, None]
    return Noised((1 - level) * clean + level * noise, TIMESTEPS * sigma, noise - clean)


def loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean square error over all elements, fp32."""
    return (velocity.float() - target).square().mean()
