"""The forms of a random Sprint model that pictures are made with: float, an INT8 package, and INT8 graphs.

Each is made by a command that writes a whole folder or none: a run that was interrupted goes on with the
first that is missing.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from processes import run

from sana_edge.errors import SanaError
from sana_edge.store import manifest, manifest_files

FLOAT, INT8, ONNX = "float", "int8", "onnx"

# of the 0.6B's, with room for the one that is being written
_BYTES = 20e9


def prepare(scratch: Path, shapes: str, threads: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Make what is missing in `folder_of` the shapes.

    Returns:
        The seconds of each folder that was made now.

    Raises:
        SanaError: a command fails, there is no room on the disk, or the graphs are damaged.
    """
    place = folder_of(scratch, shapes)
    place.mkdir(parents=True, exist_ok=True)
    commands = _commands(place, shapes)
    missing = {name: command for name, command in commands.items() if not (place / name).is_dir()}
    free = shutil.disk_usage(scratch).free
    if missing and shapes != "tiny" and free < _BYTES:
        raise SanaError(
            f"the models need about {_BYTES / 1e9:.0f} GB, {free / 1e9:.0f} GB are free in {scratch}",
            "make room, or choose another --scratch",
        )
    made = []
    for name, command in missing.items():
        say(f"making {name}: {' '.join(command[1:])}")
        seconds = run(command, threads, f"making {name}").seconds
        say(f"made {name} in {seconds:.0f} s")
        made.append({"folder": name, "seconds": seconds})
    # once for all engines: the first one to load a folder would do it for the others
    manifest_files.verify(place / ONNX, manifest.read(place / ONNX))
    return made


def folder_of(scratch: Path, shapes: str) -> Path:
    """Where the folders of some shapes are."""
    return scratch / shapes


def _commands(place: Path, shapes: str) -> dict[str, list[str]]:
    """What makes each folder, in their order."""
    here, python = Path(__file__).parent, sys.executable
    float_model, package, graphs = (str(place / name) for name in (FLOAT, INT8, ONNX))
    cut = ["--text-layers", "1"] if shapes == "tiny" else []
    exported = ["--int8", "--no-verify", "--output", graphs]
    return {
        FLOAT: [python, str(here / "random_model.py"), float_model, "--shapes", shapes, "--sprint", *cut],
        INT8: [python, str(here / "random_package.py"), float_model, package],
        ONNX: [python, "-m", "sana_edge", "export", package, *exported],
    }
