"""Commands in processes of their own: what they print, how long they take, and why they fail."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sana_edge.errors import SanaError


@dataclass(frozen=True)
class Ended:
    """A command that did what it should: its seconds from start to end, and what it printed."""

    seconds: float
    printed: str


def run(command: Sequence[str], threads: int, name: str) -> Ended:
    """Run a command without the network, with so many threads in torch and in engines.

    Args:
        name: of the command, for messages.

    Raises: SanaError, if it fails or is killed, with the last lines that it wrote on stderr.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        seconds = time.perf_counter() - start
        errors.seek(0)
        written = errors.read().decode(errors="replace").strip().splitlines()
    if done.returncode:
        raise SanaError(f"{name} failed: {_reason(done.returncode, written)}", "run its command by itself")
    return Ended(seconds, done.stdout)


def _reason(code: int, written: Sequence[str]) -> str:
    if code < 0:
        # as the system does with the largest process when memory runs out
        return f"killed by {signal.Signals(-code).name}"
    return " ".join(written[-2:]) or f"exit {code}"
