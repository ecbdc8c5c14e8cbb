"""The steps of `gpu_check`: what each runs, how long it may take, and what its figure is.

Estimates are seconds on a data-centre GPU (H100 or H200) with 16 cores and a carried library: "smoke" adds up
to less than 4 minutes, "all" to less than 9. A limit is two to four times the estimate.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_figures

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
    def library(self) -> Path:
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


def _library(setting: Setting) -> Commands:
    carried = ["--carried", str(setting.carried)] if setting.carried else []
    dry = ["--emulated", "890"] if setting.dry else []
    script = "benchmarks/gpu_library.py"
    return [[script, str(setting.library), *carried, *dry, "--output", setting.json("library")]]


def _doctor(setting: Setting) -> Commands:
    return [["-m", "sana_edge", "doctor"]]


def _answers(tools: str) -> Callable[[Setting], Commands]:
    def commands(setting: Setting) -> Commands:
        name = "sanitizer" if tools else "answers"
        dry = ["--emulated"] if setting.dry else []
        given = ["--library", str(setting.library), "--folder", str(setting.scratch / name)]
        asked = ["--tools", tools] if tools else []
        return [["benchmarks/check_answers.py", *given, *asked, *dry, "--output", setting.json(name)]]

    return commands


def _checked(script: str, name: str, *arguments: str) -> Callable[[Setting], Commands]:
    """A script that takes --device, --shapes and --output."""

    def commands(setting: Setting) -> Commands:
        common = ["--device", setting.device, "--shapes", setting.shapes, "--output", setting.json(name)]
        return [[f"benchmarks/{script}", *arguments, *common]]

    return commands


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
_CHECKS = "check_operations.py"

STEPS = (
    Step("library", 10, 180, _library, gpu_figures.own),
    Step("doctor", 8, 60, _doctor, gpu_figures.doctor, _MODEL),
    Step("answers", 4, 60, _answers(""), gpu_figures.own, ()),
    Step("operations", 10, 60, _checked(_CHECKS, "operations", "--backend=cuda"), gpu_figures.own),
    Step("recorded", 14, 60, _checked("check_recorded.py", "recorded"), gpu_figures.own),
    Step("pictures", 25, 90, _checked("check_pictures.py", "pictures"), gpu_figures.own, _MODEL),
    Step("kernels", 15, 60, _kernels, gpu_figures.kernels),
    Step(
        "triton",
        25,
        90,
        _checked(_CHECKS, "triton", "--backend=triton"),
        gpu_figures.own,
        ("torch", "triton"),
    ),
    Step("sanitizer", 15, 60, _answers("memcheck,racecheck,synccheck"), gpu_figures.own, ()),
    Step("cuda-tests", 45, 120, _operation_tests, gpu_figures.tests, (*_TESTING, "xdist")),
    Step("gpu-cuda", 18, 60, _gpu_tests("cuda"), gpu_figures.tests, _TESTING),
    Step("gpu-triton", 25, 90, _gpu_tests("triton"), gpu_figures.tests, (*_TESTING, "triton")),
    Step("faults", 20, 60, _fault_tests, gpu_figures.tests, _TESTING),
    Step(
        "loop",
        50,
        150,
        _bench_image("loop", OURS_BESIDE, "step,loop,decode"),
        gpu_figures.loop,
        _BESIDE,
    ),
    Step("picture", 110, 240, _picture, gpu_figures.picture, _BESIDE),
    Step(
        "compile",
        90,
        180,
        _bench_image("compile", "sana-edge int8,diffusers compiled", "step,loop"),
        gpu_figures.loop,
        _BESIDE,
    ),
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
