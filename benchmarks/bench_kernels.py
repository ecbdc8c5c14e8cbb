"""The CUDA kernels one by one: time beside what they replace, share of the INT8 peak and of copy bandwidth.

    python benchmarks/bench_kernels.py --shapes 0.6b --size 1024 --size 2048

Peaks are measured in the same run: INT8 by a large product of cuBLASLt, bandwidth by a copy of 1 GiB.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import RESULTS, needs

needs("torch")

import torch

from harness.measure import ratios
from harness.results import ended, positive
from sana_edge.bench.results import header, write_json
from sana_edge.bench.shapes import DENOISERS
from sana_edge.bench.table import Table
from sana_edge.errors import UnsupportedDevice
from sana_edge.kernels.cuda import library
from sana_edge.torch_runtime.device import DTYPES
from works.kernel_cases import Case, Sizes, cases

TITLES = ("kernel", "size", "px", "pictures", "us", "of INT8 peak", "of bandwidth", "replaced us", "ratio")
TURNS = 20
# written between two samples, so that no input is in L2 any more
FLUSHED_BYTES = 256 << 20
PEAK_SIDE = 8192
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Peaks:
    """What this GPU reaches at best: INT8 operations and bytes per second, read and written."""

    operations: float
    bandwidth: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given))


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    device = torch.device(options.device)
    refusal = library.refusal(device)
    if refusal:
        raise UnsupportedDevice(f"the CUDA kernels cannot run: {refusal}", "`sana-edge doctor` says more")
    head = header("benchmarks/bench_kernels.py", given)
    # whole after every kernel, for those who have minutes only
    rows = measure_all(options, device, lambda found: write_json(options.output, {**head, **found}))
    print(table(rows["kernels"]))


def measure_all(
    options: argparse.Namespace, device: torch.device, found: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Peaks, and every kernel at every size, as JSON values; ``found`` gets those so far after each."""
    # on a CPU nothing is measured: the emulator only shows that everything runs
    peaks = measured_peaks(device) if device.type == "cuda" else measured_peaks(device, 64, 1 << 10)
    turns = TURNS if device.type == "cuda" else 1
    rows: list[dict[str, Any]] = []
    data = {
        "dtype": options.dtype,
        "peaks": {"int8_tops": peaks.operations / 1e12, "copy_gb_per_s": peaks.bandwidth / 1e9},
        "kernels": rows,
    }
    for side in options.size:
        for pictures in options.pictures:
            sizes = Sizes.of(options.shapes, side, pictures, True, options.tokens)
            for case in cases(sizes, device, DTYPES[options.dtype]):
                setting = {"shapes": options.shapes, "side": side, "pictures": pictures}
                rows.append({**setting, **measured(case, device, peaks, turns)})
                found(data)
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return data


def measured_peaks(device: torch.device, side: int = PEAK_SIDE, copied: int = COPIED_BYTES) -> Peaks:
    """The two ceilings of this device."""
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device) for _ in range(2))
    product = statistics.median(samples(lambda: torch._int_mm(a, b.t()), device))
    x = torch.empty(copied, dtype=torch.int8, device=device).random_(-127, 128)
    y = torch.empty_like(x)
    copy = statistics.median(samples(lambda: y.copy_(x), device))
    return Peaks(2 * side**3 / product, 2 * copied / copy)


def measured(case: Case, device: torch.device, peaks: Peaks, turns: int = TURNS) -> dict[str, Any]:
    """One kernel and what it replaces, in turns; seconds are medians, the ratio that of pairs."""
    mine, theirs = paired(case.run, case.replaced, device, turns)
    seconds = statistics.median(mine)
    return {
        "kernel": case.kernel,
        "size": case.size,
        "calls_per_step": case.calls,
        "seconds": seconds,
        "share_of_int8_peak": case.operations / seconds / peaks.operations if case.operations else None,
        "share_of_bandwidth": case.moved / seconds / peaks.bandwidth,
        "replaced_seconds": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(ratios(mine, theirs)) if theirs else None,
        "samples": mine,
    }


def paired(
    run: Callable[[], object],
    replaced: Callable[[], object] | None,
    device: torch.device,
    turns: int = TURNS,
) -> tuple[list[float], list[float]]:
    """Seconds of samples of both, one after the other.

    On a GPU each is a replay of its CUDA graph: what the host takes to start kernels is not in it.
    """
    if device.type == "cuda":
        run, replaced = _recorded(run), None if replaced is None else _recorded(replaced)
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(turns):
        mine += samples(run, device, 1)
        if replaced is not None:
            theirs += samples(replaced, device, 1)
    return mine, theirs


def samples(call: Callable[[], object], device: torch.device, count: int = 5) -> list[float]:
    """Seconds of ``count`` calls with a cold L2, after one that warms up; by events where there is a GPU."""
    call()
    if device.type != "cuda":
        return [_wall(call) for _ in range(count)]
    flushed = torch.zeros(FLUSHED_BYTES, dtype=torch.int8, device=device)
    found = []
    for _ in range(count):
        # read, not written: nothing is left to be written back meanwhile
        flushed.max()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3)
    return found


def _recorded(call: Callable[[], object]) -> Callable[[], object]:
    call()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One aligned line per kernel and size."""
    return Table(TITLES, [_cells(row) for row in rows], named=2).text()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    peak, replaced = row["share_of_int8_peak"], row["replaced_seconds"]
    return (
        row["kernel"],
        row["size"],
        str(row["side"]),
        str(row["pictures"]),
        f"{row['seconds'] * 1e6:.1f}",
        "" if peak is None else f"{peak:.1%}",
        f"{row['share_of_bandwidth']:.1%}",
        "" if replaced is None else f"{replaced * 1e6:.1f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
    )


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="time the CUDA kernels one by one")
    add = parser.add_argument
    add("--shapes", choices=sorted(DENOISERS), default="0.6b", help="(default: %(default)s)")
    add("--size", type=positive, action="append", help="side in pixels, may be repeated (default: 1024)")
    add("--pictures", type=positive, action="append", help="at a time, may be repeated (default: 1)")
    add("--tokens", type=positive, default=60, help="of the prompt (default: %(default)s)")
    add("--dtype", choices=("fp16", "bf16"), default="fp16", help="(default: %(default)s)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: once on the emulated library")
    add("--output", type=Path, default=RESULTS / "bench_kernels.json", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    options.size, options.pictures = options.size or [1024], options.pictures or [1]
    return options


if __name__ == "__main__":
    sys.exit(main())
