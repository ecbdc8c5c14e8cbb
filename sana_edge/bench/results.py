"""A results file: the circumstances of a run, and its writing."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sana_edge.bench.machine import PACKAGES, commit, machine, versions
from sana_edge.system.atomic import write_bytes


def load() -> float | None:
    """Processes that were running in the last minute, on average: a number near 0 means a quiet machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def header(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The circumstances of a run as JSON values; no host name and no folder of this machine.

    script: the command's file, such as "benchmarks/quality.py", or its words; arguments: what followed it.
    """
    began = ["python", script] if script.endswith(".py") else script.split()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*began, *map(_without_folder, arguments)]),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
    }


def write_json(path: Path, data: Any) -> None:
    """Writes the whole file or nothing; an object or a list without others inside takes one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    flat = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda match: re.sub(r"\n *", " ", match[0]), text)
    # folders may have names that are no text
    write_bytes(path, (flat + "\n").encode(errors="backslashreplace"))


def _without_folder(argument: str) -> str:
    """`--output=/a/b.json` to `--output=b.json`: an absolute path keeps its name only."""
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name if Path(value).is_absolute() else value}"


def digest(paths: Iterable[Path]) -> str:
    """Changes when a file is written again, without reading models of gigabytes."""
    known = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        stat = path.stat()
        known.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return known.hexdigest()
