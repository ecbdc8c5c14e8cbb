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

    def run(self, words: Sequence[str], *, seconds: float | None = None, change: int = 0) -> dict[str, float]:
        """Run a command: its ``code``, ``seconds`` and the number of its ``changes`` on the disk.

        Args:
            seconds: after which it is killed.
            change: the number, from 1, of the change before which it is killed.
        """
        asked = {"words": list(words), "seconds": seconds, "change": change}
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


def kill_before(change: int) -> list[int]:
    """Kill this process before a change of the disk, counted from 1; the list has how many there were."""
    count = [0]

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else 0
        if event in EVENTS or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            count[0] += 1
            if count[0] == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return count


def _child(main: Callable[[], int], words: Sequence[str], change: int, report: int) -> None:
    count, code = kill_before(change), 1
    sys.argv[1:] = words
    try:
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
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
            _child(main, asked["words"], asked["change"], write)
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
