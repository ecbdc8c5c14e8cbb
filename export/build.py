"""TensorRT engines of an exported folder: their profiles, and the building of those that are missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sana_edge.engines.tensorrt import cache
from sana_edge.engines.tensorrt import profiles as engine_profiles
from sana_edge.engines.tensorrt.backend import check_version, key_of
from sana_edge.engines.tensorrt.cache import Entry, Machine
from sana_edge.engines.tensorrt.cuda import machine
from sana_edge.engines.tensorrt.profiles import Size, Sizes
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.export import tensorrt
from sana_edge.progress import Progress, unseen
from sana_edge.store import manifest
from sana_edge.store.manifest import Manifest

# the size of an engine by that of its graph: TensorRT keeps kernels in it, and some weights in two layouts
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
    """The size that an engine of a graph may have: its file and the data beside it, and some more."""
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
    *,
    trt: Any,
    cuda: Any,
    workspace: float | None = None,
    precision: str | None = None,
    force: bool = False,
    progress: Progress = unseen,
    on_message: Callable[[str], None] = lambda line: None,
) -> list[Entry]:
    """Build what is not there yet, or with ``force`` everything.

    Args:
        folder: exported, its files verified.
        output: gets the engines; made where it is missing.
        trt, cuda: the modules ``tensorrt`` and ``cuda.bindings.runtime``.
        workspace: GB, see `sana_edge.export.tensorrt.check_workspace`.
        precision: "fp16", "bf16" or "int8", to be refused if the export has another.
        progress: called with the phase of the build, from any thread.
        on_message: called with a line about each graph.

    Raises:
        SanaError: the folder cannot be written, the disk has not enough space, or as
            `sana_edge.export.tensorrt.build`. What was built before stays.
    """
    here = machine(cuda, check_version(trt, exported.dtype))
    tensorrt.check_precision(exported, precision, here.capability)
    instruction, timing = instruction_length(folder), output / timing_name(here)
    cache.prepare(output)
    entries = []
    for name in exported.used_graphs:
        graph, key = exported.graphs[name], key_of(exported, name, here)
        profiles = engine_profiles.graph_profiles(name, graph.inputs, sizes, exported.cell, instruction)
        options = {"profiles": profiles, "workspace": workspace}
        entry = None if force else cache.current(output, key, options, sizes)
        found = entry is not None
        if entry is None:
            check_space(output, needed_bytes(exported, name))
            content = tensorrt.build(
                *(trt, folder / graph.file, profiles),
                workspace=workspace,
                timing=timing,
                progress=progress,
            )
            entry = cache.store(output, key, options, folder, content, sizes)
        on_message(f"{name}: {'there already' if found else 'built'}, {entry.bytes / 1e6:.0f} MB")
        entries.append(entry)
    return entries


def check_space(folder: Path, needed: int) -> None:
    """Check that a folder's disk has space for an engine, before it is built.

    Raises:
        SanaError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SanaError(
            f"{folder} has {free / 1e9:.1f} GB free, an engine of this graph may need {needed / 1e9:.1f} GB",
            "free some space, or choose another folder with --output",
        )
