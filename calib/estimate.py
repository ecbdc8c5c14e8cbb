"""About how long a calibration will take on this machine: products to compute over products a second."""

from __future__ import annotations

import time

import torch

from sana_edge.calib.networks import RESIDENT
from sana_edge.calib.settings import Settings
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.quantize import decoder_targets, denoiser_targets
from sana_edge.request.plan import Plan
from sana_edge.torch_runtime.runtime import TorchRuntime

# tokens of a usual prompt, steps that sensitivity is measured on
_TOKENS, _PROBED = 60, 3
# small products, convolutions and what lies between them, against one large product
_EFFICIENCY = 0.4
# bytes a second of float weights that are read again
_READING = 1e9


def estimated_seconds(
    runtime: TorchRuntime, text_weights: int, settings: Settings, compared: int, plan: Plan, prompts: int
) -> float:
    """Seconds of a calibration with the report's pictures, within a factor of about two.

    Args:
        runtime: without weights.
        text_weights: how many the text encoder's layers have.
        compared: pictures that both models make.
        plan: of any picture.
        prompts: that are observed.
    """
    cells = plan.width * plan.height // runtime.autoencoder.config.spatial_compression**2
    # a compared picture is made by the float and the INT8 model, which also takes the float one's steps
    pictures, texts = prompts + 3 * compared, prompts + 2 * compared + 1
    weights = sum(weight.numel() for weight in runtime.denoiser.parameters())
    layers = len(denoiser_targets(runtime.denoiser))
    rows = 2 if plan.guided else 1
    steps = pictures * plan.steps * rows * cells + settings.probes * plan.steps * rows * settings.cells**2
    # a layer's trial starts at its block
    trials = layers * settings.probes * _PROBED * settings.cells**2 / 2
    decoded = pictures * cells
    decoded += len(decoder_targets(runtime.autoencoder)) * settings.probes * (settings.cells // 2) ** 2
    products = texts * _TOKENS * text_weights + (steps + trials) * weights
    products += decoded * _products_of_a_cell(runtime.autoencoder)
    read = texts * max(4 * text_weights - RESIDENT, 0)
    return products / _products_a_second() + read / _READING


def shown_time(seconds: float) -> str:
    """For people: "half a minute", "12 minutes", "3.5 hours"."""
    if seconds < 45:
        return "half a minute"
    return f"{max(round(seconds / 60), 1)} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def _products_of_a_cell(autoencoder: LatentDecoder) -> float:
    """Of the decoder for each latent cell: a weight of stage i is used at every place of its map."""
    return sum(
        weight.numel() * 4.0 ** autoencoder.doublings(name) for name, weight in autoencoder.named_parameters()
    )


def _products_a_second() -> float:
    a, b = torch.ones(512, 2048), torch.ones(2048, 2048)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return _EFFICIENCY * 512 * 2048 * 2048 / best
