"""The steps of `gpu_check`: what each runs, how long it may take, and what its figure is.

Estimates are seconds on a data-centre GPU (H100 or H200) with 16 cores and a carried library: "smoke" adds up
to less than 4 minutes, "all" to less than 9. A limit is two to four times the estimate.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Commands = list[list[str]]


@dataclass(frozen=True)
class Setting:
    """Where steps run: a real GPU, or in a dry run the CPU with the emulated library and tiny shapes.

    out: results and logs; scratch: large files that nobody keeps; carried: a library built elsewhere.
    """

    out: Path
    scratch: Path
    carried: Path | None = None
    dry: bool = False

    @property
    def built(self) -> Path:
        return self.scratch / "libsana_edge_cuda.so"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def shapes(self) -> str:
        return "tiny" if self.dry else "0.6b"

    def json(self, name: str) -> str:
        """Where a step writes what it measured."""
        return str(self.out / f"{name}.json")

    def to_json(self) -> dict[str, Any]:
        carried = None if self.carried is None else str(self.carried)
        return {"out": str(self.out), "scratch": str(self.scratch), "carried": carried, "dry": self.dry}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Setting:
        """The inverse of `to_json`."""
        carried = Path(data["carried"]) if data["carried"] else None
        return cls(Path(data["out"]), Path(data["scratch"]), carried, data["dry"])


@dataclass(frozen=True)
class Step:
    """One step.

    commands: of Python, one after the other, which share the limit; needs: modules that must be there;
    figure: the one that matters, from what the step wrote, or from its log where it wrote nothing.
    """

    name: str
    estimate: float
    limit: float
    commands: Callable[[Setting], Commands]
    figure: Callable[[Mapping[str, Any], str], str]
    needs: tuple[str, ...] = ("torch",)


def _own(name: str, module: str = "", **options: object) -> Callable[[Setting], Commands]:
    """A module of this folder; see `gpu.__main__`."""

    def commands(setting: Setting) -> Commands:
        given = {"output": setting.json(name), "setting": setting.to_json(), **options}
        return [["-m", "gpu", module or name, json.dumps(given)]]

    return commands


def _doctor(setting: Setting) -> Commands:
    return [["-m", "sana_edge", "doctor"]]


def _kernels(setting: Setting) -> Commands:
    size = ["--size", "64" if setting.dry else "1024", "--device", setting.device]
    given = ["--shapes", setting.shapes, *size, "--output", setting.json("kernels")]
    return [["benchmarks/bench_kernels.py", *given]]


def _pytest(*arguments: str) -> list[str]:
    return ["-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "gpu", *arguments]


def _operation_tests(setting: Setting) -> Commands:
    rooms = ["tests/kernels/cuda", "tests/fused"]
    # a dry run imports all files and runs few tests, each of which skips itself
    workers, few = (1, ["-k", "quantize_rows"]) if setting.dry else (min(8, os.cpu_count() or 1), [])
    return [_pytest("-n", str(workers), *few, *rooms)]


def _gpu_tests(backend: str) -> Callable[[Setting], Commands]:
    # tests without a backend run once, with the first
    chosen = "triton" if backend == "triton" else "not triton"
    return lambda setting: [_pytest("tests/gpu/test_runtime.py", "-k", chosen)]


def _fault_tests(setting: Setting) -> Commands:
    # a capture that failed may leave torch half in it: a process each, and last
    return [_pytest("tests/gpu/test_failed_recording.py")]


def _bench_image(name: str, contenders: str, stages: str) -> Callable[[Setting], Commands]:
    def commands(setting: Setting) -> Commands:
        tiny = ["--size", "64", "--steps", "2", "--repeat", "1"] if setting.dry else ["--repeat", "3"]
        # CPUs have no fp16 products
        dtype = "bf16" if setting.dry else "fp16"
        given = ["--device", setting.device, "--shapes", setting.shapes, "--dtype", dtype, *tiny]
        asked = ["--contenders", contenders, "--stage", stages, "--no-memory"]
        return [["benchmarks/bench_image.py", *given, *asked, "--output", setting.json(name)]]

    return commands


def _picture(setting: Setting) -> Commands:
    model = setting.scratch / f"random-{setting.shapes}"
    layers = ["--text-layers", "1"] if setting.dry else []
    draw = ["benchmarks/random_model.py", str(model), "--shapes", setting.shapes, "--device", setting.device]
    tiny = ["--size", "64", "--steps", "2", "--repeat", "1"] if setting.dry else ["--repeat", "3"]
    given = ["--device", setting.device, "--model", str(model), "--dtype", "bf16" if setting.dry else "fp16"]
    asked = ["--contenders", "sana-edge int8,diffusers", "--stage", "text,decode,picture", "--no-memory"]
    bench = ["benchmarks/bench_image.py", *given, *tiny, *asked, "--output", setting.json("picture")]
    return [[*draw, *layers, "--force"], bench]


_TESTING = ("torch", "transformers", "tokenizers", "diffusers", "pytest")
_BESIDE = ("torch", "transformers", "tokenizers", "diffusers")
_MODEL = ("torch", "transformers", "tokenizers")
OURS_BESIDE = "sana-edge,sana-edge int8,diffusers"


def figure_own(figures: Mapping[str, Any], log: str) -> str:
    """Of scripts that say it themselves."""
    return str(figures.get("figure", "")) or _last(log)


def figure_doctor(figures: Mapping[str, Any], log: str) -> str:
    """Whether the CUDA kernels can run."""
    found = [line.strip() for line in log.splitlines() if "cuda kernels:" in line]
    return found[0][:100] if found else _last(log)


def figure_tests(figures: Mapping[str, Any], log: str) -> str:
    """ "407 passed, 40 skipped", of several runs of pytest one after the other."""
    found = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+) in [\d.]+s", log, re.MULTILINE)
    return "; ".join(text.strip() for text in found) or _last(log)


def figure_kernels(figures: Mapping[str, Any], log: str) -> str:
    """What all kernels of a step take together."""
    rows = figures.get("kernels", [])
    if not rows:
        return _last(log)
    total = sum(row["seconds"] * row["calls_per_step"] for row in rows)
    peak = figures["peaks"]["int8_tops"]
    best = max((row["share_of_int8_peak"] or 0 for row in rows), default=0)
    return f"{len(rows)} kernels, {total * 1e3:.3g} ms a step, best {best:.0%} of {peak:.0f} INT8 TOPS"


def figure_of(stage: str) -> Callable[[Mapping[str, Any], str], str]:
    """The medians of a stage of `bench_image.py`."""

    def figure(figures: Mapping[str, Any], log: str) -> str:
        rows = [row for work in figures.get("works", []) for row in work["rows"] if row["stage"] == stage]
        return ", ".join(f"{row['name']} {row['median']:.3g} s" for row in rows) or _last(log)

    return figure


def _last(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("error:", "E  "))]
    return (errors or lines or [""])[-1][:160]


SANITIZER = "memcheck,racecheck,synccheck"
LOOP = _bench_image("loop", OURS_BESIDE, "step,loop,decode")
COMPILE = _bench_image("compile", "sana-edge int8,diffusers compiled", "step,loop")

STEPS = (
    Step("library", 10, 180, _own("library"), figure_own),
    Step("doctor", 8, 60, _doctor, figure_doctor, _MODEL),
    Step("answers", 4, 60, _own("answers"), figure_own, ()),
    Step("operations", 10, 60, _own("operations", backend="cuda"), figure_own),
    Step("recorded", 14, 60, _own("recorded"), figure_own),
    Step("pictures", 25, 90, _own("pictures"), figure_own, _MODEL),
    Step("kernels", 15, 60, _kernels, figure_kernels),
    Step("triton", 25, 90, _own("triton", "operations", backend="triton"), figure_own, ("torch", "triton")),
    Step("sanitizer", 15, 60, _own("sanitizer", "answers", tools=SANITIZER), figure_own, ()),
    Step("cuda-tests", 45, 120, _operation_tests, figure_tests, (*_TESTING, "xdist")),
    Step("gpu-cuda", 18, 60, _gpu_tests("cuda"), figure_tests, _TESTING),
    Step("gpu-triton", 25, 90, _gpu_tests("triton"), figure_tests, (*_TESTING, "triton")),
    Step("faults", 20, 60, _fault_tests, figure_tests, _TESTING),
    Step("loop", 50, 150, LOOP, figure_of("loop"), _BESIDE),
    Step("picture", 110, 240, _picture, figure_of("picture"), _BESIDE),
    Step("compile", 90, 180, COMPILE, figure_of("loop"), _BESIDE),
)
NAMES = tuple(step.name for step in STEPS)
_TESTS = ("cuda-tests", "gpu-cuda", "gpu-triton", "faults")
SMOKE = NAMES[: NAMES.index("loop")]
SETS = {
    "smoke": SMOKE,
    "checks": tuple(name for name in SMOKE if name not in _TESTS),
    "test": ("library", *_TESTS),
    # the second call, after smoke
    "full": ("library", *NAMES[NAMES.index("loop") :]),
    "all": NAMES,
}
