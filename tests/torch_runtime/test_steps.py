"""Steps taken whole, with the sampler's update: equal to the loop bit for bit, queued without waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_denoiser import CONFIG, random_denoiser
from torch import Tensor

from sana_edge import generation
from sana_edge.errors import Cancelled, InvalidInput
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.noise.schedules import make_sampler
from sana_edge.sampler import Denoised, Origin, Sampler, denoise
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.steps import FusedNetwork, Network, PlainNetwork, Predictor, RecordedSteps

SHAPE = (1, 8, 3, 5)


def on_cuda(denoiser: Denoiser) -> Network:
    return FusedNetwork(denoiser, "cuda")


SAMPLERS = [("flow-dpm", 5, 0), ("flow-dpm", 6, 2), ("flow-euler", 3, 0), ("scm", 2, 0), ("scm", 4, 1)]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def prepared(
    sampler: Sampler, network: Callable[[Denoiser], Network], dtype: torch.dtype = torch.float32
) -> tuple[RecordedSteps, Predictor]:
    denoiser = random_denoiser().to_compute("cpu", dtype)
    groups = [TextFeatures(torch.randn(1, n, 40), torch.ones(1, n)) for n in (1, 7)]
    text: TextContext = denoiser.text_context(groups)
    tables: Modulation = denoiser.modulation(torch.from_numpy(sampler.timesteps))
    predictor = Predictor(network(denoiser), cuda_graph.eager)
    return predictor.start(torch.zeros(SHAPE), tables, text, 4.5)[0], predictor


def draws(seed: int = 3) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=generator)


def walked(steps: Iterator[Denoised[Tensor]]) -> list[list[Tensor]]:
    return [[t.clone() for t in (step.given, step.velocity, step.x, step.clean)] for step in steps]


def check(
    sampler: Sampler,
    network: Callable[[Denoiser], Network],
    origin: Origin[Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    whole, _ = prepared(sampler, network, dtype)
    # a prediction alone, as a function, is no `Steps`
    eager = walked(denoise(sampler, lambda x, i: whole(x, i).clone(), draws(), origin))
    taken = walked(denoise(sampler, whole, draws(), origin))
    for one, other in zip(eager, taken, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(taken[0][2], taken[-1][2])


@pytest.mark.parametrize(("kind", "steps", "skip"), SAMPLERS)
@pytest.mark.parametrize(
    "network", [PlainNetwork, lambda d: FusedNetwork(d, "torch")], ids=["plain", "fused"]
)
def test_equals_the_loop(kind: Any, steps: int, skip: int, network: Callable[[Denoiser], Network]) -> None:
    check(make_sampler(kind, steps=steps, skip=skip), network)


@pytest.mark.usefixtures("emulated")
def test_equals_the_loop_on_cuda() -> None:
    # the second of three steps extrapolates
    check(make_sampler("flow-dpm", steps=3), on_cuda, dtype=torch.bfloat16)


def test_from_a_picture() -> None:
    mask = (torch.arange(5) > 2).float().expand(1, 1, 3, 5)
    check(make_sampler("flow-dpm", steps=6, skip=2), PlainNetwork, Origin(torch.randn(SHAPE), mask))


def test_launches_of_a_whole_step(emulated: Any) -> None:
    """28 layers: 256, and one of torch's."""
    sampler = make_sampler("flow-euler", steps=1)
    whole, _ = prepared(sampler, on_cuda, torch.bfloat16)
    emulated.count()
    walked(denoise(sampler, whole, draws()))
    assert emulated.count()["launches"] == 9 * CONFIG.num_layers + 4


def test_memory_that_goes_between_steps() -> None:
    """The state goes on in a graph that is made again."""
    sampler = make_sampler("flow-dpm", steps=5)
    whole, predictor = prepared(sampler, PlainNetwork)
    expected, found = walked(denoise(sampler, whole, draws())), []
    for step in denoise(sampler, whole, draws()):
        found.append(step.clean.clone())
        predictor.release()
    assert all(torch.equal(a, b[3]) for a, b in zip(found, expected, strict=True))


def test_a_step_that_was_left_out() -> None:
    sampler = make_sampler("flow-dpm", steps=5)
    whole, _ = prepared(sampler, PlainNetwork)
    whole.take(sampler, torch.randn(SHAPE), 0, draws())
    with pytest.raises(InvalidInput, match="sampler step 2 was taken before step 1"):
        whole.take(sampler, torch.randn(SHAPE), 2, draws())


class Queue:
    """A device on which steps are done when they are waited for."""

    def __init__(self, steps: int) -> None:
        self.log: list[str] = []
        self.steps = steps

    def queued(self) -> Iterator[Denoised[np.ndarray[Any, Any]]]:
        for i in range(self.steps):
            self.log.append(f"queue {i}")
            yield Denoised(*[np.full(1, i, np.float32)] * 4)

    def mark(self) -> Callable[[], None]:
        last = self.log[-1].split()[1]
        return lambda: self.log.append(f"done {last}")


def test_a_step_is_queued_before_the_one_before_is_done() -> None:
    queue = Queue(3)
    for step in generation._when_done(queue.queued(), queue.mark):
        queue.log.append(f"told {int(step.x[0])}")
    assert " ".join(queue.log).replace("queue ", "q").replace("done ", "d").replace("told ", "t") == (
        "q0 q1 d0 t0 q2 d1 t1 d2 t2"
    )


def test_a_cancellation_costs_one_step() -> None:
    queue, cancel = Queue(9), threading.Event()
    steps = generation._when_done(queue.queued(), queue.mark)
    with pytest.raises(Cancelled):
        for i, _ in enumerate(steps):
            if i == 3:
                cancel.set()
            generation.stop_if(cancel)
    assert [line for line in queue.log if "queue" in line][-1] == "queue 4"


def test_nothing_is_queued_on_a_cpu() -> None:
    queue = Queue(3)
    for step in generation._when_done(queue.queued(), lambda: None):
        queue.log.append(f"told {int(step.x[0])}")
    assert queue.log == ["queue 0", "told 0", "queue 1", "told 1", "queue 2", "told 2"]


def test_the_clock_waits_for_no_step() -> None:
    waits: list[int] = []
    clock = generation._Clock(lambda: waits.append(1))
    with clock.stage("denoise", wait=False):
        pass
    assert not waits
    with clock.stage("decode"):
        pass
    assert waits and SimpleNamespace(**clock.read()).decode >= 0
