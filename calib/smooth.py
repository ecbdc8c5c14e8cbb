"""SmoothQuant (arXiv 2211.10438): outliers of a layer's input move into its weight, for nothing at run time.

x · Wᵀ = (x / s) · (W s)ᵀ for any factors s of the input's channels: what makes x is divided by s (`fold`),
the columns of W are multiplied by it. Both are easier to round to 8 bits where s is well chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from sana_edge.calib import folding
from sana_edge.calib.clip import clip
from sana_edge.calib.statistics import LayerStatistics, Statistics
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.int8 import quant
from sana_edge.nets.autoencoder import LatentDecoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, denoiser_targets, stacked
from sana_edge.progress import Progress, unseen
from sana_edge.store.package import Activations

Alpha: TypeAlias = float | Literal["auto"]

# what "auto" chooses from
ALPHAS = tuple(step / 20 for step in range(20))

# of a layer's samples, and of its output channels, that errors are measured on: more tell the same
_ROWS = 128
_OUTPUTS = 512

# divided by more, weights would come near the smallest numbers of fp16
_LARGEST = 2.0**8


@dataclass(frozen=True)
class Errors:
    """Relative L2 error of a layer's output, with a calibrated scale per tensor and with one per token.

    Over sample rows that are weighted as `_Trial` says.
    """

    tensor: float
    token: float


@dataclass(frozen=True)
class Smoothed:
    """What was done to one layer; where ``alpha`` is 0 nothing was, and ``reason`` says why."""

    name: str
    alpha: float
    before: Errors
    after: Errors
    reason: str = ""


@torch.no_grad()
def smooth(
    denoiser: Denoiser,
    statistics: Statistics,
    *,
    alpha: Alpha = "auto",
    activations: Activations = "token",
    progress: Progress = unseen,
) -> list[Smoothed]:
    """Smooth a float denoiser in place; ``statistics`` become those of the smoothed model.

    In fp32 the model stays the same up to rounding. Weights in 16 bit are rounded once more.

    "auto" takes the alpha of `ALPHAS` with the smallest error of the layer's quantized output on the samples,
    which the rounding of its weight is part of. It is the error with the scales that the model will use: what
    is best for one scale per tensor moves more into the weights than is good for scales per token.

    Args:
        alpha: 0 (nothing) to 1 for every layer, or "auto".
        activations: "token" or "tensor", the scales to choose for.
        progress: called after each layer.

    Returns:
        One entry for each quantizable layer, in order.

    Raises:
        InvalidInput: alpha is neither, or the statistics lack a layer or are of another shape.
        SanaError: the model is quantized.
    """
    folds, targets = folding.denoiser_folds(denoiser), denoiser_targets(denoiser)
    return _smooth(denoiser, targets, folds, statistics, "denoiser.", alpha, activations, progress)


@torch.no_grad()
def smooth_decoder(
    autoencoder: LatentDecoder,
    statistics: Statistics,
    *,
    alpha: Alpha = "auto",
    progress: Progress = unseen,
) -> list[Smoothed]:
    """`smooth` for the decoder's layers, few of which can be; calibrated, they have one scale per tensor."""
    folds, targets = folding.decoder_folds(autoencoder), decoder_targets(autoencoder)
    return _smooth(autoencoder, targets, folds, statistics, "", alpha, "tensor", progress)


def divided(statistics: LayerStatistics, s: Tensor) -> LayerStatistics:
    """Statistics of x / s from those of x.

    A histogram of all channels cannot be divided channel by channel. The new one counts the samples, each
    value as often as it stands for values that were observed, and once the largest value of each channel: the
    body is as the samples have it, and static scales are chosen knowing how far the tails reach.
    """
    steps, channels = statistics.absmax.shape
    result = LayerStatistics.empty(steps, channels)
    for step in range(steps):
        rows = statistics.samples[statistics.sample_steps == step] / s
        weight = int(statistics.histogram[step].sum()) // max(rows.numel(), 1)
        result.update(step, statistics.absmax[step : step + 1] / s)
        if len(rows):
            result.update(step, rows, weight=max(weight, 1))
            result.add_samples(step, list(rows))
    return result


def target_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (out, in, ...) of a quantizable layer; of one that stands for several, all of theirs."""
    weights = [cast(Tensor, model.get_submodule(part).weight) for part in stacked(name)]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _smooth(
    model: nn.Module,
    targets: list[str],
    folds: Mapping[str, folding.Fold],
    statistics: Statistics,
    prefix: str,
    alpha: Alpha,
    activations: Activations,
    progress: Progress,
) -> list[Smoothed]:
    if alpha != "auto" and (type(alpha) not in (int, float) or not 0 <= alpha <= 1):
        raise InvalidInput(f"alpha is {alpha!r}", "choose auto or a number from 0 to 1; 0.5 is usual")
    for name in targets:
        _check(target_weight(model, name), prefix + name, statistics)
    results = []
    for name in targets:
        seen = statistics.layers[prefix + name]
        trial = _Trial(target_weight(model, name), seen)
        best = _choose(trial, alpha, activations) if name in folds else 0.0
        # the trial may look at the weight itself, which changes below
        errors = trial.errors(0.0), trial.errors(best)
        if best:
            s = trial.factors(best)
            weight = cast(Tensor, model.get_submodule(name).weight)
            weight.mul_(_columns(s, weight).to(weight.device))
            folds[name](s)
            statistics.layers[prefix + name] = divided(seen, s)
        reason = "" if best else _reason(name in folds, alpha)
        results.append(Smoothed(prefix + name, best, *errors, reason))
        progress(f"smooth {'denoiser' if prefix else 'decoder'}", len(results), len(targets))
    return results


def _choose(trial: _Trial, alpha: Alpha, activations: Activations) -> float:
    if alpha != "auto":
        return float(alpha)
    return min(ALPHAS, key=lambda alpha: getattr(trial.errors(alpha), activations))


def _reason(foldable: bool, alpha: Alpha) -> str:
    if not foldable:
        return "what makes its input cannot be divided: other layers read it, or it is not linear"
    return "no alpha made the error smaller" if alpha == "auto" else "alpha is 0"


class _Trial:
    """A layer's weight with rows of its input, to be smoothed and quantized in different ways.

    A convolution is measured as the linear layers that its taps are, with the weight's scale in common.
    Every step counts equally, relative to its own output, as in `clip`. So do the tokens of a step, but half
    way (rows are divided by the square root of their norm): as they are, the few with large outputs decide,
    and what is best for those makes the velocity of sana-tiny worse; as equals, those with hardly any do.
    """

    def __init__(self, weight: Tensor, statistics: LayerStatistics) -> None:
        self._statistics = statistics
        self._columns = _taps(weight.detach()).abs().amax(0).float().cpu()
        self._weight = _thinned(weight.detach(), _OUTPUTS).float().cpu()
        self._rows, steps = _thinned(statistics.samples, _ROWS), _thinned(statistics.sample_steps, _ROWS)
        self._expected = self._rows @ _taps(self._weight).T
        energies = self._expected.square().sum(1)
        of_step = torch.zeros(len(statistics.absmax)).index_add_(0, steps, energies)[steps]
        self._share = (energies * of_step).pow(-0.25).nan_to_num(posinf=0)[:, None]
        self._errors: dict[float, Errors] = {}

    def factors(self, alpha: float) -> Tensor:
        """s (C,) fp32; 1 for alpha 0, which leaves the layer as it is."""
        inputs = self._statistics.absmax.amax(0)
        if alpha == 0:
            return torch.ones_like(inputs)
        return quant.smoothing(inputs, self._columns, alpha).clamp(1 / _LARGEST, _LARGEST)

    def errors(self, alpha: float) -> Errors:
        """Of the layer smoothed with alpha, both sides quantized; measured once."""
        if alpha not in self._errors:
            s = self.factors(alpha)
            smoothed = self._weight * _columns(s, self._weight)
            weight = _taps(quant.dequantize_weight(*quant.quantize_weight(smoothed)))
            rows, statistics = self._rows / s, divided(self._statistics, s)
            scale = torch.tensor(clip(statistics, weight=smoothed))
            per_tensor = quant.quantize(rows, scale) * scale
            values, scales = quant.quantize_rows(rows)
            self._errors[alpha] = Errors(
                self._error(per_tensor @ weight.T), self._error(values * scales[:, None] @ weight.T)
            )
        return self._errors[alpha]

    def _error(self, output: Tensor) -> float:
        return quant.relative_error(output * self._share, self._expected * self._share)


def _check(weight: Tensor, key: str, statistics: Statistics) -> None:
    if not weight.is_floating_point():
        raise SanaError(f"{key} is quantized already", "smooth the float model")
    seen = statistics.layers.get(key)
    if seen is None or seen.absmax.shape[1] != weight.shape[1]:
        found = "missing" if seen is None else f"of {seen.absmax.shape[1]} channels"
        raise InvalidInput(
            f"the statistics of {key} are {found}, it has {weight.shape[1]}", "calibrate with this model"
        )


def _thinned(rows: Tensor, most: int) -> Tensor:
    return rows[:: max(-(-len(rows) // most), 1)]


def _taps(weight: Tensor) -> Tensor:
    """(out, in) as it is; (out, in, kh, kw) as (out · kh · kw, in)."""
    return weight.movedim(1, -1).reshape(-1, weight.shape[1])


def _columns(s: Tensor, weight: Tensor) -> Tensor:
    """s (in,) for a weight (out, in, ...)."""
    return s.view(-1, *[1] * (weight.ndim - 2))
