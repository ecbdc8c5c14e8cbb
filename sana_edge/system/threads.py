"""CPU threads: how many compute, how they wait for each other, and that none of them lives on in a fork."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import signal
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from types import FrameType

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.system.json_values import shown

MAX_THREADS = 1024

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def cpu_threads(asked: int | None = None) -> int | None:
    """Threads to compute with: what was asked for, OMP_NUM_THREADS, or the physical cores.

    Of the cores those that this process may use, within a container's quota. None where the system does not
    tell, and the engine counts for itself.
    """
    if asked is not None:
        return asked
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return int(first)
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = os.sched_getaffinity(0)
    # two hardware threads of a core have the same siblings
    cores = {_read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list") or str(cpu) for cpu in allowed}
    return max(1, min(len(cores), quota()))


def processor() -> str:
    """The CPU's name where the system tells it, or its kind: what the order of sums depends on."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return str(names[0]) if names else platform.processor() or platform.machine()


def check_threads(count: object) -> None:
    """Raise `InvalidInput` where it is no number of threads; None is one."""
    if count is not None and (type(count) is not int or not 1 <= count <= MAX_THREADS):
        raise InvalidInput(f"threads is {shown(count)}", f"choose a whole number from 1 to {MAX_THREADS}")


def shown_threads(threads: int | None) -> str:
    """As in "2 threads"."""
    return "its own number of threads" if threads is None else f"{threads} thread{'s' * (threads != 1)}"


def wait_passively(environment: MutableMapping[str, str]) -> None:
    """Let the threads of OpenMP sleep where they wait, unless the user decided; before torch is loaded.

    They spin otherwise, and on a machine that other programs keep busy take the time of those they wait for.
    """
    if not {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys():
        environment.setdefault("OMP_WAIT_POLICY", "passive")


class Process:
    """The process that loaded the first model: the threads of its libraries are not in what it forks.

    There a computation would wait for them for ever, in every library, whoever loaded the model.
    """

    def __init__(self) -> None:
        self._id: int | None = None

    def enter(self) -> None:
        """A model is loaded here.

        Raises:
            SanaError: see `check`.
        """
        self.check()
        self._id = os.getpid()

    def check(self) -> None:
        """Raise `SanaError` in a process that was forked after a model had been loaded."""
        if self.forked:
            raise SanaError(
                "this process was forked from one that had loaded a model, whose threads are not in it",
                "load models in the new process alone, or start it by multiprocessing's spawn, not fork",
            )

    @property
    def forked(self) -> bool:
        """Whether a model was loaded before this process was forked."""
        return self._id not in (None, os.getpid())


PROCESS = Process()


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end a command as Ctrl-C does: nothing half done stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        # nohup ignores the second
        if handler != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def quota() -> int:
    """The cores that a container may keep busy, rounded up; a large number without a limit."""
    limit, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if limit.isdecimal() and period.isdecimal() and int(period):
        return math.ceil(int(limit) / int(period))
    return 1 << 16


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
