"""What all faces share: the models that are served, the queue, and the jobs that can be asked about."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sana_edge.errors import Cancelled, SanaError
from sana_edge.progress import Progress, unseen
from sana_edge.request.plan import label
from sana_edge.serve.job import Job, Picture
from sana_edge.serve.queue import Closed, Queue
from sana_edge.serve.worker import Loader, Worker
from sana_edge.system import atomic

logger = logging.getLogger("sana_edge")

# how long a finished job can be asked about, in seconds, and what all of them may keep, in bytes
KEPT_SECONDS = 600.0
KEPT_BYTES = 256 << 20
KEPT_JOBS = 1000
# seconds that a step which cannot be interrupted gets at the end
PATIENCE = 30.0


class Service:
    """Models, and the jobs that they draw.

    Args:
        models: what requests call each model, and what ``load`` does; the first is the default.
        limit: jobs that may wait behind the one that is drawn.
        idle: seconds after which a model that is not used is let go; None keeps it.
        keep: a folder that every picture is written to as well.
        memory: bytes that the models may take; None: what is free.
    """

    def __init__(
        self,
        models: Mapping[str, str],
        load: Loader,
        *,
        limit: int = 16,
        idle: float | None = None,
        keep: Path | None = None,
        memory: int | None = None,
    ) -> None:
        self.queue = Queue(limit)
        self.workers: dict[str, Worker] = {}
        self.ended: Counter[str] = Counter()
        self.pictures: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self._keep = keep
        self._kept: dict[str, Job] = {}
        self._lock = threading.Lock()
        others: list[Worker] = []
        loading = threading.Lock()
        for name, model in models.items():
            worker = Worker(
                name,
                model,
                load,
                self.queue,
                others=others,
                loading=loading,
                idle=idle,
                on_picture=self._drawn,
                memory=memory,
            )
            others.append(worker)
            self.workers[name] = worker

    @property
    def default(self) -> str:
        """The model of requests that name none, or one that is not here."""
        return next(iter(self.workers))

    def known(self, name: object) -> str:
        """The model that a request means: clients send names that they cannot change."""
        return name if isinstance(name, str) and name in self.workers else self.default

    def load(self, on_progress: Progress = unseen) -> None:
        """Load the default model; errors are those of `Sana.load`."""
        worker = self.workers[self.default]
        worker.load(on_progress, threading.Event())
        # which lets it go again
        worker.start()

    def submit(self, job: Job, *, keep: bool = False) -> Job:
        """Queue a job; `find` knows it for a while after its end where ``keep`` is true.

        Raises:
            QueueFull: as many jobs wait as may.
        """
        worker = self.workers[job.model]
        job.expect(self._expected(job))
        job.on_end = self._end
        self.queue.put(job)
        worker.start()
        if keep:
            with self._lock:
                self._kept[job.id] = job
        self._forget()
        return job

    def _expected(self, job: Job) -> float | None:
        """Seconds until its end, with the jobs before it; None where one of them is not known."""
        own = self.workers[job.model].pace.seconds(job.request)
        # the last of those that wait has the others in its time
        before = self.queue.unfinished(job.model)[-1:]
        ahead = before[0].seconds_left if before else 0.0
        return None if own is None or ahead is None else own + ahead

    def find(self, identity: str) -> Job | None:
        """A job that was kept, by its id."""
        self._forget()
        with self._lock:
            return self._kept.get(identity)

    def kept(self) -> list[Job]:
        """The jobs that `find` knows, oldest first."""
        self._forget()
        with self._lock:
            return list(self._kept.values())

    def cancel(self, job: Job) -> None:
        """End a job: at once where it waits, else before its next step or part of a decode."""
        job.cancel.set()
        if self.queue.withdraw(job):
            job.end(Cancelled("the job was cancelled"))

    def stop(self) -> None:
        """Take no more jobs and cancel all that there are."""
        for job in self.queue.close():
            job.cancel.set()
            if job.state == "queued":
                job.end(Closed())

    def close(self) -> bool:
        """`stop`, and wait for the workers; False where one computes on after `PATIENCE`."""
        self.stop()
        end = time.monotonic() + PATIENCE
        joined = [worker.join(max(end - time.monotonic(), 0)) for worker in self.workers.values()]
        return all(joined)

    def _drawn(self, job: Job, picture: Picture) -> None:
        with self._lock:
            self.pictures[job.model] += 1
            for stage, seconds in picture.timings.items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        if self._keep is None:
            return
        moment = time.strftime("%Y%m%d-%H%M%S", time.localtime(job.created))
        end = job.encoding.media_type.rpartition("/")[2].replace("jpeg", "jpg")
        # nothing of it comes from a request but numbers
        named = label(picture.seed, picture.metadata.get("variation", ()))
        path = self._keep / f"{moment}-{job.id[:8]}-{named}.{end}"
        try:
            atomic.write_bytes(path, picture.data)
        except SanaError as error:
            logger.warning(str(error))

    def _end(self, job: Job) -> None:
        with self._lock:
            self.ended[job.state] += 1

    def _forget(self) -> None:
        """Drop finished jobs, oldest first, that are too old, too many or too large."""
        with self._lock:
            finished = [job for job in self._kept.values() if job.finished]
            size = sum(job.size for job in finished)
            for number, job in enumerate(finished):
                old = time.time() - (job.ended or 0.0) > KEPT_SECONDS
                if not old and size <= KEPT_BYTES and len(finished) - number <= KEPT_JOBS:
                    continue
                size -= job.size
                del self._kept[job.id]
