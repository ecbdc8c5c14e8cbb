"""Engines that run an exported folder's graphs without torch: which can work here, and which is taken.

An engine is named by what it is, "openvino" or "onnxruntime", and the device that it computes on.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from numpy.typing import NDArray

from sana_edge import manifest
from sana_edge.engine_ports import Arrays
from sana_edge.errors import InvalidInput, SanaError, UnsupportedDevice
from sana_edge.manifest import Port

NAMES = ("onnxruntime", "openvino")
DEVICES = ("auto", "cpu", "gpu", "npu", "cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# What is tried for a device, the preferred first. OpenVINO before onnxruntime on CPUs: it computes in bf16
# where the hardware does, and does not make INT8 floats again between Q/DQ products. Intel's GPUs and NPUs
# only where they were asked for: nothing says yet that those of a laptop are faster.
_CANDIDATES = {
    "auto": (("onnxruntime", "cuda"), ("openvino", "cpu"), ("onnxruntime", "cpu")),
    "cpu": (("openvino", "cpu"), ("onnxruntime", "cpu")),
    "gpu": (("openvino", "gpu"), ("onnxruntime", "cuda")),
    "npu": (("openvino", "npu"),),
    "cuda": (("onnxruntime", "cuda"),),
    "tensorrt": (("onnxruntime", "tensorrt"),),
}
_ON_DEVICE = {"onnxruntime": ("cpu", "cuda", "tensorrt"), "openvino": ("cpu", "gpu", "npu")}

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
    """

    threads: int | None = None
    precision: str = "auto"
    cache: Path | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class EngineKind:
    """What was chosen; ``reasons`` has for each that is preferred to it why it is not used.

    Attributes:
        name: "openvino" or "onnxruntime".
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
        folder: an exported folder, whose dtype an engine must be able to compute.

    Raises:
        InvalidInput: unknown name, device or precision, or two that do not go together.
        MissingDependency, UnsupportedDevice: none of what was asked for can be used; the hint says how.
        CheckpointError: the folder has no manifest.
    """
    settings = settings or Settings()
    _check(asked, device, settings)
    if folder is not None:
        known = manifest.read(folder).dtype
        settings = Settings(settings.threads, settings.precision, settings.cache, known)
    reasons: dict[str, str] = {}
    refused: SanaError | None = None
    for name, place in _CANDIDATES[device]:
        key = f"{name} {place}"
        if asked not in ("auto", name):
            reasons[key] = f"{asked} was asked for"
            continue
        try:
            title, precision = _module(name).probe(place, settings)
        except SanaError as error:
            # the reason that helps most is that of the CPU, which everyone has
            refused = error
            reasons[key] = error.message
            continue
        return EngineKind(name, place, precision, title, settings, reasons)
    if refused is None:
        usable = " or ".join(_ON_DEVICE[asked])
        raise InvalidInput(f"{asked} does not run on device {device}", f"choose device {usable}")
    message = "; ".join(f"{key}: {reason}" for key, reason in reasons.items() if "asked for" not in reason)
    raise type(refused)(f"no engine can be used, {message}", refused.hint)


def survey() -> Iterator[tuple[str, bool, str]]:
    """Every engine and device: "openvino cpu", whether it can be used, and with what or why not."""
    for name, places in _ON_DEVICE.items():
        for place in places:
            try:
                yield f"{name} {place}", True, _module(name).probe(place, Settings())[0]
            except SanaError as error:
                yield (
                    f"{name} {place}",
                    False,
                    f"{error.message}; {error.hint}" if error.hint else error.message,
                )


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
    return importlib.import_module(f"sana_edge.engine_{name}")


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
