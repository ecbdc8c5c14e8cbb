"""The download cache of huggingface_hub: which snapshots of a repository are on this machine, and whole."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store.folder import PIPELINES, check_component, check_folder, read_json
from sana_edge.system.json_values import read_bounded

_COMMIT = re.compile(r"[\w.-]+")


def cache_folder() -> Path:
    """Where downloads go: the cache of huggingface_hub, which HF_HOME and HF_HUB_CACHE move."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _home(repository: str) -> Path:
    return cache_folder() / f"models--{repository.replace('/', '--')}"


def snapshots(repository: str, revision: str | None) -> list[Path]:
    """The snapshots of a revision in the download cache, whole or not; without main's all that there are."""
    home = _home(repository)
    try:
        commit = read_bounded(home / "refs" / (revision or "main"), 4096).decode().strip()
    except (OSError, ValueError):
        commit = revision or ""
    # a damaged file may say anything
    if not _COMMIT.fullmatch(commit):
        commit = ""
    if commit and os.path.isdir(home / "snapshots" / commit):
        return [home / "snapshots" / commit]
    # a commit may be shortened
    found = sorted(home.glob(f"snapshots/{glob.escape(commit) if revision else ''}*"))
    return found if revision is None or len(commit) >= 7 else []


def cached(
    repository: str, variant: str | None, revision: str | None = None, *, component: bool = False
) -> Path | None:
    """A complete snapshot of a repository in the download cache; None where there is none, or a choice."""
    complete = []
    for path in snapshots(repository, revision):
        try:
            check_component(path) if component else check_folder(path, variant)
        except (OSError, SanaError):
            continue
        complete.append(path)
    return complete[0] if len(complete) == 1 else None


def repositories() -> list[str]:
    """The repositories in the download cache that hold a SANA."""
    indexes = glob.glob(str(cache_folder() / "models--*--*" / "snapshots" / "*" / "model_index.json"))
    found = set()
    for index in map(Path, indexes):
        try:
            pipeline = read_json(index).get("_class_name")
        except CheckpointError:
            continue
        if isinstance(pipeline, str) and pipeline in PIPELINES:
            found.add(index.parents[2].name.removeprefix("models--").replace("--", "/"))
    return sorted(found)
