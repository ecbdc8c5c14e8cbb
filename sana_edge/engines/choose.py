"""The choice of an engine for an exported folder: which can work on this machine, and which is taken.

The engine "tensorrt" runs on the device "cuda" what `sana-edge build` made; the device "tensorrt" is
onnxruntime's provider of that name, which builds engines of its own. Neither has run on an NVIDIA GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sana_edge.engines.engine import EngineKind, Settings
from sana_edge.engines.onnxruntime import OnnxRuntime
from sana_edge.engines.openvino.backend import OpenVino
from sana_edge.engines.tensorrt.backend import TensorRT
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.store import manifest

_KINDS: dict[str, type[EngineKind]] = {kind.name: kind for kind in (TensorRT, OnnxRuntime, OpenVino)}

NAMES = tuple(_KINDS)
DEVICES = ("auto", "cpu", "gpu", "npu", "cuda", "tensorrt")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# Engines and devices in order of preference. TensorRT where engines have been built. OpenVINO before
# onnxruntime on CPUs, but see `SMALL`: it computes in bf16 where the hardware does, and does not make INT8
# floats again between Q/DQ products.
_PREFERRED: tuple[tuple[str, str], ...] = (
    *(("openvino", "gpu"), ("openvino", "npu"), ("tensorrt", "cuda"), ("onnxruntime", "cuda")),
    *(("openvino", "cpu"), ("onnxruntime", "cpu"), ("onnxruntime", "tensorrt")),
)
# The devices that are meant. Intel's GPUs and NPUs only where they were asked for: nothing says yet that
# those of a laptop are faster.
_MEANT = {"auto": ("cuda", "cpu"), "gpu": ("gpu", "cuda")}

# Bytes of graphs and weights below which auto takes onnxruntime on a CPU. OpenVINO compiles first, and then
# takes a third of onnxruntime's time a step: sana-tiny (14 MB) is drawn sooner by onnxruntime, a 0.6B (4 GB)
# by OpenVINO (benchmarks/results/bench_engines-cold.json, -step-0.6b-1024px.json, -picture-0.6b-1024px.json).
# No published model lies between.
SMALL = 256_000_000

_ANY_GPU = "for Intel's GPU install its driver, for NVIDIA's onnxruntime-gpu; or choose --device cpu"


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
    order, slower = _PREFERRED, dict[str, str]()
    if folder is not None:
        exported = manifest.read(folder)
        settings = replace(settings, folder=folder, dtype=exported.dtype)
        if asked == "auto" and device in ("auto", "cpu"):
            order, slower = _by_size(exported)
    reasons, refused = dict[str, str](), dict[str, SanaError]()
    for name, place in order:
        key = f"{name} {place}"
        if place not in _MEANT.get(device, (device,)):
            continue
        if asked not in ("auto", name):
            reasons[key] = f"{asked} was asked for"
            continue
        try:
            kind = _KINDS[name].probe(place, settings)
        except SanaError as error:
            refused[key] = error
            reasons[key] = _shown(error)
            continue
        if place == "cpu":
            reasons |= {other: reason for other, reason in slower.items() if other not in (key, *refused)}
        return replace(kind, reasons=reasons)
    raise _refusal(asked, device, refused)


def _by_size(exported: manifest.Manifest) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """`_PREFERRED` in the order that suits a model's size, and why not the other one on the CPU."""
    size = sum(file.bytes for name, file in exported.files.items() if name.endswith((".onnx", ".data")))
    shown = f"{size / 1e6:.0f} MB" if size < 1e9 else f"{size / 1e9:.1f} GB"
    if size >= SMALL:
        return _PREFERRED, {"onnxruntime cpu": f"openvino is faster for models of this size, {shown}"}
    reason = f"onnxruntime starts faster with a small model, {shown}; for many pictures choose openvino"
    # a stable sort: only OpenVINO on the CPU goes to the end
    return tuple(sorted(_PREFERRED, key=lambda pair: pair == ("openvino", "cpu"))), {"openvino cpu": reason}


def _refusal(asked: str, device: str, refused: dict[str, SanaError]) -> SanaError:
    """The error where nothing can be used."""
    if (asked, device) == ("tensorrt", "tensorrt"):
        return InvalidInput(
            "device tensorrt is onnxruntime's own TensorRT, not the engines of `sana-edge build`",
            "choose --backend tensorrt and --device cuda for those, or --backend onnxruntime",
        )
    if not refused:
        usable = " or ".join(_KINDS[asked].devices)
        return InvalidInput(f"{asked} does not run on device {device}", f"choose device {usable}")
    message = "; ".join(f"{key}: {error.message}" for key, error in refused.items())
    # What helps most is to build engines where TensorRT works, else the hint of the CPU, which comes last.
    # Only engines that are missing are plain errors.
    errors = list(refused.values())
    telling = next((error for error in errors if type(error) is SanaError), errors[-1])
    several = device == "gpu" and len(errors) > 1 and type(telling) is not SanaError
    return type(telling)(f"no engine can be used, {message}", _ANY_GPU if several else telling.hint)


def _shown(error: SanaError) -> str:
    return f"{error.message}; {error.hint}" if error.hint else error.message


def survey() -> Iterator[tuple[str, bool, str]]:
    """Every engine and device: "openvino cpu", whether it can be used, and with what or why not."""
    for name, kind in _KINDS.items():
        for device in kind.devices:
            try:
                yield f"{name} {device}", True, kind.probe(device, Settings()).title
            except SanaError as error:
                yield f"{name} {device}", False, _shown(error)


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
