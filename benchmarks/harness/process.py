"""One command in a process group of its own: how long it takes, what it prints, and what ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness import ROOT
from sana_edge.errors import SanaError

# between a polite signal and the one that cannot be refused
GRACE = 2.0


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    status: "passed", "timeout" or "failed"; code: its exit code, of a signal negative; peak: bytes of
    resident memory as the system counts them; printed: on stdout, where that went to no log.
    """

    status: str
    code: int | None
    seconds: float
    peak: int | None = None
    printed: str = ""


def run(command: Sequence[str], name: str, *, threads: int | None = None) -> Ended:
    """Run a command of this checkout without the network.

    Args:
        name: of the command, for messages.
        threads: of torch and of engines.

    Raises:
        SanaError: it fails or is killed; with the last lines that it wrote on stderr.
    """
    # the checkout, where it is not installed
    path = [os.environ.get("PYTHONPATH", ""), *([str(ROOT)] if str(ROOT) in sys.path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        done = _ended(command, environment, out, errors)
        printed, written = (_read(file) for file in (out, errors))
    if done.code:
        reason = _reason(done.code, written.strip().splitlines())
        raise SanaError(f"{name} failed: {reason}", "run its command by itself")
    return Ended(done.status, done.code, done.seconds, done.peak, printed)


def run_step(
    command: Sequence[str], *, limit: float, log: Path, environment: Mapping[str, str], folder: Path
) -> Ended:
    """Run a command, what it prints appended to a log; never fails.

    Args:
        limit: seconds, after which it is killed with all that it started.
        folder: where it runs.

    Raises:
        KeyboardInterrupt: Ctrl-C; the group is gone then.
    """
    with log.open("ab") as file:
        return _ended(command, environment, file, file, limit, folder)


def _ended(
    command: Sequence[str],
    environment: Mapping[str, str],
    out: IO[bytes],
    errors: IO[bytes],
    limit: float | None = None,
    folder: Path | None = None,
) -> Ended:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=errors,
        # Ctrl-C reaches this process only
        start_new_session=True,
    )
    try:
        peak = _wait(process, limit)
        seconds = time.perf_counter() - start
    except subprocess.TimeoutExpired:
        return Ended("timeout", None, time.perf_counter() - start)
    finally:
        # also what a command left behind that ended by itself
        _end(process)
    return Ended("failed" if process.returncode else "passed", process.returncode, seconds, peak)


def _wait(process: subprocess.Popen[bytes], limit: float | None) -> int | None:
    """Until it ends; its peak memory in bytes. Raises TimeoutExpired."""
    if not hasattr(os, "wait4"):
        process.wait(limit)
        return None
    end, pause = time.monotonic() + (limit or 0), 0.001
    while True:
        found, status, usage = os.wait4(process.pid, 0 if limit is None else os.WNOHANG)
        if found:
            process.returncode = os.waitstatus_to_exitcode(status)
            # bytes on macOS, else KiB
            return usage.ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, limit or 0)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End every process of the group, politely where the first of them still runs."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
    with contextlib.suppress(subprocess.TimeoutExpired):
        # one that hangs in the driver cannot be waited for
        process.wait(GRACE)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.terminate()


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _reason(code: int, written: Sequence[str]) -> str:
    if code < 0:
        # as the system does with the largest process when memory runs out
        return f"killed by {signal.Signals(-code).name}"
    return " ".join(written[-2:]) or f"exit {code}"
