"""The manifest of an exported folder: which graphs it holds, what goes in and out, what its files must be.

``sana-edge export`` writes it, engines read it; neither torch nor an engine is needed here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

from sana_edge.config import Count, SamplerConfig
from sana_edge.errors import CheckpointError
from sana_edge.store.identify import explain
from sana_edge.store.known_models import BUNDLED, KNOWN
from sana_edge.system import atomic
from sana_edge.system.json_values import Between, Reader, read_json, shown

FILE = "manifest.json"
FORMAT = "sana-edge-onnx"
VERSION = 1
GRAPHS = ("text_encoder", "text_projection", "denoiser", "denoiser_folded", "decoder")
# in folders that were exported with it
ENCODER = "encoder"
INSTRUCTION = "instruction.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"

REMAKE = "`sana-edge export MODEL --output DIR`, with --int8 for an INT8 one, into a new folder"
DAMAGED = f"the folder is damaged or was changed; make it again: {REMAKE}"
_FOREIGN = "give a folder that `sana-edge export MODEL --output DIR` made"

_Size = Annotated[int, Between(1, 1 << 16)]
_Name = Annotated[str, Between(1, 256)]

# of a graph's ports
_DTYPES = ("float32", "float16", "float64", "int64", "int32", "int8", "uint8", "bool")
_SIDE = re.compile(r"(?:\d{1,3}\*)?[A-Za-z]{1,8}")

# what a denoiser computes in
Dtype = Literal["fp32", "fp16", "bf16"]
# a tensor of a graph: numpy's name of its dtype, and its shape with names where it is dynamic
Port = tuple[_Name, Annotated[tuple[int | str, ...], Between(0, 16)]]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph: its file in the folder, and its inputs and outputs in their order."""

    file: str
    inputs: dict[str, Port]
    outputs: dict[str, Port]


@dataclass(frozen=True)
class DecoderPart:
    """A graph of a decoder that comes in several, each of which reads what the one before wrote.

    Attributes:
        graph: its name.
        halo: rows of its input above and below, on which a row of its output depends; None: all rows.
        scale: rows of the output for a row of the input.
        values: that are alive at its peak, for each row and column of the input.
    """

    graph: str
    halo: Annotated[int, Between(0, 1024)] | None
    scale: Annotated[int, Between(1, 64)]
    values: Annotated[int, Between(1, 1 << 24)]


@dataclass(frozen=True)
class StoredFile:
    """What a file of the folder must be: its SHA-256 in hexadecimal digits, and its size."""

    sha256: str
    bytes: Annotated[int, Between(0, 1 << 50)]


@dataclass(frozen=True)
class Source:
    """The model that was exported, and the `sana_edge.store.package.checksum` of each of its components."""

    model: _Name
    checksums: dict[str, str]

    @property
    def argument(self) -> str:
        """The model as commands take it; MODEL for one that was a folder, of which only the name is kept."""
        bundled = os.path.isfile(BUNDLED / self.model / "model_index.json")
        # repositories are "owner/name"
        return self.model if bundled or self.model in KNOWN or "/" in self.model else "MODEL"


@dataclass(frozen=True)
class TextShape:
    """Sizes of the text encoder: hidden (1, T, channels), keys and values (layers, kv_heads, T, head_dim)."""

    channels: _Size
    layers: Count
    kv_heads: Count
    head_dim: Count


@dataclass(frozen=True)
class Manifest:
    """The content of a ``manifest.json``, whose keys are these names.

    Attributes:
        sana_edge: the version that wrote it.
        name: what to show, and to store in a picture.
        dtype: what the denoiser computes in.
        quantization: an INT8 model's scheme, see `sana_edge.store.package.Quantization.summary`.
        native_size: side in pixels of the pictures that the model was trained on.
        size: (width, height) in pixels if the graphs know only that one.
        cell: pixels per latent cell along a side.
        guidance_embeds: whether the denoiser takes the guidance as an input.
        files: all files but the manifest, by their paths in the folder, with slashes.
        verification: how far the graphs are from the torch modules; None where nobody looked.
        decoder_parts: graphs that together do what ``decoder`` does, the first on the whole latent and the
            others on strips of rows; none in folders of earlier versions, and of models that have no such.
        notes: sentences about what the model has, or was made for, that has no effect here.
        text_table_bytes: of the text encoder's embedding table, of which a prompt reads a few rows; 0 in
            folders of earlier versions, which do not say.
    """

    sana_edge: _Name
    name: _Name
    source: Source
    dtype: Dtype
    quantization: _Name | None
    native_size: _Size
    size: tuple[_Size, _Size] | None
    latent_channels: Count
    cell: Count
    guidance_embeds: bool
    sampler: SamplerConfig
    text: TextShape
    graphs: dict[str, Graph]
    files: dict[str, StoredFile]
    verification: dict[str, Any] | None
    decoder_parts: Annotated[tuple[DecoderPart, ...], Between(0, 64)] = ()
    notes: Annotated[tuple[str, ...], Between(0, 64)] = ()
    text_table_bytes: Annotated[int, Between(0, 1 << 40)] = 0

    @classmethod
    def from_dict(cls, data: object, *, where: str) -> Manifest:
        """Read a parsed ``manifest.json``; unknown keys are ignored. ``where`` is the file, for messages.

        Raises:
            CheckpointError: another format, a version newer than this program's, a key that is missing or
                has a value of the wrong kind, a path that leads out of the folder.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = shown(data.get("format")) if isinstance(data, Mapping) else "missing"
            raise CheckpointError(f"{where}: format is {found}, only {FORMAT!r} can be read", _FOREIGN)
        reader = Reader(where, DAMAGED)
        version = reader.convert(data.get("version"), int, "version")
        reader.require(version >= 1, "version", version, f"1 to {VERSION}")
        if version > VERSION:
            raise CheckpointError(
                f"{where}: version is {version}, this sana-edge reads up to {VERSION}", "upgrade sana-edge"
            )
        # which version 1 had not from the beginning, and can do without
        without: dict[str, object] = {"decoder_parts": [], "notes": [], "text_table_bytes": 0}
        manifest: Manifest = reader.convert({**without, **data}, cls)
        _check_values(manifest, reader)
        return manifest

    @property
    def used_graphs(self) -> list[str]:
        """The graphs that a picture needs: models without guidance never run the folded step."""
        return [name for name in GRAPHS if name != "denoiser_folded" or self.sampler.kind != "scm"]

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}

    def export_command(self, *, dtype: str | None = None, size: str | None = None, int8: bool = False) -> str:
        """The command that makes such a folder from the same model, but for what is given."""
        made = None if self.size is None else "{}x{}".format(*self.size)
        kept = None if self.dtype == "fp32" else self.dtype
        return export_command(self.source.argument, dtype=dtype or kept, size=size or made, int8=int8)


def export_command(
    model: str = "MODEL", *, dtype: str | None = None, size: str | None = None, int8: bool = False
) -> str:
    """The command that makes an exported folder, with options that are not None, for hints."""
    options = [*(("--dtype", dtype) if dtype else ()), *(("--size", size) if size else ())]
    return shlex.join(["sana-edge", "export", model, *options, *["--int8"] * int8, "--output", "DIR"])


def is_exported(folder: Path) -> bool:
    """Whether a folder has a manifest and is no model in diffusers layout; `read` says whether it is good."""
    # os.path.isfile, unlike Path.is_file, answers for names that no file system accepts
    return os.path.isfile(folder / FILE) and not os.path.isfile(folder / "model_index.json")


def format_of(folder: Path) -> object:
    """What a folder's manifest says its format is, `FORMAT` if all is well; None where it cannot be read."""
    try:
        data = read_json(folder / FILE)
    except (OSError, ValueError):
        return None
    return data.get("format") if isinstance(data, dict) else None


def read(folder: Path) -> Manifest:
    """Read the manifest of an exported folder and see that every file is there in its size.

    `sana_edge.store.manifest_files.verify` compares their contents.

    Raises:
        CheckpointError: no such folder, no manifest, as `Manifest.from_dict`; or a file is missing or has
            another size. The message names the file.
    """
    path = folder / FILE
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is not a folder", _FOREIGN)
    try:
        data = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {FILE}", _FOREIGN) from None
    except (OSError, ValueError) as error:
        known, hint = explain(path, DAMAGED)
        raise CheckpointError(f"cannot read {path}{known or f': {error}'}", hint) from error
    manifest = Manifest.from_dict(data, where=str(path))
    for name, stored in manifest.files.items():
        _check_size(folder / name, stored.bytes)
    return manifest


def write(manifest: Manifest, folder: Path) -> None:
    """Write ``manifest.json``, the last file of an exported folder.

    Raises:
        CheckpointError: `read` would refuse it.
        SanaError: the file cannot be written.
    """
    content = json.dumps(manifest.to_dict(), indent=2, allow_nan=False)
    Manifest.from_dict(json.loads(content), where=FILE)
    atomic.write_bytes(folder / FILE, f"{content}\n".encode())


def _check_size(path: Path, size: int) -> None:
    try:
        found = os.stat(path).st_size if os.path.isfile(path) else None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}", DAMAGED) from error
    if found is None:
        raise CheckpointError(f"{path} is missing", DAMAGED)
    if found != size:
        known, hint = explain(path, DAMAGED)
        raise CheckpointError(f"{path} has {found} bytes, {FILE} says {size}{known}", hint)


def _check_values(manifest: Manifest, reader: Reader) -> None:
    """What the types do not say."""
    if manifest.size is not None:
        fits = all(side > 0 and side % manifest.cell == 0 for side in manifest.size)
        reader.require(fits, "size", list(manifest.size), f"multiples of {manifest.cell}")
    for name, stored in manifest.files.items():
        reader.require(_is_inside(name), "files", name, "paths inside the folder")
        key, digits = f"files.{name}", set(stored.sha256)
        fits = len(stored.sha256) == 64 and digits <= set("0123456789abcdef")
        reader.require(fits, f"{key}.sha256", stored.sha256, "64 hexadecimal digits")
    for name in GRAPHS:
        reader.require(name in manifest.graphs, "graphs", list(manifest.graphs), f"also {name}")
    for name, graph in manifest.graphs.items():
        for port, (dtype, shape) in {**graph.inputs, **graph.outputs}.items():
            key = f"graphs.{name}.{port}"
            reader.require(dtype in _DTYPES, key, dtype, f"one of {', '.join(_DTYPES)}")
            fits = all(_is_side(side) for side in shape)
            reader.require(fits, key, list(shape), 'numbers, and names such as "h" or "32*h"')
        reader.require(graph.file in manifest.files, f"graphs.{name}.file", graph.file, "a key of files")
        # by other names engines read other formats, in which nobody looks for loops
        reader.require(graph.file.endswith(".onnx"), f"graphs.{name}.file", graph.file, "a name in .onnx")
    _check_parts(manifest, reader)
    for name in (INSTRUCTION, TOKENIZER):
        reader.require(name in manifest.files, "files", list(manifest.files), f"also {name}")


def _check_parts(manifest: Manifest, reader: Reader) -> None:
    for index, part in enumerate(manifest.decoder_parts):
        key, graph = f"decoder_parts.{index}", manifest.graphs.get(part.graph)
        reader.require(graph is not None, f"{key}.graph", part.graph, "a key of graphs")
        assert graph is not None
        ports = [*graph.inputs], [*graph.outputs]
        reader.require(ports == (["x"], ["y"]), f"{key}.graph", part.graph, "a graph of x to y")
        expected = "a number of rows from 0" if index else "null"
        reader.require((part.halo is None) == (index == 0), f"{key}.halo", part.halo, expected)
    scale = math.prod(part.scale for part in manifest.decoder_parts)
    fits = not manifest.decoder_parts or scale == manifest.cell
    reader.require(fits, "decoder_parts", scale, f"scales whose product is the cell, {manifest.cell}")


def _is_side(side: int | str) -> bool:
    return 0 < side < 1 << 31 if isinstance(side, int) else _SIDE.fullmatch(side) is not None


def _is_inside(name: str) -> bool:
    """Whether a path stays in its folder, wherever the folder may be read."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = "\\" not in name and "\0" not in name and not windows.drive and not path.is_absolute()
    return plain and path.as_posix() == name and ".." not in path.parts and name not in ("", ".", FILE)
