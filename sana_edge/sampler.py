"""Step updates and the loop over them: Flow-DPM-Solver++ (2M), Flow-Euler and Sprint's SCM.

Every update used here is linear, so a schedule (`sana_edge.noise.schedules`) is a table of Python floats and
one step is the same three lines for all kinds:

    x0    = predict_x * x + predict_output * output
    x     = carry * x + clean * x0 + previous * x0_before + noise * z

Latents are tensors or numpy arrays, with the same results: torch is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from sana_edge.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

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


def guide(predictions: Sequence[Latent], guidance: Any) -> Latent:
    """Classifier-free guidance v_u + g (v_c - v_u) of the predictions v_u and v_c (arXiv 2207.12598)."""
    unguided, prompted = predictions
    guided: Latent = unguided + guidance * (prompted - unguided)
    return guided


def _fp32_like(x: Latent, output: Latent) -> Latent:
    return output.astype(np.float32, copy=False) if isinstance(x, np.ndarray) else output.float()
