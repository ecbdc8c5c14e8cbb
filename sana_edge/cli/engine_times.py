"""How long an engine takes for a picture, of one that is small enough to be drawn now, scaled."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from sana_edge.generation import Step
from sana_edge.request.loading import LoadOptions
from sana_edge.request.plan import Plan
from sana_edge.store.manifest import Manifest

_PROMPT = "a red house left of a yellow star"
# cells of 32 pixels of the picture that is drawn
_CELLS = 8
# its steps, and where these are quicker than so many seconds, steps of the second: the first few take longer
_STEPS = 4
_QUICK = 0.2
_QUICK_STEPS = 16


@dataclass(frozen=True)
class EngineTimes:
    """Seconds of a picture by "text", "denoise" and "decode": of a process' first, and of one behind it.

    Engines compile for a size, or make their memory ready, when they first see it.
    """

    first: dict[str, float]
    further: dict[str, float]


def measured(folder: Path, described: Manifest, plan: Plan, options: LoadOptions) -> EngineTimes:
    """Two small pictures, scaled to the plan's; it takes as long as loading the model.

    What comes before the steps and at the first of them does not grow with the size.

    Raises:
        SanaError: as `sana_edge.Sana.load`.
    """
    from sana_edge.engines.runtime import EngineRuntime
    from sana_edge.pipeline import Sana

    side = described.size or (
        min(plan.width, _CELLS * described.cell),
        min(plan.height, _CELLS * described.cell),
    )
    scale = plan.width * plan.height / (side[0] * side[1])
    ends: list[float] = []

    def ended(step: Step) -> None:
        # the last step ends with the picture
        if step.image is None:
            ends.append(time.perf_counter())

    runtime = EngineRuntime.load(
        folder, device=options.device, dtype=options.dtype, backend=options.backend, threads=options.threads
    )
    with Sana(runtime) as sana:

        def draw(steps: int) -> dict[str, float]:
            ends.clear()
            return sana.generate(
                _PROMPT,
                size=side,
                exact_size=True,
                steps=steps,
                seed=0,
                guidance=plan.guidance,
                on_step=ended,
            ).timings

        first = draw(_STEPS)
        steps = _QUICK_STEPS if ends[-1] - ends[-2] < _QUICK else _STEPS
        again = draw(steps)
    step = statistics.median(after - before for before, after in pairwise(ends))
    decode = again["decode"]

    def seconds(timings: dict[str, float], steps: int) -> dict[str, float]:
        before = max(timings["denoise"] - steps * step, 0.0)
        return {
            "text": timings["text"],
            "denoise": before + (plan.steps - plan.skip) * step * scale,
            "decode": max(timings["decode"] - decode, 0.0) + decode * scale,
        }

    return EngineTimes(seconds(first, _STEPS), seconds(again, steps))
