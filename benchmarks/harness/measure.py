"""Times implementations of the same work in turns, and refuses to where they do not return the same."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.process import Peak, peaks
from harness.results import BASELINE, INT8, OURS, Say
from harness.work import Output, Stage, Work
from sana_edge.bench.table import Table
from sana_edge.errors import SanaError
from sana_edge.system.memory import memory_errors

# a sample of a shorter stage consists of several calls
SAMPLE_SECONDS = 0.1
# calls that all take longer than this are not warmed up: the first is a sample
LONG_SECONDS = 60

COLUMNS = (
    *("stage", "by", "median s", "min s", "max s", f"/ {BASELINE}", "min", "max"),
    *(f"/ {OURS}", "min", "max", "weights MB", "peak MB", "of it new", "difference"),
)


@dataclass(frozen=True)
class Row:
    """One stage of one implementation.

    seconds: of each sample; ratios: to the baseline's sample of the same turn; ratios_to_float: of INT8 to
    that of our own float; reference: the baseline or, where that was left out, our own float; difference:
    relative L2 from its output; levels: the largest difference of two pictures, of 255; weights: bytes.
    """

    stage: str
    name: str
    seconds: list[float]
    ratios: list[float]
    ratios_to_float: list[float] = dataclasses.field(default_factory=list)
    reference: str | None = None
    difference: float | None = None
    levels: int | None = None
    weights: int | None = None
    memory: Peak | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def ratio_to_float(self) -> float | None:
        return statistics.median(self.ratios_to_float) if self.ratios_to_float else None

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        ratios = {"ratio": self.ratio, "ratio_to_float": self.ratio_to_float}
        return {**dataclasses.asdict(self), "median": self.median, **ratios}


def measure(
    work: Work,
    stages: tuple[str, ...],
    repeat: int,
    say: Say,
    contenders: Collection[str] | None = None,
    timed: Callable[[list[Row]], object] = lambda rows: None,
    memory: bool = True,
) -> list[Row]:
    """Measures those stages of a work. Memory that cannot be measured is None, and the reason is said.

    repeat: samples of each stage; say: gets lines about the progress; contenders: only these, by name;
    timed: is given the rows after each stage and before memory is measured; memory: whether it is.
    Raises: SanaError if outputs differ, since the times would be of unequal work; OutOfMemory.
    """
    torch.set_num_threads(work.threads)
    say("loading")
    with memory_errors(work.title):
        loaded = {
            name: load() for name, load in work.loaders().items() if contenders is None or name in contenders
        }
        rows = []
        for stage in stages:
            calls = {name: entry[stage] for name, entry in loaded.items() if stage in entry}
            rows += _measure_stage(work, stage, calls, repeat, say)
            timed(rows)
    names = list(loaded)
    # the processes that follow need the memory
    del loaded, calls
    gc.collect()
    if not memory:
        return rows
    used = {name: _peaks(work, name, stages, say) for name in names}
    return [dataclasses.replace(row, memory=used[row.name].get(row.stage)) for row in rows]


def _peaks(work: Work, name: str, stages: tuple[str, ...], say: Say) -> dict[str, Peak]:
    """Memory by stage; empty where it cannot be measured: the times, which took longer, are still right."""
    say(f"memory of {name}")
    try:
        return peaks(work, name, stages)
    except SanaError as error:
        say(f"memory of {name} is not known: {error.message}")
        return {}


def with_context(rows: list[Row], steps: int) -> list[Row]:
    """Rows for a step plus its share of what some implementations do once per picture, not in every step."""
    step = {row.name: row.seconds for row in rows if row.stage == "step"}
    context = {row.name: row.median / steps for row in rows if row.stage == "context"}
    whole = {name: [s + context.get(name, 0) for s in seconds] for name, seconds in step.items()}
    stage = f"step+context/{steps}"
    return [Row(stage, name, whole[name], *_all_ratios(name, whole)) for name in whole if name in context]


def _measure_stage(work: Work, stage: str, calls: Mapping[str, Stage], repeat: int, say: Say) -> list[Row]:
    say(f"{stage}: warming up")
    outputs, warm = {}, []
    for name, call in calls.items():
        start = time.perf_counter()
        outputs[name] = call()
        synchronize(work.device)
        warm.append(time.perf_counter() - start)
    times = _times(calls, work.device) if max(warm) < 1 else 1
    long = min(warm) > LONG_SECONDS
    samples = {name: [seconds] if long else [] for name, seconds in zip(calls, warm, strict=True)}
    for turn in range(int(long), repeat):
        for name, call in calls.items():
            samples[name].append(seconds_of(call, times, work.device))
        shown = ", ".join(f"{name} {seconds[-1]:.4g} s" for name, seconds in samples.items())
        say(f"{stage}: {turn + 1}/{repeat}, {shown}")
    rows = [_row(stage, name, call, samples, outputs) for name, call in calls.items()]
    for row in rows:
        check(row, work)
    return rows


def _row(
    stage: str, name: str, call: Stage, samples: Mapping[str, list[float]], outputs: Mapping[str, Output]
) -> Row:
    reference = BASELINE if BASELINE in samples else OURS
    reference = None if name == reference or reference not in samples else reference
    compared = (None, None) if reference is None else _compared(outputs[name], outputs[reference])
    shares = _all_ratios(name, samples)
    return Row(stage, name, samples[name], *shares, reference, *compared, weights=call.weights)


def _all_ratios(name: str, samples: Mapping[str, list[float]]) -> tuple[list[float], list[float]]:
    """To the baseline, and of INT8 to our own float; empty where there is nothing to compare with."""
    base, ours = samples.get(BASELINE), samples.get(OURS)
    to_base = ratios(samples[name], base) if base and name != BASELINE else []
    return to_base, ratios(samples[name], ours) if ours and name == INT8 else []


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


def check(row: Row, work: Work) -> None:
    """That an output is as close to the reference's as its numbers allow.

    Raises: SanaError, since times of unequal work say nothing.
    """
    allowed = work.limit(row.stage, row.name)
    if row.difference is None or allowed is None:
        return
    if row.levels is not None and work.dtype == "fp32" and row.name != INT8:
        equal = row.levels <= 1
    else:
        # NaN is not equal
        equal = row.difference <= allowed
    if not equal:
        names = f"the output of {row.name} is not {row.reference}'s"
        raise SanaError(
            f"{row.stage}: {names}, relative L2 {row.difference:.2g}, allowed {allowed:.2g}",
            "times of unequal work say nothing; run the tests first",
        )


def table(rows: Sequence[Row], layers: int | None = None) -> str:
    """One line for each stage and implementation; layers: adds the time of each where the network was cut."""
    found = Table(COLUMNS, [_cells(row) for row in rows], named=2)
    if layers:
        shares = (f"{row.name} {row.median / layers:.4g} s" for row in rows if row.stage == "step")
        found.notes = [f"step per layer: {', '.join(shares)}"]
    return found.text()


def _cells(row: Row) -> Sequence[str]:
    times = [f"{seconds:.4g}" for seconds in (row.median, min(row.seconds), max(row.seconds))]
    shares: list[str] = []
    for found in (row.ratios, row.ratios_to_float):
        spread = (statistics.median(found), min(found), max(found)) if found else ("", "", "")
        shares += [f"{share:.3f}" if found else "" for share in spread]
    weights = "" if row.weights is None else f"{row.weights / 1e6:.1f}"
    most, before = (row.memory.most, row.memory.before) if row.memory else (None, None)
    new = None if most is None or before is None else most - before
    memory = ["" if value is None else f"{value / 1e6:.0f}" for value in (most, new)]
    levels = "" if row.levels is None else f", {row.levels}/255"
    difference = "" if row.difference is None else f"{row.difference:.1e}{levels}"
    return (row.stage, row.name, *times, *shares, weights, *memory, difference)


def ratios_to(rows: Sequence[Row], reference: str) -> dict[str, dict[str, float]]:
    """Times of the others to a reference's of the same turn, below 1 is faster; empty where there is none."""
    seconds = {row.name: row.seconds for row in rows}
    if reference not in seconds:
        return {}
    found = {}
    for name in (name for name in seconds if name != reference):
        shares = ratios(seconds[name], seconds[reference])
        found[name] = {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}
    return found


def ratios(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of samples of the same turns: what else slows the machine meets both."""
    return [a / b for a, b in zip(seconds, base, strict=True)]


def _times(calls: Mapping[str, Stage], device: str) -> int:
    """How many calls make a sample long enough for the fastest."""
    return math.ceil(SAMPLE_SECONDS / min(seconds_of(call, 1, device) for call in calls.values()))


def seconds_of(call: Stage, times: int, device: str) -> float:
    """Seconds per call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / times


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
