"""Onto the disk: tensors streamed into safetensors shards, and a folder, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.weights import save_state

# tensors held in memory until a file is full; the 16-bit rest and INT8 layers of SANA-0.6B are 682 MB
SHARD_BYTES = 1 << 30

_HINT = "check the free space and the permissions, or choose another --output"


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
    """Raise `CheckpointError` with the tensor's name if a value is NaN or infinite."""
    if tensor.is_floating_point() and tensor.numel():
        # the extremes of anything with NaN are NaN
        low, high = tensor.aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise CheckpointError(
                f"{name} has values that are not finite ({float(low)} to {float(high)})",
                "the checkpoint is damaged; download it again",
            )


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file that people can read; NaN and infinity, which JSON lacks, are an error."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def check_output(output: Path, *, force: bool) -> None:
    """See that a folder can be made at ``output``, before any work.

    Raises:
        InvalidInput: something is there; ``force`` replaces an empty folder or a model folder, nothing else.
        SanaError: the folder above cannot be written.
    """
    if os.path.lexists(output):
        if output.is_symlink() or not output.is_dir():
            raise InvalidInput(f"{output} exists and is not a folder", "choose another --output")
        if any(output.iterdir()) and not (output / "model_index.json").is_file():
            raise InvalidInput(
                f"{output} exists, is not empty and no model folder", "choose another --output"
            )
        # said only where it helps
        if not force:
            raise InvalidInput(f"{output} exists", "choose another --output, or add --force")
    with _temporary(output):
        pass


@contextlib.contextmanager
def new_folder(output: Path, *, force: bool = False) -> Iterator[Path]:
    """Give an empty folder beside ``output`` to write in; at the end, and only then, it gets that name.

    Raises:
        InvalidInput, SanaError: as `check_output`; or a file could not be written inside.
    """
    check_output(output, force=force)
    with _temporary(output) as temporary:
        folder = temporary / "new"
        folder.mkdir()
        yield folder
        _replace(folder, output, temporary / "old", force=force)


def _replace(folder: Path, output: Path, old: Path, *, force: bool) -> None:
    """Rename ``folder`` to ``output``; what is there goes to ``old``, and comes back if that fails."""
    try:
        if os.path.lexists(output):
            check_output(output, force=force)
            os.rename(output, old)
        os.rename(folder, output)
    except BaseException:
        if old.exists() and not os.path.lexists(output):
            os.rename(old, output)
        raise


@contextlib.contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
            yield Path(name)
    except OSError as error:
        raise SanaError(f"cannot write {output}: {error}", _HINT) from error


def copy_files(names: Iterable[str], source: Path, folder: Path) -> None:
    """Copy files by their paths below ``source``; links are followed."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)


def _flush(held: dict[str, Tensor], folder: Path, stem: str, number: int) -> Path:
    path = folder / f".{stem}.{number}.safetensors"
    save_state(held, path)
    # the library makes files that only their owner reads
    path.chmod(folder.stat().st_mode & 0o666)
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
    write_json(index, folder / f"{stem}.safetensors.index.json")
