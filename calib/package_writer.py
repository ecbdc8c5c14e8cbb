"""Onto the disk: tensors streamed into safetensors shards, and a folder, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor

from sana_edge.errors import CheckpointError, DamagedWeights
from sana_edge.store.weights import save_state
from sana_edge.system import atomic

# tensors held in memory until a file is full; the 16-bit rest and INT8 layers of SANA-0.6B are 682 MB
SHARD_BYTES = 1 << 30


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], folder: Path, *, stem: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write tensors as they come into one file, or into shards with the index that both libraries read.

    Holds ``shard_bytes`` at most, or one tensor where that is larger.

    Args:
        tensors: names and values; each is let go of before the next shard begins.
        folder: exists; until a file is complete its name is not there.
        stem: "diffusion_pytorch_model" for diffusers' components, "model" for transformers'.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: a value is NaN or infinite, or a name comes twice.
        SanaError: a file cannot be written.
    """
    shards: list[Path] = []
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    sizes = [0]
    for name, tensor in tensors:
        check_finite(name, tensor)
        if name in places:
            raise CheckpointError(f"{name} is there twice", "the checkpoint is damaged; download it again")
        if held and sizes[-1] + tensor.nbytes > shard_bytes:
            shards.append(_flush(held, folder, stem, len(shards)))
            sizes.append(0)
        held[name] = tensor
        places[name] = len(shards)
        sizes[-1] += tensor.nbytes
    shards.append(_flush(held, folder, stem, len(shards)))
    _name(shards, places, sum(sizes), folder, stem)
    return sum(sizes)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `DamagedWeights` with the tensor's name if a value is NaN or infinite."""
    if tensor.is_floating_point() and tensor.numel():
        # the extremes of anything with NaN are NaN
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise DamagedWeights(
                f"{name} has values that are not finite ({float(low)} to {float(high)})",
                "the checkpoint is damaged; download it again",
            )


def check_output(output: Path, *, force: bool) -> None:
    """`sana_edge.system.atomic.check_folder` of a model folder."""
    atomic.check_folder(output, force=force, kind="model folder", is_kind=_is_model)


def new_folder(output: Path, *, force: bool = False) -> AbstractContextManager[Path]:
    """`sana_edge.system.atomic.new_folder` of a model folder."""
    return atomic.new_folder(output, force=force, kind="model folder", is_kind=_is_model)


def _is_model(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def copy_files(names: Iterable[str], source: Path, folder: Path) -> None:
    """Copy files by their paths below ``source``; links are followed."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def _flush(held: dict[str, Tensor], folder: Path, stem: str, number: int) -> Path:
    path = folder / f".{stem}.{number}.safetensors"
    save_state(held, path)
    held.clear()
    return path


def _name(shards: list[Path], places: dict[str, int], size: int, folder: Path, stem: str) -> None:
    """Rename shards to the names of the format, which count them."""
    if len(shards) == 1:
        os.replace(shards[0], folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard, name in zip(shards, names, strict=True):
        os.replace(shard, folder / name)
    weight_map = {name: names[place] for name, place in sorted(places.items())}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    atomic.write_json(folder / f"{stem}.safetensors.index.json", index)
