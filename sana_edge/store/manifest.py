"""The manifest of an exported folder: which graphs it holds, what goes in and out, what its files must be.

``sana-edge export`` writes it, engines read it; neither torch nor an engine is needed here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from sana_edge.config import SamplerConfig
from sana_edge.errors import CheckpointError
from sana_edge.store.identify import explain
from sana_edge.store.json_values import Reader
from sana_edge.store.known_models import BUNDLED, KNOWN
from sana_edge.system import atomic

FILE = "manifest.json"
FORMAT = "sana-edge-onnx"
VERSION = 1
GRAPHS = ("text_encoder", "text_projection", "denoiser", "denoiser_folded", "decoder")
INSTRUCTION = "instruction.safetensors"
TOKENIZER = "tokenizer/tokenizer.json"

REMAKE = "`sana-edge export MODEL --output DIR`, with --int8 for an INT8 one, into a new folder"
DAMAGED = f"the folder is damaged or was changed; make it again: {REMAKE}"
_FOREIGN = "give a folder that `sana-edge export MODEL --output DIR` made"

# what a denoiser computes in
Dtype = Literal["fp32", "fp16", "bf16"]
# a tensor of a graph: numpy's name of its dtype, and its shape with names where it is dynamic
Port = tuple[str, tuple[int | str, ...]]


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
    halo: int | None
    scale: int
    values: int


@dataclass(frozen=True)
class StoredFile:
    """What a file of the folder must be: its SHA-256 in hexadecimal digits, and its size."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Source:
    """The model that was exported, and the `sana_edge.store.package.checksum` of each of its components."""

    model: str
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

    channels: int
    layers: int
    kv_heads: int
    head_dim: int


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
    """

    sana_edge: str
    name: str
    source: Source
    dtype: Dtype
    quantization: str | None
    native_size: int
    size: tuple[int, int] | None
    latent_channels: int
    cell: int
    guidance_embeds: bool
    sampler: SamplerConfig
    text: TextShape
    graphs: dict[str, Graph]
    files: dict[str, StoredFile]
    verification: dict[str, Any] | None
    decoder_parts: tuple[DecoderPart, ...] = ()

    @classmethod
    def from_dict(cls, data: object, *, where: str) -> Manifest:
        """Read a parsed ``manifest.json``; unknown keys are ignored. ``where`` is the file, for messages.

        Raises:
            CheckpointError: another format, a version newer than this program's, a key that is missing or
                has a value of the wrong kind, a path that leads out of the folder.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = repr(data.get("format")) if isinstance(data, Mapping) else "missing"
            raise CheckpointError(f"{where}: format is {found}, only {FORMAT!r} can be read", _FOREIGN)
        reader = Reader(where, DAMAGED)
        version = reader.convert(data.get("version"), int, "version")
        reader.require(version >= 1, "version", version, f"1 to {VERSION}")
        if version > VERSION:
            raise CheckpointError(
                f"{where}: version is {version}, this sana-edge reads up to {VERSION}", "upgrade sana-edge"
            )
        # which version 1 had not from the beginning, and can do without
        manifest: Manifest = reader.convert({"decoder_parts": [], **data}, cls)
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
        data = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
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
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {FILE}", _FOREIGN) from None
    except (OSError, ValueError, RecursionError) as error:
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
    numbers: dict[str, float] = {
        name: getattr(manifest, name) for name in ("native_size", "latent_channels", "cell")
    }
    numbers |= {f"text.{name}": value for name, value in vars(manifest.text).items()}
    numbers |= {f"sampler.{name}": value for name, value in vars(manifest.sampler).items() if name != "kind"}
    for key, value in numbers.items():
        reader.require(0 < value < math.inf, key, value, "a positive number")
    if manifest.size is not None:
        fits = all(side > 0 and side % manifest.cell == 0 for side in manifest.size)
        reader.require(fits, "size", list(manifest.size), f"multiples of {manifest.cell}")
    for name, stored in manifest.files.items():
        reader.require(_is_inside(name), "files", name, "paths inside the folder")
        key, digits = f"files.{name}", set(stored.sha256)
        fits = len(stored.sha256) == 64 and digits <= set("0123456789abcdef")
        reader.require(fits, f"{key}.sha256", stored.sha256, "64 hexadecimal digits")
        reader.require(stored.bytes >= 0, f"{key}.bytes", stored.bytes, "a size")
    for name in GRAPHS:
        reader.require(name in manifest.graphs, "graphs", list(manifest.graphs), f"also {name}")
    for name, graph in manifest.graphs.items():
        reader.require(graph.file in manifest.files, f"graphs.{name}.file", graph.file, "a key of files")
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
        reader.require(part.halo is None or part.halo >= 0, f"{key}.halo", part.halo, expected)
        for name, value in (("scale", part.scale), ("values", part.values)):
            reader.require(value > 0, f"{key}.{name}", value, "a positive number")


def _is_inside(name: str) -> bool:
    """Whether a path stays in its folder, wherever the folder may be read."""
    path, windows = PurePosixPath(name), PureWindowsPath(name)
    plain = "\\" not in name and "\0" not in name and not windows.drive and not path.is_absolute()
    return plain and path.as_posix() == name and ".." not in path.parts and name not in ("", ".", FILE)
