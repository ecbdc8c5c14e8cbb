"""Times implementations of the same work in turns, and refuses to where they do not return the same."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from contenders import BASELINE, Output, Stage, Work
from numpy.typing import NDArray
from peaks import Peak, peaks
from torch import Tensor

from sana_edge.errors import SanaError
from sana_edge.memory import memory_errors

# a sample of a shorter stage consists of several calls
SAMPLE_SECONDS = 0.1

# relative L2; in 16 bits two right orders of summation drift this far apart over many layers
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One stage of one implementation.

    seconds: of each sample; ratios: to the baseline's sample of the same turn; difference: relative L2 from
    the baseline's output; levels: the largest difference of two pictures, of 255.
    """

    stage: str
    name: str
    seconds: list[float]
    ratios: list[float]
    difference: float | None = None
    levels: int | None = None
    memory: Peak | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "median": self.median, "ratio": self.ratio}


def measure(work: Work, stages: tuple[str, ...], repeat: int, say: Say) -> list[Row]:
    """Measures those stages of a work.

    repeat: samples of each stage; say: gets lines about the progress.
    Raises: SanaError if outputs differ, since the times would be of unequal work; OutOfMemory.
    """
    torch.set_num_threads(work.threads)
    say("loading")
    with memory_errors(work.title):
        loaded = {name: load() for name, load in work.loaders().items()}
        rows = []
        for stage in stages:
            calls = {name: entry[stage] for name, entry in loaded.items() if stage in entry}
            rows += _measure_stage(work, stage, calls, repeat, say)
    names = list(loaded)
    # the processes that follow need the memory
    del loaded, calls
    gc.collect()
    used = {}
    for name in names:
        say(f"memory of {name}")
        used[name] = peaks(work, name, stages)
    return [dataclasses.replace(row, memory=used[row.name][row.stage]) for row in rows]


def with_context(rows: list[Row], steps: int) -> list[Row]:
    """Rows for a step plus its share of what one implementation does once per picture, not in every step."""
    found = {(row.stage, row.name): row for row in rows}
    base = found.get(("step", BASELINE))
    added = []
    for (stage, name), row in found.items():
        if stage == "context" and base is not None:
            seconds = [second + row.median / steps for second in found["step", name].seconds]
            added.append(Row(f"step+context/{steps}", name, seconds, _ratios(seconds, base.seconds)))
    return added


def _measure_stage(work: Work, stage: str, calls: Mapping[str, Stage], repeat: int, say: Say) -> list[Row]:
    say(f"{stage}: warming up")
    outputs, warm = {}, []
    for name, call in calls.items():
        start = time.perf_counter()
        outputs[name] = call()
        _synchronize(work.device)
        warm.append(time.perf_counter() - start)
    times = _times(calls, work.device) if max(warm) < 1 else 1
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat):
        for name, call in calls.items():
            samples[name].append(_seconds(call, times, work.device))
        shown = ", ".join(f"{name} {seconds[-1]:.4g} s" for name, seconds in samples.items())
        say(f"{stage}: {turn + 1}/{repeat}, {shown}")
    rows = [_row(stage, name, samples, outputs) for name in calls]
    for row in rows:
        if row.difference is not None and stage not in work.unequal and not _equal(row, work.dtype):
            raise SanaError(
                f"{stage}: the output of {row.name} is not {BASELINE}'s, relative L2 {row.difference:.2g}",
                "times of unequal work say nothing; run the tests first",
            )
    return rows


def _row(stage: str, name: str, samples: Mapping[str, list[float]], outputs: Mapping[str, Output]) -> Row:
    if name == BASELINE or BASELINE not in samples:
        return Row(stage, name, samples[name], [])
    ratios = _ratios(samples[name], samples[BASELINE])
    return Row(stage, name, samples[name], ratios, *_compared(outputs[name], outputs[BASELINE]))


def _ratios(seconds: list[float], base: list[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, base, strict=True)]


def _compared(output: Output, expected: Output) -> tuple[float | None, int | None]:
    """Relative L2, infinite for other shapes, and the largest difference of pictures."""
    if output is None or expected is None:
        return None, None
    a, b = _numbers(output), _numbers(expected)
    if a.shape != b.shape:
        return math.inf, None
    levels = int((a - b).abs().max()) if isinstance(output, np.ndarray) else None
    return float((a - b).norm() / b.norm()), levels


def _numbers(output: Tensor | NDArray[np.uint8]) -> Tensor:
    # torch warns of arrays that cannot be written to, as those of Pillow
    tensor = output if isinstance(output, Tensor) else torch.from_numpy(output.copy())
    return tensor.cpu().double()


def _equal(row: Row, dtype: str) -> bool:
    if row.levels is not None and dtype == "fp32":
        return row.levels <= 1
    return row.difference is not None and row.difference <= TOLERANCE[dtype]


def _times(calls: Mapping[str, Stage], device: str) -> int:
    """How many calls make a sample long enough for the fastest."""
    return math.ceil(SAMPLE_SECONDS / min(_seconds(call, 1, device) for call in calls.values()))


def _seconds(call: Stage, times: int, device: str) -> float:
    """Seconds per call."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / times


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
