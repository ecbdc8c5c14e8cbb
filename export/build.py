"""All engines of an exported folder: what each needs, which are there, and the building of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sana_edge.engines.tensorrt import profiles as engine_profiles
from sana_edge.engines.tensorrt.backend import check_version, key_of
from sana_edge.engines.tensorrt.builds import build_once
from sana_edge.engines.tensorrt.cache import Entry, Machine
from sana_edge.engines.tensorrt.cuda import machine
from sana_edge.engines.tensorrt.profiles import Size, Sizes
from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.export import tensorrt
from sana_edge.export.tensorrt import Options, Told
from sana_edge.store import manifest
from sana_edge.store.manifest import Manifest

# what an engine is larger than its graph: TensorRT keeps kernels in it, and some weights in two layouts
_GROWTH = 1.3
# graphs with weights in the file of another one: some of them, but that one needs as much right after
_SHARED = {"text_projection": "denoiser", "denoiser_folded": "denoiser"}


def picture_sizes(
    exported: Manifest, minimum: Size | None, optimum: Size | None, maximum: Size | None
) -> tuple[Sizes, ...]:
    """The profiles of a build.

    Raises:
        InvalidInput: sizes that do not ascend, or any where the export knows only one.
    """
    if exported.size is None:
        return engine_profiles.choose_sizes(exported.native_size, minimum, optimum, maximum)
    if any(size not in (None, exported.size) for size in (minimum, optimum, maximum)):
        raise InvalidInput(
            f"the exported graphs know only the size {engine_profiles.shown(exported.size)}",
            f"for others: `{exported.export_command(size='dynamic')}`",
        )
    return (Sizes(exported.size, exported.size, exported.size),)


def instruction_length(folder: Path) -> int:
    """Tokens of the instruction before every prompt.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = folder / manifest.INSTRUCTION
    try:
        with safe_open(path, framework="numpy") as file:
            return int(file.get_slice("ids").get_shape()[0])
    except Exception as error:  # safetensors has an exception class of its own, which is none of OSError's
        raise CheckpointError(f"cannot read {path}: {error}", manifest.DAMAGED) from error


def needed_bytes(exported: Manifest, graph: str) -> int:
    """What an engine of a graph may need on the disk: its file and the data beside it, and some more."""
    stems = {name: name.partition(".")[0] for name in exported.files if "/" not in name}
    own, begins = exported.graphs[graph].file, (graph, _SHARED.get(graph, graph))
    data = [name for name, stem in stems.items() if not name.endswith(".onnx") and stem in begins]
    return int(sum(exported.files[name].bytes for name in (own, *data)) * _GROWTH)


def timing_name(here: Machine) -> str:
    """The file of TensorRT's measurements, which hold for one kind of GPU and one version."""
    gpu = "".join(letter if letter.isalnum() else "-" for letter in here.gpu)
    return f"{gpu}-sm{here.capability[0]}{here.capability[1]}.trt{here.tensorrt}.timing"


def build_engines(
    folder: Path,
    output: Path,
    exported: Manifest,
    sizes: Sequence[Sizes],
    options: Options,
    *,
    trt: Any,
    cuda: Any,
    precision: str | None = None,
    force: bool = False,
    told: Told = lambda name, done, count: None,
    said: Callable[[str], None] = lambda text: None,
) -> list[Entry]:
    """Build what is not there yet, or with ``force`` everything.

    Args:
        folder: exported, its files verified.
        output: gets the engines; made where it is missing.
        trt, cuda: the modules ``tensorrt`` and ``cuda.bindings.runtime``.
        precision: "fp16", "bf16" or "int8", to be refused if the export has another.
        told: how far a phase of the build is.
        said: a line about each graph.

    Raises:
        SanaError: as `sana_edge.engines.tensorrt.builds.build_once` and `sana_edge.export.tensorrt.build`.
    """
    here = machine(cuda, check_version(trt, exported.dtype))
    tensorrt.check_precision(exported, precision, here.capability)
    instruction = instruction_length(folder)
    built = []
    for name in exported.used_graphs:
        graph = exported.graphs[name]
        profiles = engine_profiles.graph_profiles(name, graph.inputs, sizes, exported.cell, instruction)

        def make(target: Path, onnx: Path = folder / graph.file, profiles: Any = profiles) -> None:
            timing = output / timing_name(here)
            tensorrt.build(trt, onnx, profiles, options, target, timing=timing, told=told)

        entry, made = build_once(
            output,
            key_of(exported, name, here),
            {**vars(options), "profiles": profiles},
            folder,
            make,
            needed=needed_bytes(exported, name),
            sizes=sizes,
            force=force,
            on_wait=lambda holder, name=name: said(f"{name}: {holder} builds it, waiting"),  # type: ignore[misc]
        )
        said(f"{name}: {'built' if made else 'there already'}, {entry.bytes / 1e6:.0f} MB")
        built.append(entry)
    return built
