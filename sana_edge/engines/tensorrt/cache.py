"""TensorRT engines on disk: their names, what is written beside them, who builds one and who may load it.

An engine fits one model, GPU, TensorRT version and driver, and is code: loading one runs what is in it.
Beside ``NAME.engine`` lies ``NAME.engine.json`` with what it was built from, for and with, and its checksum.
Neither torch nor TensorRT is needed here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.engines.tensorrt.profiles import Size, Sizes, size_flags
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.store import package
from sana_edge.store.cache import VARIABLE, user_cache

FORMAT = "sana-edge-engine"
VERSION = 1

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
    """Which engine is wanted: of which model (`model_checksum`) and graph, for which machine."""

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
        options: what it was built with: ``profiles``, ``workspace``, ``version_compatible``,
            ``hardware_compatible``.
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
        given = (name for name in ("version_compatible", "hardware_compatible") if self.options.get(name))
        flags += [f"--{name.replace('_', '-')}" for name in given]
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
    """The engine for a key: the very one, or one built to be compatible.

    Args:
        source: the exported folder that wants it.

    Raises:
        SanaError: there is none. Says what the nearest is for, and the command that builds the right one.
    """
    there = [dataclasses.replace(entry, source=str(source)) for entry in entries(folder)]
    reasons = [(entry, differs(entry, key)) for entry in there if entry.key.graph == key.graph]
    # the very one first, then those built for others
    for entry, reason in sorted(reasons, key=lambda pair: pair[0].key != key):
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
    anywhere = bool(entry.options.get("hardware_compatible"))
    same_gpu = (built.gpu, built.capability) == (here.gpu, here.capability)
    if not same_gpu and not (anywhere and min(built.capability, here.capability) >= (8, 0)):
        return f"for another GPU ({_gpu(built)}, this is {_gpu(here)})"
    newer = bool(entry.options.get("version_compatible")) and _is_newer(here.tensorrt, built.tensorrt)
    if built.tensorrt != here.tensorrt and not newer:
        return f"of another TensorRT version ({built.tensorrt}, this is {here.tensorrt})"
    if built.driver != here.driver and not (newer or anywhere):
        return f"for another driver ({built.driver}, this is {here.driver})"
    return ""


def check_loadable(entry: Entry, *, trust: bool = False, quick: bool = False) -> None:
    """See that an engine is this user's own, or trusted, and that its file is what was built.

    Args:
        quick: of the file look at the size only; loading it needs the whole check.

    Raises:
        SanaError: ``trust`` is false and it lies outside of the user's cache or others may write to it; or it
            is not the file that its sidecar describes. The hint has the command that builds it again.
    """
    there = entry.path.is_file()
    reason = "" if trust or not there else _untrusted(entry.path, engine_folder())
    if reason:
        raise SanaError(
            f"{entry.path} {reason}, and loading an engine runs the code in it",
            f"if you built it, pass --trust-engine; or build your own: {_own(entry, engine_folder())}",
        )
    if not is_whole(entry, quick=quick):
        size = entry.path.stat().st_size if there else 0
        built = "it is not what was" if size == entry.bytes else f"{size} bytes, {entry.bytes} were"
        raise SanaError(f"{entry.path} is damaged: {built} built", f"build it again: {entry.rebuild()}")


def is_whole(entry: Entry, *, quick: bool = False) -> bool:
    """Whether an engine's file is there and what was built; ``quick`` looks at the size only."""
    try:
        same = entry.path.is_file() and entry.path.stat().st_size == entry.bytes
        return same and (quick or package.digest([entry.path]) == entry.sha256)
    except (OSError, CheckpointError):
        # what cannot be read is of no more use than what is damaged
        return False


def _untrusted(path: Path, cache: Path) -> str:
    """Why a file may not be loaded without a word of the user; empty where it may."""
    if not path.resolve().is_relative_to(cache.resolve()):
        return f"is outside of your engine cache {cache}"
    if sys.platform != "win32":
        for part in (path, path.parent):
            if part.stat().st_uid != os.getuid() or _is_open(part):
                return "can be written by other users"
    return ""


def _own(entry: Entry, cache: Path) -> str:
    """What makes an engine of this user's own in the place of one that may not be loaded."""
    # one that is in that place already would be found there, and kept
    inside = entry.path.parent == cache
    build = entry.rebuild(folder=cache, force=inside)
    return f"{shlex.join(['chmod', 'go-w', str(cache)])} && {build}" if inside and _is_open(cache) else build


def _is_open(path: Path) -> bool:
    return sys.platform != "win32" and bool(path.stat().st_mode & 0o022)


def read_entry(sidecar: Path) -> Entry | None:
    """What a sidecar says of its engine; None where it cannot be read."""
    try:
        data = json.loads(sidecar.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            return None
        machine = dict(data["key"]["machine"])
        major, minor = machine.pop("capability")
        key = Key(**{**data["key"], "machine": Machine(**machine, capability=(int(major), int(minor)))})
        path = sidecar.with_name(sidecar.name.removesuffix(".json"))
        return Entry(
            path,
            key,
            dict(data["options"]),
            str(data["source"]),
            data["sha256"],
            int(data["bytes"]),
            tuple(_sizes(each) for each in data["sizes"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InvalidInput):
        return None


def _sizes(data: Any) -> Sizes:
    low, middle, high = ((int(width), int(height)) for width, height in data)
    return Sizes(low, middle, high)


def _gpu(machine: Machine) -> str:
    return f"{machine.gpu}, compute capability {machine.capability[0]}.{machine.capability[1]}"


def _is_newer(here: str, built: str) -> bool:
    """Whether a version-compatible engine of one TensorRT version runs on another: same major, not older."""
    left, right = (tuple(int(part) for part in re.findall(r"\d+", text)) for text in (here, built))
    return left[:1] == right[:1] and left >= right
