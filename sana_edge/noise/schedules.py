"""Noise schedules and what their steps amount to: Flow-DPM-Solver++ (2M), Flow-Euler and Sprint's SCM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sana_edge.config import SamplerConfig, SamplerKind
from sana_edge.errors import InvalidInput
from sana_edge.sampler import Sampler, StepCoefficients

# Sprint's angles in radians: a little above pi/2, and the middle point of its two-step schedule
SCM_START = 1.57080
SCM_MIDDLE = 1.3

_Number = TypeVar("_Number", float, NDArray[np.float64])


def make_sampler(
    kind: SamplerKind,
    *,
    steps: int,
    skip: int = 0,
    flow_shift: float = 3.0,
    num_train_timesteps: int = 1000,
    sigma_data: float = 0.5,
) -> Sampler:
    """Return the sampler that diffusers' schedulers and Sana pipelines amount to.

    Args:
        kind: "flow-dpm" (DPM-Solver++ 2M, arXiv 2211.01095, on the rectified flow of arXiv 2410.10629
            algorithm 1), "flow-euler", or "scm" (arXiv 2503.09641, for Sprint checkpoints only).
        steps: number of denoiser calls from noise to picture, 1 to ``num_train_timesteps``.
        skip: how many of them are left out at the start, for a latent that is there already.
        flow_shift: s in sigma = s u / (1 + (s - 1) u); larger spends more steps on noise. Flow kinds only.
        sigma_data: standard deviation of the data in scm's parametrisation.

    Raises:
        InvalidInput: unknown kind, or ``steps`` or ``flow_shift`` out of range.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise InvalidInput(
            f"steps is {steps}", f"choose 1 to {num_train_timesteps}; 20 is usual, 2 for Sprint"
        )
    if not 0 <= skip < steps:
        raise InvalidInput(f"{skip} of {steps} steps are left out", "one must be taken")
    if not 0.01 <= flow_shift <= 100:
        raise InvalidInput(f"flow shift is {flow_shift}", "choose 0.01 to 100; 3.0 is usual")
    if kind == "flow-dpm":
        return _flow_dpm(steps, skip, flow_shift, num_train_timesteps)
    if kind == "flow-euler":
        return _flow_euler(steps, skip, flow_shift, num_train_timesteps)
    if kind == "scm":
        return _scm(steps, skip, sigma_data)
    raise InvalidInput(f"unknown sampler {kind!r}", "choose flow-dpm, flow-euler or scm")


def sampler_of(
    config: SamplerConfig, kind: SamplerKind, steps: int, flow_shift: float | None = None, skip: int = 0
) -> Sampler:
    """`make_sampler` with a model's numbers, or another shift than the model's."""
    return make_sampler(
        kind,
        steps=steps,
        skip=skip,
        flow_shift=flow_shift or config.flow_shift,
        num_train_timesteps=config.num_train_timesteps,
        sigma_data=config.sigma_data,
    )


def _flow_dpm(steps: int, skip: int, shift: float, train_timesteps: int) -> Sampler:
    u = 1.0 - np.linspace(1.0, 1.0 / train_timesteps, steps + 1)
    schedule = _shifted(u, shift)[:0:-1]
    timesteps = np.trunc(schedule * train_timesteps).astype(np.float32)
    sigmas = [*_fp32(schedule), 0.0]
    coefficients = [_flow_step(sigma, sigma_next) for sigma, sigma_next in pairwise(sigmas)]
    # the first step has no history and the last one ends at log-SNR infinity: both stay first order
    for i in range(skip + 1, steps - 1):
        h_before = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
        h = _log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])
        coefficients[i] = _flow_step(sigmas[i], sigmas[i + 1], h / (2 * h_before))
    return _flow(timesteps, coefficients, sigmas, skip)


def _flow_euler(steps: int, skip: int, shift: float, train_timesteps: int) -> Sampler:
    # as in diffusers: the range ends at the smallest training sigma, which is shifted already, and the
    # whole range is then shifted once more
    last = _shifted(1.0 / train_timesteps, shift)
    sigmas = [*_fp32(_shifted(np.linspace(1.0, last, steps), shift)), 0.0]
    coefficients = [_flow_step(sigma, sigma_next) for sigma, sigma_next in pairwise(sigmas)]
    timesteps = np.array(sigmas[:-1], np.float32) * np.float32(train_timesteps)
    return _flow(timesteps, coefficients, sigmas, skip)


def _flow(
    timesteps: NDArray[np.float32],
    coefficients: Sequence[StepCoefficients],
    sigmas: Sequence[float],
    skip: int,
) -> Sampler:
    levels = [(1.0 - sigma, sigma) for sigma in sigmas[skip:-1]]
    return Sampler(timesteps[skip:], coefficients[skip:], levels)


def _scm(steps: int, skip: int, sigma_data: float) -> Sampler:
    angles = _fp32(np.array([SCM_START, SCM_MIDDLE, 0.0])) if steps == 2 else _falling(SCM_START, steps)
    times, coefficients, levels = [], [], []
    for s, s_next in pairwise(angles[skip:]):
        sin, cos = math.sin(s), math.cos(s)
        levels.append((cos, sin))
        t = sin / (cos + sin)
        r = math.hypot(t, 1.0 - t)
        times.append(t)
        # the trigonometric velocity is F = (1 - 2t) x + sigma_data r v, and x0 = cos(s) x - sin(s) F
        coefficients.append(
            StepCoefficients(
                model_input=r / sigma_data,
                predict_x=cos - sin * (1.0 - 2.0 * t),
                predict_output=-sin * sigma_data * r,
                carry=0.0,
                clean=math.cos(s_next),
                previous=0.0,
                noise=math.sin(s_next) * sigma_data,
            )
        )
    return Sampler(np.array(times, np.float32), coefficients, levels, initial_scale=sigma_data)


def _flow_step(sigma: float, sigma_next: float, extrapolate: float = 0.0) -> StepCoefficients:
    """One step of DPM-Solver++ on x = (1 - sigma) x0 + sigma noise; without extrapolation it is Euler's.

    ``extrapolate`` e replaces x0 by (1 + e) x0 - e x0_before. Since alpha = 1 - sigma, the weight
    alpha_t (1 - exp(-h)) of x0 equals 1 - sigma_t / sigma_s, finite where the last sigma is 0.
    """
    carry = sigma_next / sigma
    clean = 1.0 - carry
    return StepCoefficients(
        model_input=1.0,
        predict_x=1.0,
        predict_output=-sigma,
        carry=carry,
        clean=clean * (1.0 + extrapolate),
        previous=-clean * extrapolate,
        noise=0.0,
    )


def _shifted(u: _Number, shift: float) -> _Number:
    return shift * u / (1.0 + (shift - 1.0) * u)


def _log_snr(sigma: float) -> float:
    return math.log((1.0 - sigma) / sigma)


def _fp32(values: NDArray[np.float64]) -> list[float]:
    # diffusers keeps its sigmas in fp32, and 1 - sigma magnifies the rounding near sigma = 1
    return [float(value) for value in values.astype(np.float32)]


def _falling(start: float, steps: int) -> list[float]:
    """``torch.linspace(start, 0, steps + 1)``: each half is counted from its end, in fp32, rounded once."""
    first, i = np.float32(start), np.arange(steps + 1)
    down = np.float64(-first / np.float32(steps))
    return _fp32(np.where(i < (steps + 1) // 2, first + down * i, -down * (steps - i)))
