from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.noise.schedules import SCM_START, make_sampler

SHAPE = (2, 32, 3, 5)
STEPS = (1, 2, 3, 4, 5, 14, 20, 50)
SHIFTS = (1.0, 3.0, 6.0)


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def drawing(generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: torch.randn(SHAPE, generator=generator)


def dpm_scheduler(shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def flow_scheduler(kind: str, shift: float) -> Any:
    return dpm_scheduler(shift) if kind == "flow-dpm" else FlowMatchEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("kind", ["flow-dpm", "flow-euler"])
def test_every_flow_step_equals_diffusers(kind: str, steps: int, shift: float) -> None:
    scheduler = flow_scheduler(kind, shift)
    scheduler.set_timesteps(steps)
    sampler = make_sampler(kind, steps=steps, flow_shift=shift)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(steps)
    x = expected = torch.randn(SHAPE, generator=generator) * sampler.initial_scale
    for i, t in enumerate(scheduler.timesteps):
        output = torch.randn(SHAPE, generator=generator)
        assert torch.equal(sampler.model_input(x, i), x)
        expected = scheduler.step(output, t, expected, return_dict=False)[0]
        x = sampler.step(x, output, i)
        assert relative(x, expected) <= 1e-5, i
    assert torch.equal(sampler.finish(x), x)
    assert i == len(sampler.timesteps) - 1


@pytest.mark.parametrize("shift", [*SHIFTS, 1.7, 4.0])
def test_flow_timesteps_equal_diffusers_for_every_step_count(shift: float) -> None:
    for steps in [*range(1, 51), 100, 999, 1000]:
        dpm, euler = dpm_scheduler(shift), FlowMatchEulerDiscreteScheduler(shift=shift)
        dpm.set_timesteps(steps)
        euler.set_timesteps(steps)
        ours = make_sampler("flow-dpm", steps=steps, flow_shift=shift).timesteps
        assert ours.dtype == np.float32
        assert ours.tolist() == dpm.timesteps.tolist(), steps
        ours = make_sampler("flow-euler", steps=steps, flow_shift=shift).timesteps
        torch.testing.assert_close(torch.from_numpy(ours), euler.timesteps, rtol=1e-6, atol=0.0)


def test_solver_order_equals_diffusers_for_every_step_count() -> None:
    generator = torch.Generator().manual_seed(0)
    for steps in range(1, 51):
        scheduler = dpm_scheduler(3.0)
        scheduler.set_timesteps(steps)
        sampler = make_sampler("flow-dpm", steps=steps, flow_shift=3.0)
        x = expected = torch.randn(1, 4, 2, 2, generator=generator)
        for i, t in enumerate(scheduler.timesteps):
            output = torch.randn(1, 4, 2, 2, generator=generator)
            expected = scheduler.step(output, t, expected, return_dict=False)[0]
            x = sampler.step(x, output, i)
            assert relative(x, expected) <= 1e-5, (steps, i)


def test_timesteps_are_those_of_the_paper_schedule() -> None:
    # trunc(1000 sigma) of u = linspace(0, 0.999, N + 1), sigma = 3u / (1 + 2u)
    assert make_sampler("flow-dpm", steps=20, flow_shift=3.0).timesteps.tolist() == [
        *(999, 982, 963, 944, 922, 899, 874, 847, 817, 785, 749, 710, 666, 617, 562, 499, 428, 345, 249, 136)
    ]
    assert make_sampler("flow-dpm", steps=14, flow_shift=3.0).timesteps.tolist() == [
        *(999, 974, 947, 916, 881, 843, 799, 749, 691, 624, 545, 449, 333, 187)
    ]


@pytest.mark.parametrize("steps", STEPS)
def test_scm_equals_the_sprint_pipeline(steps: int) -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    scheduler.set_begin_index(0)
    sampler = make_sampler("scm", steps=steps)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    outputs = torch.randn(steps, *SHAPE, generator=torch.Generator().manual_seed(2))
    noise_of_theirs, noise_of_ours = (torch.Generator().manual_seed(3) for _ in range(2))

    x, expected = start * sampler.initial_scale, start * scheduler.config.sigma_data
    for i, s in enumerate(scheduler.timesteps[:-1]):
        # the transforms around the scheduler are part of SanaSprintPipeline.__call__
        t = torch.sin(s) / (torch.cos(s) + torch.sin(s))
        r = torch.sqrt(t**2 + (1 - t) ** 2)
        model_input = expected / 0.5 * r
        assert relative(sampler.model_input(x, i), model_input) <= 1e-5
        assert sampler.timesteps[i] == pytest.approx(float(t), rel=1e-6)
        velocity = 0.5 * ((1 - 2 * t) * model_input + (1 - 2 * t + 2 * t**2) * outputs[i]) / r
        expected, clean = scheduler.step(velocity, s, expected, noise_of_theirs, return_dict=False)
        assert relative(sampler.denoised(x, outputs[i], i), clean) <= 1e-5
        x = sampler.step(x, outputs[i], i, drawing(noise_of_ours))
        assert relative(x, expected) <= 1e-5, i
    assert relative(sampler.finish(x), clean / 0.5) <= 1e-5


@pytest.mark.parametrize("kind", ["flow-dpm", "flow-euler", "scm"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_arrays_and_tensors_give_the_same_bits(kind: str, steps: int) -> None:
    """fp32 sums and products of the same numbers in the same order."""
    tensors, arrays = (make_sampler(kind, steps=steps) for _ in range(2))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(SHAPE, generator=generator) * tensors.initial_scale
    y = x.numpy().copy()
    for i in range(steps):
        output, noise = torch.randn(2, *SHAPE, generator=generator)
        assert np.array_equal(arrays.model_input(y, i), tensors.model_input(x, i).numpy())
        assert np.array_equal(arrays.denoised(y, output.numpy(), i), tensors.denoised(x, output, i).numpy())
        x, given = tensors.step(x, output, i, lambda: noise), y.copy()  # noqa: B023
        before = y
        y = arrays.step(y, output.numpy(), i, lambda: noise.numpy())  # noqa: B023
        assert y.dtype == np.float32 and np.array_equal(before, given)
        assert np.array_equal(y, x.numpy()), i
    assert np.array_equal(arrays.finish(y), tensors.finish(x).numpy())


def test_scm_angles_are_those_of_torch() -> None:
    for steps in (1, *range(3, 60), 999, 1000):
        angles = torch.linspace(SCM_START, 0.0, steps + 1)
        # the weight of the clean latent is the cosine of the next angle; torch's own rounding depends on the
        # processor, by half an ulp of an angle up to pi/2: 2^-24
        ours = [math.acos(min(c.clean, 1.0)) for c in make_sampler("scm", steps=steps).coefficients[:-1]]
        assert ours == pytest.approx(angles[1:-1].tolist(), rel=1e-12, abs=2 * 2**-24)


def test_scm_without_noise_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="step 0 needs noise"):
        make_sampler("scm", steps=2).step(torch.zeros(SHAPE), torch.zeros(SHAPE), 0)


def test_the_sampler_needs_no_torch() -> None:
    code = "import sys, sana_edge.noise.schedules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("kind", ["flow-dpm", "flow-euler", "scm"])
def test_latents_stay_fp32_and_untouched_for_a_bf16_model(kind: str) -> None:
    sampler = make_sampler(kind, steps=5)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(SHAPE, generator=generator)
    for i in range(5):
        before, output = x.clone(), torch.randn(SHAPE, generator=generator).bfloat16()
        stepped = sampler.step(x, output, i, drawing(generator))
        assert torch.equal(x, before)
        assert stepped.dtype == torch.float32
        assert torch.equal(sampler.denoised(x, output, i), sampler.denoised(x, output.float(), i))
        x = stepped


def test_a_sampler_can_be_used_again() -> None:
    sampler = make_sampler("flow-dpm", steps=4)
    outputs = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(8))
    results = []
    for stop in (3, 4, 4):
        x = torch.ones(SHAPE)
        for i in range(stop):
            x = sampler.step(x, outputs[i], i)
        results.append(x)
    assert torch.equal(results[1], results[2])


def gaussian_error(kind: str, steps: int) -> float:
    """Relative error of the sampler on data N(mean, std^2), whose velocity and flow are known exactly."""
    mean, std = 2.0, 0.3

    def spread(sigma: float) -> float:
        return math.hypot((1 - sigma) * std, sigma)

    sampler = make_sampler(kind, steps=steps)  # type: ignore[arg-type]
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    first = -sampler.coefficients[0].predict_output
    exact = mean + std * (x - (1 - first) * mean) / spread(first)
    for i, c in enumerate(sampler.coefficients):
        sigma = -c.predict_output
        centred = x - (1 - sigma) * mean
        noise = sigma * centred / spread(sigma) ** 2
        clean = mean + (1 - sigma) * std**2 * centred / spread(sigma) ** 2
        x = sampler.step(x, noise - clean, i)
    return relative(x, exact)


def test_second_order_beats_euler_on_a_known_flow() -> None:
    assert gaussian_error("flow-dpm", 20) < 0.7 * gaussian_error("flow-euler", 20)
    assert gaussian_error("flow-dpm", 40) < 0.2 * gaussian_error("flow-euler", 40)
    assert gaussian_error("flow-euler", 40) < 0.6 * gaussian_error("flow-euler", 20)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"steps": 0}, "0"),
        ({"steps": -3}, "-3"),
        ({"steps": 1001}, "1001"),
        ({"flow_shift": 0.0}, "0.0"),
        ({"flow_shift": math.nan}, "nan"),
        ({"flow_shift": math.inf}, "inf"),
        ({"kind": "ddim"}, "ddim"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], value: str) -> None:
    arguments = {"kind": "flow-dpm", "steps": 20, **changes}
    with pytest.raises(InvalidInput) as caught:
        make_sampler(arguments.pop("kind"), **arguments)
    assert value in caught.value.message
    assert "choose" in caught.value.hint


def test_extreme_shifts_stay_finite() -> None:
    for shift in (0.01, 100.0):
        for c in make_sampler("flow-dpm", steps=1000, flow_shift=shift).coefficients:
            assert all(math.isfinite(value) for value in vars(c).values())


def test_a_skipped_step_is_an_error() -> None:
    with pytest.raises(InvalidInput, match="before step 1"):
        make_sampler("flow-dpm", steps=5).step(torch.zeros(SHAPE), torch.zeros(SHAPE), 2)
