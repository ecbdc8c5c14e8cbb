"""A process with everything imported, which forks a command at a time, to be killed where it is told.

Most of a command's time goes into imports, of which no kill shows anything.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

# what changes a disk, as Python's audit hooks name it
EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "os.chmod")


class Zygote:
    """Runs ``modules`` whose ``main()`` reads sys.argv.

    Args:
        module: of the command; imports are those of its first run's, and ``more``.
    """

    def __init__(self, module: str, more: Sequence[str], environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, module, *more]
        # its errors are in the test's own output
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._read()

    def run(
        self,
        words: Sequence[str],
        *,
        seconds: float | None = None,
        change: int = 0,
        log: str | None = None,
        cpu: int | None = None,
        memory: int | None = None,
    ) -> dict[str, float]:
        """Run a command: its ``code``, ``seconds`` and the number of its ``changes`` on the disk.

        Args:
            seconds: after which it is killed.
            change: the number, from 1, of the change before which it is killed.
            log: a file for what it prints; another with ".changed" gets the paths that it changed.
            cpu: seconds of CPU time that it may take.
            memory: bytes of address space that it may take more than it has at the start.
        """
        asked = {"words": list(words), "seconds": seconds, "change": change}
        asked |= {"log": log, "cpu": cpu, "memory": memory}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        assert self._process.stdout is not None
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer


def kill_before(change: int, paths: set[str] | None = None) -> list[int]:
    """Kill this process before a change of the disk, counted from 1; the list has how many there were.

    Args:
        paths: gets those that are changed.
    """
    count = [0]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        if event in EVENTS or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            count[0] += 1
            # names below an open folder, as `rmtree` gives them, have no path
            below = event in ("os.remove", "os.rmdir", "os.mkdir") and arguments[-1] != -1
            if paths is not None and not below and not isinstance(arguments[0], int):
                moved = event in ("os.rename", "os.link")
                paths.update(os.path.abspath(os.fsdecode(one)) for one in arguments[: 2 if moved else 1])
            if count[0] == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return count


def _limit(cpu: int | None, memory: int | None) -> None:
    import resource

    if cpu is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
    if memory is not None:
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))


def _child(main: Callable[[], int], asked: dict[str, Any], report: int) -> None:
    log, paths = asked["log"], set[str]()
    if log is not None:
        number = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(number, 1)
        os.dup2(number, 2)
    count, code = kill_before(asked["change"], paths if log else None), 1
    sys.argv[1:] = asked["words"]
    _limit(asked["cpu"], asked["memory"])
    try:
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        sys.stdout.flush()
        if log is not None:
            with open(f"{log}.changed", "w", errors="surrogateescape") as file:
                json.dump(sorted(paths), file)
        os.write(report, json.dumps(count[0]).encode())
        os._exit(code)


def _serve() -> None:
    import importlib

    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    main = importlib.import_module(sys.argv[1]).main
    for name in sys.argv[2:]:
        importlib.import_module(name)
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        read, write = os.pipe()
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(main, asked, write)
        os.close(write)
        if asked["seconds"] is not None:
            time.sleep(asked["seconds"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        counted = os.read(read, 100)
        os.close(read)
        answer = {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - start}
        print(json.dumps({**answer, "changes": int(counted or 0)}), file=out, flush=True)


if __name__ == "__main__":
    # not the folder of this file, which has modules of common names
    sys.path.pop(0)
    _serve()
