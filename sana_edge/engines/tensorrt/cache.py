"""TensorRT engines on disk: their keys, and the files of each.

An engine fits one model, GPU, TensorRT version and driver, and is code: loading one runs what is in it.
Beside ``NAME.engine`` lies ``NAME.engine.json`` with what it was built from, for and with, and its checksum.
Neither torch nor TensorRT is needed here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from sana_edge.engines.tensorrt.profiles import Size, Sizes, size_flags
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store import package
from sana_edge.store.cache import VARIABLE, user_cache
from sana_edge.system import atomic
from sana_edge.system.json_values import Between, Reader, read_json

FORMAT = "sana-edge-engine"
VERSION = 1

_Sides = tuple[Annotated[int, Between(1, 1 << 16)], Annotated[int, Between(1, 1 << 16)]]
_UNSAFE = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class Machine:
    """What an engine is bound to: the GPU's name and compute capability, the TensorRT and driver versions."""

    gpu: str
    capability: tuple[int, int]
    tensorrt: str
    driver: str


@dataclass(frozen=True)
class Key:
    """What tells engines apart: the model (`model_checksum`), its graph and the machine."""

    model: str
    checksum: str
    graph: str
    machine: Machine

    @property
    def name(self) -> str:
        """The engine's file name: readable parts, and a digest of all that they leave out."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()
        machine = self.machine
        gpu = f"{machine.gpu}-sm{machine.capability[0]}{machine.capability[1]}"
        parts = (self.model, self.graph, gpu, f"trt{machine.tensorrt}", f"driver{machine.driver}", digest[:8])
        # the longest file name that file systems take is 255 bytes
        return ".".join(_UNSAFE.sub("-", part).strip("-.")[:40] for part in parts) + ".engine"


@dataclass(frozen=True)
class Entry:
    """An engine that is there.

    Attributes:
        options: what it was built with: ``profiles`` and ``workspace``.
        source: the exported folder it was built from, for the command that builds it again.
        sizes: what its profiles were made of, for the same; several are those of a build without sizes.
    """

    path: Path
    key: Key
    options: Mapping[str, Any]
    source: str
    sha256: str
    bytes: int
    sizes: tuple[Sizes, ...] = ()

    def rebuild(self, wanted: Size | None = None, *, folder: Path | None = None, force: bool = False) -> str:
        """The command that builds it again, with what it was built with.

        Args:
            wanted: (width, height) in pixels that it has to take besides.
            folder: where to instead.
            force: also where it is there and whole.
        """
        flags = size_flags(self.sizes, wanted)
        workspace = self.options.get("workspace")
        flags += [] if workspace is None else ["--workspace", str(workspace)]
        return build_command(self.source, folder or self.path.parent, *flags, *["--force"] * force)


def build_command(source: str | Path, folder: Path, *flags: str) -> str:
    """The command that builds what a folder lacks."""
    return shlex.join(["sana-edge", "build", str(source), "--output", str(folder), *flags])


def engine_folder() -> Path:
    """Where this user's own engines are, the only ones loaded without ``--trust-engine``; may not exist.

    Raises:
        SanaError: the user has no home folder.
    """
    cache = user_cache()
    if cache is None:
        raise SanaError("this user has no home folder to keep engines in", f"set {VARIABLE} to a folder")
    return cache / "engines"


def model_checksum(files: Mapping[str, str]) -> str:
    """One checksum of an exported model's graphs and weights, from each file's SHA-256 by its name."""
    graphs = sorted((name, sha256) for name, sha256 in files.items() if "/" not in name)
    return hashlib.sha256(json.dumps(graphs).encode()).hexdigest()


def entries(folder: Path) -> list[Entry]:
    """The engines of a folder, by their sidecars; what cannot be read is no engine."""
    found = (read_entry(path) for path in sorted(folder.glob("*.engine.json")))
    return [entry for entry in found if entry is not None]


def find(folder: Path, key: Key, source: str | Path) -> Entry:
    """The engine for a key.

    Args:
        source: the exported folder that wants it.

    Raises:
        SanaError: there is none. Says what the nearest is for, and the command that builds the right one.
    """
    there = [dataclasses.replace(entry, source=str(source)) for entry in entries(folder)]
    reasons = [(entry, differs(entry, key)) for entry in there if entry.key.graph == key.graph]
    for entry, reason in reasons:
        if not reason:
            return entry
    # as the other graphs of the model were built, or this one for another machine
    like = [entry for entry in there if entry.key.checksum == key.checksum]
    like.sort(key=lambda entry: entry.key.machine != key.machine)
    hint = f"build it: {like[0].rebuild() if like else build_command(source, folder)}"
    if not reasons:
        raise SanaError(f"{folder} has no engine of {key.model}'s {key.graph}", hint)
    # an engine of the same model is nearer than one of the same machine
    entry, reason = min(reasons, key=lambda pair: pair[0].key.checksum != key.checksum)
    raise SanaError(f"{entry.path.name} is an engine {reason}", hint)


def differs(entry: Entry, key: Key) -> str:
    """Why an engine does not serve a key, in words that go on after "an engine"; empty where it does."""
    built, here = entry.key.machine, key.machine
    if entry.key.checksum != key.checksum or entry.key.graph != key.graph:
        return f"of another model ({entry.key.model}, {entry.key.checksum[:8]}, not {key.checksum[:8]})"
    if (built.gpu, built.capability) != (here.gpu, here.capability):
        return f"for another GPU ({_gpu(built)}, this is {_gpu(here)})"
    if built.tensorrt != here.tensorrt:
        return f"of another TensorRT version ({built.tensorrt}, this is {here.tensorrt})"
    if built.driver != here.driver:
        return f"for another driver ({built.driver}, this is {here.driver})"
    return ""


def is_whole(entry: Entry, *, quick: bool = False) -> bool:
    """Whether an engine's file is there and what was built; ``quick`` looks at the size only."""
    try:
        same = entry.path.is_file() and entry.path.stat().st_size == entry.bytes
        return same and (quick or package.digest([entry.path]) == entry.sha256)
    except (OSError, CheckpointError):
        # what cannot be read is of no more use than what is damaged
        return False


def current(folder: Path, key: Key, options: Mapping[str, Any], sizes: Sequence[Sizes] = ()) -> Entry | None:
    """The engine that is there for a key, whole and built with the same options; None where it is not.

    Args:
        sizes: those of this build. To a graph without sizes they make no difference, but in the command that
            builds it again: the sidecar then gets them.
    """
    entry = read_entry(_sidecar(folder / key.name))
    # options have been through JSON, which has no tuples
    if entry is None or entry.key != key or entry.options != json.loads(json.dumps(dict(options))):
        return None
    if not is_whole(entry):
        return None
    if entry.sizes != tuple(sizes):
        entry = dataclasses.replace(entry, sizes=tuple(sizes))
        _write(folder, {_sidecar(entry.path).name: _described(entry)})
    return entry


def store(
    folder: Path,
    key: Key,
    options: Mapping[str, Any],
    source: Path,
    content: Any,
    sizes: Sequence[Sizes] = (),
) -> Entry:
    """Write an engine and its sidecar, both or neither.

    Args:
        source: the exported folder.
        content: the engine, an object with the buffer protocol.

    Raises:
        SanaError: the folder cannot be written.
    """
    digest, size = hashlib.sha256(content).hexdigest(), memoryview(content).nbytes
    entry = Entry(folder / key.name, key, options, str(source.absolute()), digest, size, tuple(sizes))
    _write(folder, {key.name: content, _sidecar(entry.path).name: _described(entry)})
    return entry


def prepare(folder: Path) -> None:
    """Make the folder of engines, for this user only, and check that files can be made in it.

    Raises:
        SanaError: it cannot be written.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.cannot_write(folder, error) from error
    _write(folder, {})


def _write(folder: Path, files: Mapping[str, Any]) -> None:
    """Write files by name, for this user only: engines that others can write are not loaded."""
    with atomic.new_entries(folder, force=True) as scratch:
        for name, content in files.items():
            (scratch / name).touch(mode=0o600)
            (scratch / name).write_bytes(content)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _described(entry: Entry) -> bytes:
    """A sidecar's content."""
    described = {
        "format": FORMAT,
        "version": VERSION,
        "key": dataclasses.asdict(entry.key),
        "options": dict(entry.options),
        "sizes": [dataclasses.astuple(size) for size in entry.sizes],
        "source": entry.source,
        "sha256": entry.sha256,
        "bytes": entry.bytes,
    }
    return f"{json.dumps(described, indent=2)}\n".encode()


@dataclass(frozen=True)
class _Sidecar:
    """The content of a sidecar; `Entry` explains it."""

    format: Literal["sana-edge-engine"]
    version: Annotated[int, Between(VERSION, VERSION)]
    key: Key
    options: dict[str, Any]
    source: str
    sha256: str
    bytes: Annotated[int, Between(0, 1 << 50)]
    sizes: Annotated[tuple[tuple[_Sides, _Sides, _Sides], ...], Between(0, 64)]


def read_entry(sidecar: Path) -> Entry | None:
    """The engine that a sidecar describes; None where it cannot be read."""
    try:
        found: _Sidecar = Reader(str(sidecar)).convert(read_json(sidecar), _Sidecar)
        path = sidecar.with_name(sidecar.name.removesuffix(".json"))
        sizes = tuple(Sizes(*each) for each in found.sizes)
        return Entry(path, found.key, found.options, found.source, found.sha256, found.bytes, sizes)
    except (OSError, ValueError, SanaError):
        return None


def _gpu(machine: Machine) -> str:
    return f"{machine.gpu}, compute capability {machine.capability[0]}.{machine.capability[1]}"
