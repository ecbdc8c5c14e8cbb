"""What runs in a process of its own: a command, with what it takes and prints, or a work, for its memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from harness import ROOT
from sana_edge.errors import OutOfMemory, SanaError
from sana_edge.system.memory import memory_errors, peak_memory

if TYPE_CHECKING:
    from harness.work import Stage, Work

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


@dataclass(frozen=True)
class Peak:
    """Bytes: the most during a stage, of which ``before`` (weights, libraries, inputs) when it began.

    On CUDA tensors only, on the CPU the resident size of the process. ``before`` is None where the system
    cannot forget an earlier peak; ``most`` is then that of the process so far, loading included.
    """

    most: int | None
    before: int | None


def peaks(work: Work, name: str, stages: tuple[str, ...]) -> dict[str, Peak]:
    """Loads one implementation in a new process and runs each of its stages there once.

    Raises:
        OutOfMemory: the process was killed, or could not allocate.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(_measure, work, name, stages).result()
    except BrokenProcessPool as error:
        raise OutOfMemory(
            f"the process that measures the memory of {name} was killed or crashed", "close other programs"
        ) from error


def _measure(work: Work, name: str, stages: tuple[str, ...]) -> dict[str, Peak]:
    import torch

    torch.set_num_threads(work.threads)
    with memory_errors(work.title):
        calls = work.loaders()[name]()
        return {stage: _peak(calls[stage], work.device) for stage in stages if stage in calls}


def _peak(call: Stage, device: str) -> Peak:
    import torch

    before = _reset(device)
    call()
    if device == "cpu" and before is not None:
        return Peak(_status("VmHWM"), before)
    return Peak(peak_memory(torch.device(device)), before)


def _reset(device: str) -> int | None:
    """Forgets the peak so far and returns what is in use, or None where that is impossible."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        _return_freed_memory()
        # Linux: the peak becomes the present resident size
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _return_freed_memory() -> None:
    """Gives the system what loading has freed, which the C library may keep for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
