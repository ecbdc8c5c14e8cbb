"""Noise schedules and step updates: Flow-DPM-Solver++ (2M), Flow-Euler and Sprint's SCM.

Every update used here is linear, so a schedule is a table of Python floats and one step is the same
three lines for all kinds:

    x0    = predict_x * x + predict_output * output
    x     = carry * x + clean * x0 + previous * x0_before + noise * z

Latents are tensors or numpy arrays, with the same results: torch is not needed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sana_edge.config import SamplerConfig, SamplerKind
from sana_edge.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

# Sprint's angles in radians: a little above pi/2, and the middle point of its two-step schedule
SCM_START = 1.57080
SCM_MIDDLE = 1.3

_Number = TypeVar("_Number", float, NDArray[np.float64])
Latent = TypeVar("Latent", "Tensor", NDArray[np.float32])


@dataclass(frozen=True)
class StepCoefficients:
    """The numbers of one step; the module's docstring has the formulas."""

    model_input: float
    predict_x: float
    predict_output: float
    carry: float
    clean: float
    previous: float
    noise: float


class Sampler:
    """One schedule, and the state of one batch of latents that walks through it.

    Latents are (B, C, H, W) fp32, tensors on any device or numpy arrays; `denoise` is the loop.

    The second-order solver remembers the clean latent of step ``i`` for step ``i + 1``; step 0 starts
    afresh, so a sampler may be used again but not for two batches at once.

    Attributes:
        timesteps: (S,) fp32, what the time embedding gets: 0..1000 for the flow kinds (whole
            numbers for flow-dpm), 0..1 for scm.
        initial_scale: factor on the N(0, 1) noise that the loop starts from.
        coefficients: one entry per step.
        levels: for each step the shares of the clean latent and of the noise in what it starts from.
    """

    def __init__(
        self,
        timesteps: NDArray[np.float32],
        coefficients: Sequence[StepCoefficients],
        levels: Sequence[tuple[float, float]],
        *,
        initial_scale: float = 1.0,
    ) -> None:
        self.timesteps = timesteps
        self.coefficients = tuple(coefficients)
        self.levels = tuple(levels)
        self.initial_scale = initial_scale
        self._before: Any = None

    def model_input(self, x: Latent, i: int) -> Latent:
        """Return what the denoiser gets at step ``i``."""
        scale = self.coefficients[i].model_input
        return x if scale == 1.0 else x * scale

    def denoised(self, x: Latent, output: Latent, i: int) -> Latent:
        """Return the clean latent that ``output`` predicts, at the scale of ``x``."""
        c = self.coefficients[i]
        return c.predict_x * x + c.predict_output * _fp32_like(x, output)

    def step(self, x: Latent, output: Latent, i: int, noise: Callable[[], Latent] | None = None) -> Latent:
        """Return the latent after step ``i``.

        Args:
            x: (B, C, H, W) fp32 latent before the step.
            output: the denoiser's velocity, any floating dtype, guidance applied.
            i: step, 0 to S - 1, in order.
            noise: draws N(0, 1) like ``x``, for scm.

        Raises:
            InvalidInput: the step before was not taken, and its clean latent is needed; or noise is.
        """
        c = self.coefficients[i]
        x0 = self.denoised(x, output, i)
        result = c.carry * x + c.clean * x0
        if c.previous:
            if self._before is None:
                raise InvalidInput(f"sampler step {i} was taken before step {i - 1}", "step through in order")
            result += c.previous * self._before
        if c.noise:
            if noise is None:
                raise InvalidInput(f"sampler step {i} needs noise", "give a function that draws it")
            result += c.noise * noise()
        self._before = x0
        return result

    def take(
        self, velocity: Callable[[Latent, int], Latent], x: Latent, i: int, noise: Callable[[], Latent]
    ) -> Denoised[Latent]:
        """Take step ``i`` from ``x``, with the arguments of `denoise`."""
        given = self.model_input(x, i)
        predicted = velocity(given, i)
        clean = self.denoised(x, predicted, i) / self.initial_scale
        return Denoised(given, predicted, self.step(x, predicted, i, noise), clean)

    def table(self) -> NDArray[np.float32]:
        """The coefficients (S, 7) as a recorded step reads them, in the order of `StepCoefficients`."""
        return np.array([astuple(c) for c in self.coefficients], np.float32)

    def noised(self, clean: Latent, noise: Latent, i: int) -> Latent:
        """Return what step ``i`` starts from, for a clean latent (arXiv 2108.01073, SDEdit).

        Args:
            clean: (B, C, H, W) fp32, as the autoencoder takes it.
            noise: N(0, 1) like ``clean``.
        """
        signal, level = self.levels[i]
        result: Latent = signal * clean
        result += level * noise
        return result if self.initial_scale == 1.0 else result * self.initial_scale

    def finish(self, x: Latent) -> Latent:
        """Return the autoencoder's (scaled) latent after the last step."""
        self._before = None
        return x if self.initial_scale == 1.0 else x / self.initial_scale


@dataclass(frozen=True, eq=False)
class Denoised(Generic[Latent]):
    """One step of `denoise`, latents (B, C, H, W) fp32.

    Of `Steps` all but ``clean`` is their own memory, which the next step overwrites.

    Attributes:
        given: what the denoiser got.
        velocity: what it gave.
        x: the latent after the step; after the last one as the autoencoder takes it.
        clean: what the picture's latent would be if this were the last step, at the autoencoder's scale.
    """

    given: Latent
    velocity: Latent
    x: Latent
    clean: Latent


@dataclass(frozen=True, eq=False)
class Origin(Generic[Latent]):
    """A picture that the loop starts from.

    Attributes:
        clean: its latent (B, C, H, W) fp32, as the autoencoder takes it.
        mask: (1, 1, H, W) fp32, 1 where the picture is drawn anew, 0 where it stays; None: everywhere anew.
    """

    clean: Latent
    mask: Latent | None = None

    def keep(self, x: Latent, kept: Latent) -> Latent:
        """Return ``x`` where it is drawn anew, ``kept`` elsewhere."""
        return x if self.mask is None else self.mask * x + (1 - self.mask) * kept


@runtime_checkable
class Steps(Protocol):
    """A prediction that takes whole steps, the sampler's part included, in memory of its own."""

    def take(self, sampler: Sampler, x: Any, i: int, noise: Callable[[], Any]) -> Denoised[Any]:
        """`Sampler.take` of the prediction, to the bit."""


def denoise(
    sampler: Sampler,
    velocity: Callable[[Latent, int], Latent],
    noise: Callable[[], Latent],
    origin: Origin[Latent] | None = None,
) -> Iterator[Denoised[Latent]]:
    """Take a schedule's steps from noise to a latent, one at a time.

    Args:
        velocity: the prediction for a latent at a step, guidance applied; may be `Steps`.
        noise: draws N(0, 1), (B, C, H, W) fp32: where the loop starts, and what scm adds at each step.
        origin: what the noise is mixed with at the start and, outside its mask, after each step.
    """
    first = noise()
    x = first * sampler.initial_scale if origin is None else sampler.noised(origin.clean, first, 0)
    last = len(sampler.coefficients) - 1
    for i in range(last + 1):
        if isinstance(velocity, Steps):
            taken: Denoised[Latent] = velocity.take(sampler, x, i, noise)
        else:
            taken = sampler.take(velocity, x, i, noise)
        x, clean = taken.x, taken.clean
        if i == last:
            x = sampler.finish(x)
        if origin is not None:
            clean = origin.keep(clean, origin.clean)
            x = origin.keep(x, origin.clean if i == last else sampler.noised(origin.clean, first, i + 1))
        yield Denoised(taken.given, taken.velocity, x, clean)


def varied(
    source: Callable[[int], Callable[[], NDArray[np.float32]]],
    seed: int,
    variation: Sequence[tuple[int, float]],
) -> Callable[[], NDArray[np.float32]]:
    """Draws of a seed's noise with other seeds' noise mixed in, one after the other.

    Along the great circle between the two (arXiv 1609.04468), which keeps the variance: a strength of 0 is
    the first noise, 1 the other. It is what Automatic1111's web UI does for its "variation seed".

    Args:
        source: what draws N(0, 1) fp32 for a seed.
        variation: seeds, and strengths above 0 to 1.
    """
    draw, others = source(seed), [(source(other), strength) for other, strength in variation]

    def mixed() -> NDArray[np.float32]:
        noise = draw()
        for other, strength in others:
            noise = _slerp(noise, other(), strength)
        return noise

    return mixed


def _slerp(a: NDArray[np.float32], b: NDArray[np.float32], strength: float) -> NDArray[np.float32]:
    flat = [np.float64(x).ravel() for x in (a, b)]
    cosine = float(flat[0] @ flat[1] / (np.linalg.norm(flat[0]) * np.linalg.norm(flat[1])))
    angle = math.acos(min(max(cosine, -1.0), 1.0))
    # of one direction: the same seed
    if math.sin(angle) < 1e-4:
        return a
    shares = [np.float32(math.sin(part * angle) / math.sin(angle)) for part in (1 - strength, strength)]
    mixed: NDArray[np.float32] = shares[0] * a + shares[1] * b
    return mixed


def guide(predictions: Sequence[Latent], guidance: Any) -> Latent:
    """Classifier-free guidance v_u + g (v_c - v_u) of the predictions v_u and v_c (arXiv 2207.12598)."""
    unguided, prompted = predictions
    guided: Latent = unguided + guidance * (prompted - unguided)
    return guided


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


def _fp32_like(x: Latent, output: Latent) -> Latent:
    return output.astype(np.float32, copy=False) if isinstance(x, np.ndarray) else output.float()
