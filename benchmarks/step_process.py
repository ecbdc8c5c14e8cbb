"""A step's command in a process group of its own, which ends when its time is over."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# between a polite signal and the one that cannot be refused
GRACE = 2.0


@dataclass(frozen=True)
class Ended:
    """How a command ended: "passed", "timeout", or "failed" with an exit code, of a signal negative."""

    status: str
    code: int | None
    seconds: float


def run(
    command: Sequence[str], *, limit: float, log: Path, environment: Mapping[str, str], folder: Path
) -> Ended:
    """Run a command, what it prints appended to a log.

    Args:
        limit: seconds, after which it is killed with all that it started.
        folder: where it runs.

    Raises:
        KeyboardInterrupt: Ctrl-C; the group is gone then.
    """
    start = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches this process only
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return Ended("timeout", None, time.monotonic() - start)
        finally:
            # also what a command left behind that ended by itself
            _end(process)
    return Ended("failed" if code else "passed", code, time.monotonic() - start)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group, politely where the first of them still runs."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        # one that hangs in the driver cannot be waited for
        process.wait(GRACE)


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
