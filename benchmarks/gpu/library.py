"""The CUDA library where the steps look for it: a carried one that runs here, or a new one.

A new one is built by nvcc for this GPU only, in a dry run for the CPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from gpu.steps import Setting
from harness import ROOT
from sana_edge.bench.results import write_json
from sana_edge.errors import SanaError
from sana_edge.kernels.cuda import library as cuda_library

# what the emulator is in a dry run
EMULATED = 890


def check(setting: Setting, output: Path) -> None:
    """Writes where the library came from."""
    write_json(output, place(setting.built, setting.carried, EMULATED if setting.dry else None))


def place(target: Path, carried: Path | None, emulated: int | None) -> dict[str, object]:
    """Where the library came from, and why the carried one was left.

    Raises:
        SanaError: there is none that runs here.
    """
    left = ""
    if carried is not None:
        shutil.copyfile(carried, target)
        left = _refusal(target, emulated is not None)
        if not left:
            return {"figure": f"carried, for {_architectures()}", "carried": True}
        print(f"the carried library cannot be used: {left}", file=sys.stderr)
        target.unlink()
    start = time.monotonic()
    _build(target, emulated)
    refused = _refusal(target, emulated is not None)
    if refused:
        raise SanaError(f"the library that was built cannot be used: {refused}", "see the log")
    seconds = time.monotonic() - start
    figure = f"built in {seconds:.0f} s for {_architectures()}"
    return {"figure": figure, "carried": False, "carried_refused": left, "seconds": seconds}


def _build(target: Path, emulated: int | None) -> None:
    """Its objects stay beside it.

    Raises:
        SanaError: it could not be built.
    """
    environment, kind = dict(os.environ), []
    if emulated is None:
        major, minor = torch.cuda.get_device_capability()
        environment["SANA_EDGE_CUDA_ARCHS"] = f"{major}{minor}"
    else:
        kind = ["--emulated", str(emulated)]
    objects = ["--objects", str(target.parent / "objects")]
    command = [sys.executable, str(ROOT / "csrc" / "compile.py"), *kind, *objects, "--output", str(target)]
    if subprocess.run(command, env=environment).returncode:
        hint = "build it elsewhere with SANA_EDGE_CUDA_ARCHS set to this GPU's number, and give --library"
        raise SanaError("the CUDA library could not be built", hint)


def _refusal(target: Path, on_cpu: bool) -> str:
    """Why a library cannot run here; empty where it can."""
    os.environ[cuda_library.VARIABLE] = str(target)
    cuda_library.load.cache_clear()
    return cuda_library.refusal(torch.device("cpu" if on_cpu else "cuda"))


def _architectures() -> str:
    library = cuda_library.load()
    return library.architectures if library.device_type == "cuda" else "the emulator"
