"""Engines that run an exported folder's graphs without torch: which can work here, and which is taken.

An engine is named by what it is, "tensorrt", "onnxruntime" or "openvino", and the device that it computes on.
The engine "tensorrt" runs on the device "cuda" what `sana-edge build` made; the device "tensorrt" is
onnxruntime's provider of that name, which builds engines of its own. Neither has run on an NVIDIA GPU yet.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

from sana_edge.engines.ports import Arrays
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice
from sana_edge.store import manifest
from sana_edge.store.manifest import Port

NAMES = ("tensorrt", "onnxruntime", "openvino")
DEVICES = ("auto", "cpu", "gpu", "npu", "cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# What is tried for a device, the preferred first. TensorRT where engines have been built. OpenVINO before
# onnxruntime on CPUs, but see `SMALL`: it computes in bf16 where the hardware does, and does not make INT8
# floats again between Q/DQ products. Intel's GPUs and NPUs only where they were asked for: nothing says yet
# that those of a laptop are faster.
_NVIDIA = (("tensorrt", "cuda"), ("onnxruntime", "cuda"))
_CPU = (("openvino", "cpu"), ("onnxruntime", "cpu"))
_CANDIDATES = {
    "auto": (*_NVIDIA, *_CPU),
    "cpu": _CPU,
    "gpu": (("openvino", "gpu"), *_NVIDIA),
    "npu": (("openvino", "npu"),),
    "cuda": _NVIDIA,
    "tensorrt": (("onnxruntime", "tensorrt"),),
}
_ON_DEVICE = {
    "tensorrt": ("cuda",),
    "onnxruntime": ("cpu", "cuda", "tensorrt"),
    "openvino": ("cpu", "gpu", "npu"),
}

# Bytes of graphs and weights below which auto takes onnxruntime on a CPU. OpenVINO compiles first, and then
# takes a third of onnxruntime's time a step: sana-tiny (14 MB) is drawn sooner by onnxruntime, a 0.6B (4 GB)
# by OpenVINO (benchmarks/results/bench_engines-cold.json, -step-0.6b-1024px.json, -picture-0.6b-1024px.json).
# No published model lies between.
SMALL = 256_000_000

_ANY_GPU = "for Intel's GPU install its driver, for NVIDIA's onnxruntime-gpu; or choose --device cpu"

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


class Engine(Protocol):
    """One graph, loaded.

    Attributes:
        graph: the name of its file without the ending.
        name, device: as in `EngineKind`.
        precision: what its products compute in, "fp32", "bf16" or "fp16"; INT8 ones stay INT8.
        notes: what happened while loading that a user should know.
    """

    @property
    def graph(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def run(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """Compute the graph's outputs by name, in arrays that are the caller's.

        Contiguous inputs are read where they lie. Where an engine needs a copy, as for a GPU, an array that
        is not writeable is copied once, for as long as the same one is given.

        Raises:
            InvalidInput: a name, dtype or shape that the graph does not have.
            OutOfMemory: its memory does not suffice.
            SanaError: the engine failed, or was closed.
        """

    def close(self) -> None:
        """Free its memory; it cannot run any more."""


@dataclass(frozen=True)
class Settings:
    """How engines compute. None and "auto" leave it to what suits the machine.

    Attributes:
        threads: on the CPU.
        precision: one of `PRECISIONS`, of what is not INT8.
        cache: where compiled graphs are kept; on a CPU none are kept unless this says where.
        dtype: the exported folder's, where it is known.
        engine_folder: where `sana-edge build` put TensorRT's engines; None for the user's own.
        trust_engine: load them also from elsewhere than the user's own folder, which runs the code in them.
    """

    threads: int | None = None
    precision: str = "auto"
    cache: Path | None = None
    dtype: str | None = None
    engine_folder: Path | None = None
    trust_engine: bool = False


@dataclass(frozen=True)
class EngineKind:
    """What was chosen; ``reasons`` has for each that is preferred to it why it is not used, and what helps.

    Attributes:
        name: one of `NAMES`.
        device: one of `DEVICES`.
        precision: "fp32", "bf16", "fp16".
        title: with its version and device, for a person.
    """

    name: str
    device: str
    precision: str
    title: str
    settings: Settings
    reasons: Mapping[str, str] = field(default_factory=dict)

    def load(
        self,
        path: Path,
        inputs: Mapping[str, Port] | None = None,
        outputs: Mapping[str, Port] | None = None,
    ) -> Engine:
        """Load one graph.

        Args:
            path: of the ``.onnx``; its external data lies beside it.
            inputs, outputs: the ports of the folder's manifest, which name the sides of shapes. Without them
                the engine's own knowledge has to do.

        Raises:
            CheckpointError: the file or its data is damaged or missing, or has what the engine cannot do.
            UnsupportedDevice: the device refuses it.
            OutOfMemory: it does not fit.
        """
        engine: Engine = _module(self.name).load(self, path, inputs, outputs)
        return engine


def choose(
    asked: str = "auto", device: str = "auto", folder: Path | None = None, settings: Settings | None = None
) -> EngineKind:
    """The fastest engine that works on this machine, or the one asked for.

    Args:
        asked: "auto" or one of `NAMES`.
        device: one of `DEVICES`.
        folder: an exported folder: its dtype is what an engine must be able to compute, on a CPU its size
            decides (`SMALL`), and TensorRT is left out unless all of its engines have been built.

    Raises:
        InvalidInput: unknown name, device or precision, or two that do not go together.
        MissingDependency, UnsupportedDevice: none of what was asked for can be used; the hint says how.
        SanaError: TensorRT was asked for, and an engine is missing; the hint has the command that builds it.
        CheckpointError: the folder has no manifest.
    """
    settings = settings or Settings()
    _check(asked, device, settings)
    candidates, slower = _CANDIDATES[device], dict[str, str]()
    if folder is not None:
        exported = manifest.read(folder)
        settings = replace(settings, dtype=exported.dtype)
        if asked == "auto" and device in ("auto", "cpu"):
            candidates, slower = _by_size(candidates, exported)
    reasons, refused = dict[str, str](), dict[str, SanaError]()
    for name, place in candidates:
        key = f"{name} {place}"
        if asked not in ("auto", name):
            reasons[key] = f"{asked} was asked for"
            continue
        try:
            title, precision = _module(name).probe(place, settings)
            if name == "tensorrt" and folder is not None:
                _module(name).check_built(folder, settings)
        except SanaError as error:
            refused[key] = error
            reasons[key] = _shown(error)
            continue
        if place == "cpu":
            reasons |= {other: reason for other, reason in slower.items() if other not in (key, *refused)}
        return EngineKind(name, place, precision, title, settings, reasons)
    if not refused:
        raise _misplaced(asked, device)
    message = "; ".join(f"{key}: {error.message}" for key, error in refused.items())
    # What helps most is to build engines where TensorRT works, else the hint of the CPU, which comes last.
    # Only engines that are missing are plain errors.
    errors = list(refused.values())
    telling = next((error for error in errors if type(error) is SanaError), errors[-1])
    several = device == "gpu" and len(errors) > 1 and type(telling) is not SanaError
    raise type(telling)(f"no engine can be used, {message}", _ANY_GPU if several else telling.hint)


def _by_size(
    candidates: tuple[tuple[str, str], ...], exported: manifest.Manifest
) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """The candidates in the order that suits a model's size, and why not the other one on the CPU."""
    size = sum(file.bytes for name, file in exported.files.items() if name.endswith((".onnx", ".data")))
    shown = f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
    if size >= SMALL:
        return candidates, {"onnxruntime cpu": f"openvino is faster for models of this size, {shown}"}
    rest = tuple(candidate for candidate in candidates if candidate not in _CPU)
    reason = f"onnxruntime starts faster with a small model, {shown}; for many pictures choose openvino"
    return (*rest, *reversed(_CPU)), {"openvino cpu": reason}


def _shown(error: SanaError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def _misplaced(asked: str, device: str) -> InvalidInput:
    if (asked, device) == ("tensorrt", "tensorrt"):
        return InvalidInput(
            "device tensorrt is onnxruntime's own TensorRT, not the engines of `sana-edge build`",
            "choose --backend tensorrt and --device cuda for those, or --backend onnxruntime",
        )
    usable = " or ".join(_ON_DEVICE[asked])
    return InvalidInput(f"{asked} does not run on device {device}", f"choose device {usable}")


def survey() -> Iterator[tuple[str, bool, str]]:
    """Every engine and device: "openvino cpu", whether it can be used, and with what or why not."""
    for name, places in _ON_DEVICE.items():
        for place in places:
            try:
                yield f"{name} {place}", True, _module(name).probe(place, Settings())[0]
            except SanaError as error:
                yield f"{name} {place}", False, _shown(error)


def cpu_threads(asked: int | None = None) -> int | None:
    """How many threads to compute with: what was asked for, OMP_NUM_THREADS, or the physical cores.

    Of the cores those that this process may use, within a container's quota. None where the system does not
    tell, and the engine counts for itself.
    """
    if asked is not None:
        return asked
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    # two hardware threads of a core have the same siblings
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _quota() -> int:
    """The cores that a container may keep busy, rounded up; a large number without a limit."""
    limit, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if limit.isdecimal() and period.isdecimal() and int(period):
        return math.ceil(int(limit) / int(period))
    return 1 << 16


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _module(name: str) -> ModuleType:
    home = "tensorrt.backend" if name == "tensorrt" else name
    return importlib.import_module(f"sana_edge.engines.{home}")


def _check(asked: str, device: str, settings: Settings) -> None:
    for value, what, known in (
        (asked, "engine", ("auto", *NAMES)),
        (device, "device", DEVICES),
        (settings.precision, "precision", PRECISIONS),
    ):
        if value not in known:
            raise InvalidInput(f"unknown {what} {value!r}", f"choose {', '.join(known)}")
    if settings.threads is not None and settings.threads < 1:
        raise InvalidInput(f"threads is {settings.threads}", "choose a positive number")


def unusable_device(name: str, device: str) -> UnsupportedDevice:
    """For a device that an engine has no code for."""
    return UnsupportedDevice(f"{name} does not run on {device}", f"choose {' or '.join(_ON_DEVICE[name])}")


def shown_threads(threads: int | None) -> str:
    """As in "2 threads"."""
    return "its own number of threads" if threads is None else f"{threads} thread{'s' * (threads != 1)}"
