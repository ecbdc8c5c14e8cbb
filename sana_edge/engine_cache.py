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

from sana_edge import package
from sana_edge.errors import SanaError
from sana_edge.user_cache import VARIABLE, user_cache

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
    """

    path: Path
    key: Key
    options: Mapping[str, Any]
    source: str
    sha256: str
    bytes: int

    @property
    def rebuild(self) -> str:
        """The command that builds it again."""
        return rebuild_command(self.source, self.path.parent)


def rebuild_command(source: str | Path, folder: Path) -> str:
    """The command that builds what a folder lacks."""
    return shlex.join(["sana-edge", "build", str(source), "--output", str(folder)])


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

    Raises:
        SanaError: there is none. Says what the nearest is for, and the command that builds the right one.
    """
    there = [entry for entry in entries(folder) if entry.key.graph == key.graph]
    reasons = [(entry, differs(entry, key)) for entry in there]
    # the very one first, then those built for others
    for entry, reason in sorted(reasons, key=lambda pair: pair[0].key != key):
        if not reason:
            return entry
    hint = f"build it: {rebuild_command(source, folder)}"
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
        own = rebuild_command(entry.source, engine_folder())
        raise SanaError(
            f"{entry.path} {reason}, and loading an engine runs the code in it",
            f"if you built it, pass --trust-engine; or build your own: {own}",
        )
    size = entry.path.stat().st_size if there else 0
    if size != entry.bytes or not (quick or package.digest([entry.path]) == entry.sha256):
        raise SanaError(
            f"{entry.path} is damaged: {size} bytes, {entry.bytes} were built",
            f"build it again: {entry.rebuild}",
        )


def _untrusted(path: Path, cache: Path) -> str:
    """Why a file may not be loaded without a word of the user; empty where it may."""
    if not path.resolve().is_relative_to(cache.resolve()):
        return f"is outside of your engine cache {cache}"
    if sys.platform != "win32":
        for part in (path, path.parent):
            status = part.stat()
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return "can be written by other users"
    return ""


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
        return Entry(path, key, dict(data["options"]), data["source"], data["sha256"], int(data["bytes"]))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _gpu(machine: Machine) -> str:
    return f"{machine.gpu}, compute capability {machine.capability[0]}.{machine.capability[1]}"


def _is_newer(here: str, built: str) -> bool:
    """Whether a version-compatible engine of one TensorRT version runs on another: same major, not older."""
    left, right = (tuple(int(part) for part in re.findall(r"\d+", text)) for text in (here, built))
    return left[:1] == right[:1] and left >= right
