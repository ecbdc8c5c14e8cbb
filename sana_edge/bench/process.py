"""A command in a process of its own: how it ended, what it printed, and the memory that it took."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import sana_edge
from sana_edge.errors import OutOfMemory, SanaError

# between a polite signal and the one that cannot be refused
GRACE = 2.0
# of a checkout or an installation
_ABOVE = str(Path(sana_edge.__file__).parents[1])


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


def run(
    command: Sequence[str],
    name: str,
    *,
    threads: int | None = None,
    on_line: Callable[[str], None] | None = None,
    limit: float | None = None,
) -> Ended:
    """Run a command of this installation or checkout, without the network.

    Args:
        name: of the command, for messages.
        threads: of torch and of engines.
        on_line: called with each line on stdout as it comes, from another thread; ``printed`` is empty then.
        limit: seconds, after which it is killed.

    Raises:
        OutOfMemory: it was killed, as the system does where memory runs out.
        SanaError: it fails; with the last lines that it wrote on stderr. It reaches the limit.
    """
    # the checkout, where it is not installed
    path = [os.environ.get("PYTHONPATH", ""), *([_ABOVE] if _ABOVE in sys.path else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "HF_HUB_OFFLINE": "1"}
    environment |= {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        done = _ended(command, environment, out, errors, limit, on_line=on_line)
        printed, written = (_read(file) for file in (out, errors))
    if done.status == "timeout":
        raise SanaError(f"{name} failed: it took more than {limit:.0f} s", "run its command by itself")
    if done.code:
        reason = _reason(done.code, written.strip().splitlines())
        kind = OutOfMemory if done.code == -getattr(signal, "SIGKILL", 9) else SanaError
        raise kind(f"{name} failed: {reason}", "run its command by itself")
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
    on_line: Callable[[str], None] | None = None,
) -> Ended:
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=out if on_line is None else subprocess.PIPE,
        stderr=errors,
        # Ctrl-C reaches this process only
        start_new_session=True,
    )
    reader = _reader(process, on_line)
    try:
        peak = _wait(process, limit)
        seconds = time.perf_counter() - start
    except subprocess.TimeoutExpired:
        return Ended("timeout", None, time.perf_counter() - start)
    finally:
        # also what a command left behind that ended by itself
        _end(process)
        if reader is not None:
            reader.join()
    return Ended("failed" if process.returncode else "passed", process.returncode, seconds, peak)


def _reader(
    process: subprocess.Popen[bytes], on_line: Callable[[str], None] | None
) -> threading.Thread | None:
    """A thread that reads stdout until everyone who holds it has ended."""
    if on_line is None or process.stdout is None:
        return None
    stream, tell = process.stdout, on_line

    def read() -> None:
        with stream:
            for line in stream:
                tell(line.decode(errors="replace").rstrip())

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread


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
        name = signal.Signals(-code).name
        return f"killed by {name}" + (
            ", as the system does where memory runs out" if name == "SIGKILL" else ""
        )
    return " ".join(written[-2:]) or f"exit {code}"
