"""From a float model and prompts to what quantizing needs: smoothed weights, scales, what stays in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sana_edge.calib.clip import clip
from sana_edge.calib.report.report import Layer
from sana_edge.calib.sensitivity import (
    TARGET,
    Probe,
    Sensitivity,
    choose_kept,
    decoder_sensitivity,
    denoiser_sensitivity,
    predicted_error,
)
from sana_edge.calib.settings import Settings
from sana_edge.calib.smooth import Smoothed, smooth, smooth_decoder, target_weight
from sana_edge.calib.statistics import Statistics
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_decoder, quantize_denoiser
from sana_edge.progress import Progress


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


def calibrate_denoiser(
    denoiser: Denoiser,
    statistics: Statistics,
    probe: Probe,
    settings: Settings,
    *,
    progress: Progress,
    note: Callable[[str], None],
) -> Calibration:
    """Smooth a float denoiser, choose scales and what stays in 16 bit, and make the rest INT8, in place.

    Args:
        statistics: complete; those of its layers become the smoothed model's.
        probe: of the model as it was.
        note: is told where the goal of ``keep`` "auto" is missed.
    """
    smoothed = smooth(
        denoiser, statistics, alpha=settings.alpha, activations=settings.activations, progress=progress
    )
    scales = _scales(statistics, lambda name: target_weight(denoiser, name), denoiser=True)
    mode: dict[str, Any] = {"input_scales": scales, "static": settings.activations == "tensor"}
    measured = settings.keep != "none"
    found = denoiser_sensitivity(denoiser, probe, progress=progress, **mode) if measured else []
    kept = _chosen(found, settings, "denoiser's velocity", note)
    quantize_denoiser(denoiser, keep={_short(name) for name in kept}, **mode)
    return _calibration(
        smoothed, {f"denoiser.{name}": scale for name, scale in scales.items()}, kept, settings
    )


def calibrate_decoder(
    autoencoder: LatentDecoder,
    statistics: Statistics,
    probe: Probe,
    settings: Settings,
    *,
    progress: Progress,
    note: Callable[[str], None],
) -> Calibration:
    """The same for a decoder."""
    smoothed = smooth_decoder(autoencoder, statistics, alpha=settings.alpha, progress=progress)
    scales = _scales(statistics, lambda name: target_weight(autoencoder, name), denoiser=False)
    measured = settings.keep != "none"
    options: dict[str, Any] = {"input_scales": scales, "progress": progress}
    found = decoder_sensitivity(autoencoder, probe, **options) if measured else []
    kept = _chosen(found, settings, "decoder's picture", note)
    quantize_decoder(autoencoder, keep=set(kept), input_scales=scales)
    return _calibration(smoothed, scales, kept, settings)


def joined(denoiser: Calibration, decoder: Calibration, info: Mapping[str, Any]) -> Calibration:
    """Of both networks; ``info`` says what was observed."""
    return Calibration(
        scales={**decoder.scales, **denoiser.scales},
        kept=[*denoiser.kept, *decoder.kept],
        layers=[*denoiser.layers, *decoder.layers],
        info={**info, "smoothed": denoiser.info["smoothed"] + decoder.info["smoothed"]},
    )


def _calibration(
    smoothed: list[Smoothed], scales: dict[str, float], kept: list[str], settings: Settings
) -> Calibration:
    layers = [_layer(item, scales, kept, settings) for item in smoothed]
    return Calibration(scales, kept, layers, {"smoothed": sum(item.alpha > 0 for item in smoothed)})


def _scales(statistics: Statistics, weight: Callable[[str], Tensor], *, denoiser: bool) -> dict[str, float]:
    """Of the layers of one network, by the names that it has for them."""
    return {
        _short(name): clip(layer, weight=weight(_short(name)))
        for name, layer in statistics.layers.items()
        if name.startswith("denoiser.") == denoiser
    }


def _chosen(
    found: list[Sensitivity], settings: Settings, what: str, note: Callable[[str], None]
) -> list[str]:
    """What stays in 16 bit; tells where that is not enough for the goal."""
    kept = choose_kept(found, settings.keep)
    left = predicted_error(item for item in found if item.name not in kept)
    if settings.keep == "auto" and not left <= TARGET:
        note(
            f"keep-fp16 auto misses its goal, an error of {100 * TARGET:g} %: the {what} is expected to have "
            f"{100 * left:.3g} % with {len(kept)} of {len(found)} layers in 16 bit, the most that it keeps"
        )
    return kept


def _short(name: str) -> str:
    return name.removeprefix("denoiser.")


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
