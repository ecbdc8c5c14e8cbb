"""The queue: jobs that wait, each for the worker of its model, in the order in which they came."""

from __future__ import annotations

import math
import threading
import time
from collections import deque

from sana_edge.errors import SanaError
from sana_edge.serve.job import Job

# seconds until a client should try again where nobody can tell
_RETRY = 5


class QueueFull(SanaError):
    """No more jobs are taken for now; ``retry_after`` is in seconds."""

    def __init__(self, message: str, hint: str, retry_after: int) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class Closed(SanaError):
    """The server is stopping."""

    def __init__(self) -> None:
        super().__init__("the server is stopping", "start it again")


class Queue:
    """Jobs that wait, and those that workers have taken.

    Args:
        limit: jobs that may wait behind the one that is drawn.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.closed = False
        self._waiting: dict[str, deque[Job]] = {}
        self._taken: set[Job] = set()
        self._changed = threading.Condition()

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    @property
    def running(self) -> int:
        with self._changed:
            return len(self._drawn())

    def unfinished(self, model: str) -> list[Job]:
        """The jobs of a model, those that are drawn and those that wait."""
        with self._changed:
            drawn = [job for job in self._drawn() if job.model == model]
            return [*drawn, *self._waiting.get(model, ())]

    def put(self, job: Job) -> None:
        """Add a job.

        Raises:
            QueueFull: as many jobs wait as may.
            Closed: none is taken any more.
        """
        with self._changed:
            if self.closed:
                raise Closed
            drawn = self._drawn()
            unfinished = sum(map(len, self._waiting.values())) + len(drawn)
            if unfinished > self.limit:
                hint = "try again later, or start the server with a longer --queue"
                raise QueueFull(f"{unfinished} jobs are unfinished, no more can wait", hint, self._retry())
            line = self._waiting.setdefault(job.model, deque())
            job.wait_behind(len(line) + sum(one.model == job.model for one in drawn))
            line.append(job)
            self._changed.notify_all()

    def take(self, model: str, timeout: float | None) -> Job | None:
        """Wait for the next job of a model; None after ``timeout`` seconds, or where the queue is closed."""
        end = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self.closed:
                line = self._waiting.get(model)
                if line:
                    job = line.popleft()
                    self._taken.add(job)
                    for ahead, other in enumerate(line, start=1):
                        other.wait_behind(ahead)
                    return job
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
        return None

    def done(self, job: Job) -> None:
        """A worker has ended a job that it took."""
        with self._changed:
            self._taken.discard(job)

    def withdraw(self, job: Job) -> bool:
        """Take out a job that waits; False where a worker has it, or it is no longer here."""
        with self._changed:
            line = self._waiting.get(job.model, deque())
            if job not in line:
                return False
            line.remove(job)
            return True

    def close(self) -> list[Job]:
        """Take no more jobs, give none to workers, and return those that are unfinished."""
        with self._changed:
            self.closed = True
            left = [*self._taken, *(job for line in self._waiting.values() for job in line)]
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _drawn(self) -> list[Job]:
        """What workers have taken. A client may know of a job's end before its worker has let go of it."""
        return [job for job in self._taken if not job.finished]

    def _retry(self) -> int:
        known = [job.seconds_left for job in self._taken if job.seconds_left is not None]
        return max(1, math.ceil(min(known))) if known else _RETRY
