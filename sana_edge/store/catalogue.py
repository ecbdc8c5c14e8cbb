"""The models that have a name here: bundled ones, the public table, decoders, and those in the cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sana_edge.store.known_models import BUNDLED, DECODERS, KNOWN, KnownModel
from sana_edge.store.manifest import is_exported
from sana_edge.store.snapshots import cached, repositories

# ends the name of a bundled model's package as graphs
GRAPHS = "-onnx"

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ListedModel:
    """A line of `list_models`: ``path`` and ``size`` (bytes) are None where it is not on this machine."""

    name: str
    origin: str
    path: Path | None = None
    size: int | None = None
    info: KnownModel | None = None


def bundled_models() -> dict[str, Path]:
    """Names and folders of the models that come with the package."""
    return {path.parent.name: path.parent for path in sorted(BUNDLED.glob("*/model_index.json"))}


def bundled_exports() -> dict[str, Path]:
    """Names and folders of the exported ones."""
    return {path.name: path for path in sorted(BUNDLED.glob(f"*{GRAPHS}")) if is_exported(path)}


def list_models() -> list[ListedModel]:
    """What has a name here: bundled models, the public table, decoders, and other SANAs in the cache."""
    ours = {**bundled_models(), **bundled_exports()}
    bundled = [ListedModel(name, "bundled", path, size_of(path)) for name, path in ours.items()]
    known = []
    for info in KNOWN.values():
        path = cached(info.repository, info.variant)
        known.append(ListedModel(info.name, "public", path, size_of(path) if path else None, info))
    decoders = []
    for info in DECODERS.values():
        path = cached(info.repository, None, component=True)
        decoders.append(ListedModel(info.name, "decoder", path, size_of(path) if path else None, info))
    table = {info.repository for info in KNOWN.values()}
    others = [
        ListedModel(repository, "cached", path, size_of(path))
        for repository in repositories()
        if repository not in table and is_repository(repository) and (path := cached(repository, None))
    ]
    return [*bundled, *known, *decoders, *others]


def bundled_names() -> list[str]:
    """The models that come with the package, and the exported ones."""
    return [*bundled_models(), *bundled_exports()]


def is_repository(model: str) -> bool:
    """Whether it is written as a repository, "owner/name"."""
    return _REPOSITORY.fullmatch(model) is not None


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
