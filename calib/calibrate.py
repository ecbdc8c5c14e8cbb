"""From a float model and prompts to what quantizing needs: smoothed weights, scales, what stays in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_edge.calib.clip import clip
from sana_edge.calib.observe import observe
from sana_edge.calib.prompts import PromptSet
from sana_edge.calib.report.report import Layer
from sana_edge.calib.sensitivity import Probe, choose_kept, decoder_sensitivity, denoiser_sensitivity, probe
from sana_edge.calib.settings import Settings
from sana_edge.calib.smooth import Smoothed, smooth, smooth_decoder, target_weight
from sana_edge.nets.quantize import quantize_decoder, quantize_denoiser
from sana_edge.progress import Progress
from sana_edge.torch_runtime.runtime import Stages

# prompts that sensitivity is measured on, each at its first, middle and last step
_PROBES = 4


@dataclass(frozen=True)
class Calibration:
    """What was found out; names are those of `Statistics`.

    Attributes:
        scales: one step of every layer's input.
        kept: layers that stay in 16 bit.
        layers: for the report.
        info: for the package, JSON values.
    """

    scales: dict[str, float]
    kept: list[str]
    layers: list[Layer]
    info: dict[str, Any]


def calibrate(
    stages: Stages,
    prompts: PromptSet,
    settings: Settings,
    *,
    folder: Path,
    progress: Progress,
    note: Callable[[str], None],
) -> Calibration:
    """Observe a float model, smooth it in place, and choose scales and what stays in 16 bit.

    Args:
        folder: where the observation keeps its state, to be resumed.
        note: is told of state that is used, or cannot be.

    Raises:
        SanaError: as `observe`.
    """
    statistics = observe(
        stages,
        prompts,
        steps=settings.steps,
        size=settings.size,
        guidance=settings.guidance,
        seed=settings.seed,
        folder=folder,
        progress=progress,
        note=note,
    )
    info = {**statistics.info, "checksum": statistics.checksum(), "alpha": settings.alpha}
    # of the model as it is, before it is smoothed
    given = probe(
        stages,
        prompts.prompts[:_PROBES],
        steps=settings.steps,
        guidance=settings.guidance,
        seed=settings.seed,
    )
    smoothed = [
        *smooth(
            stages.denoiser,
            statistics,
            alpha=settings.alpha,
            activations=settings.activations,
            progress=progress,
        ),
        *smooth_decoder(
            stages.autoencoder,
            statistics,
            alpha=settings.alpha,
            progress=progress,
        ),
    ]
    info["smoothed"] = sum(item.alpha > 0 for item in smoothed)
    scales = {name: clip(layer, weight=_weight(stages, name)) for name, layer in statistics.layers.items()}
    kept = _choose(stages, given, scales, settings, progress)
    layers = [_layer(item, scales, kept, settings) for item in smoothed]
    return Calibration(scales, kept, layers, info)


def quantize(stages: Stages, calibration: Calibration, settings: Settings) -> None:
    """Make the calibrated networks INT8, in place."""
    keep = set(calibration.kept)
    quantize_denoiser(
        stages.denoiser,
        keep=_part(dict.fromkeys(keep, 0.0), denoiser=True),
        input_scales=_part(calibration.scales, denoiser=True),
        static=settings.activations == "tensor",
    )
    quantize_decoder(
        stages.autoencoder,
        keep=_part(dict.fromkeys(keep, 0.0), denoiser=False),
        input_scales=_part(calibration.scales, denoiser=False),
    )


def _weight(stages: Stages, name: str) -> Tensor:
    if name.startswith("denoiser."):
        return target_weight(stages.denoiser, name.removeprefix("denoiser."))
    return target_weight(stages.autoencoder, name)


def _choose(
    stages: Stages, given: Probe, scales: dict[str, float], settings: Settings, progress: Progress
) -> list[str]:
    """What stays in 16 bit, of each network by its own errors."""
    denoiser = denoiser_sensitivity(
        stages.denoiser,
        given,
        input_scales=_part(scales, denoiser=True),
        static=settings.activations == "tensor",
        progress=progress,
    )
    decoder = decoder_sensitivity(
        stages.autoencoder,
        given,
        input_scales=_part(scales, denoiser=False),
        progress=progress,
    )
    return [*choose_kept(denoiser, settings.keep), *choose_kept(decoder, settings.keep)]


def _part(values: dict[str, float], *, denoiser: bool) -> dict[str, float]:
    """What belongs to the denoiser, or to the decoder, by the names that these have for their layers."""
    return {
        name.removeprefix("denoiser."): value
        for name, value in values.items()
        if name.startswith("denoiser.") == denoiser
    }


def _layer(item: Smoothed, scales: dict[str, float], kept: list[str], settings: Settings) -> Layer:
    """The report's line; the error is that of the scales that the package uses."""
    per_token = item.name.startswith("denoiser.") and settings.activations == "token"
    error = item.after.token if per_token else item.after.tensor
    return Layer(
        name=item.name,
        sqnr=math.inf if error == 0 else -20 * math.log10(error),
        kept=item.name in kept,
        alpha=item.alpha,
        reason=item.reason,
        input_scale=scales[item.name],
    )
