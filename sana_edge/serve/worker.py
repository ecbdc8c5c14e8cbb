"""The worker of one model: a thread that loads it when a job wants it, draws, and lets it go."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Protocol

from sana_edge.errors import OutOfMemory, SanaError
from sana_edge.pipeline import Sana
from sana_edge.progress import Progress
from sana_edge.request.request import Request
from sana_edge.serve.job import Job, Picture
from sana_edge.serve.pace import Pace
from sana_edge.serve.queue import Queue
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory, give_back

logger = logging.getLogger("sana_edge")

# of a request, what `Sana.stream` takes by name
_OPTIONS = tuple(
    field.name for field in dataclasses.fields(Request) if field.name not in ("prompt", "images")
)


class Loader(Protocol):
    """How a model of a server is loaded."""

    def __call__(self, model: str, on_progress: Progress, cancel: threading.Event) -> Sana: ...

    def size(self, model: str) -> int:
        """Bytes of its weights on disk; 0 where they are not known yet."""


class Worker:
    """One model and its thread, which starts with the first job.

    Args:
        name: what requests call the model, ``model`` what the loader does.
        others: all workers of the server, whose models give way where memory is short.
        loading: one model is loaded at a time.
        idle: seconds after which a model that is not used is let go; None keeps it.
        memory: bytes that all models together may take; None: what is free.
    """

    def __init__(
        self,
        name: str,
        model: str,
        load: Loader,
        queue: Queue,
        *,
        others: Sequence[Worker],
        loading: threading.Lock,
        idle: float | None,
        on_picture: Callable[[Job, Picture], None],
        memory: int | None = None,
    ) -> None:
        self.name = name
        self.model = model
        self.pace = Pace()
        self.used = 0.0
        self._load = load
        self._queue = queue
        self._others = others
        self._loading = loading
        self._idle = idle
        self._memory = memory
        self._on_picture = on_picture
        self._sana: Sana | None = None
        # held while the model draws, is loaded or is let go
        self._busy = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def loaded(self) -> bool:
        return self._sana is not None

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Of the model where it is loaded."""
        sana = self._sana
        return None if sana is None else sana.native_size

    def start(self) -> None:
        """Start the thread, once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"worker of {self.name}", daemon=True)
            self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for the thread after the queue was closed; False where it still computes."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def load(self, on_progress: Progress, cancel: threading.Event) -> None:
        """Load the model where it is not loaded; errors are those of `Sana.load`."""
        with self._loading:
            if self._sana is not None:
                return
            self._make_room(self._load.size(self.model))
            with self._busy:
                try:
                    self._sana = self._load(self.model, on_progress, cancel)
                except OutOfMemory:
                    if not self._unload_others():
                        raise
                    self._sana = self._load(self.model, on_progress, cancel)

    def unload(self) -> bool:
        """Let the model go after what it draws; whether there was one."""
        with self._busy:
            sana, self._sana = self._sana, None
            if sana is not None:
                sana.close()
        if sana is None:
            return False
        del sana
        give_back()
        return True

    def _make_room(self, needed: int) -> None:
        """Let models go, the one that was used last at the end, until ``needed`` bytes are free."""
        for other in sorted(self._others, key=lambda worker: worker.used):
            free = within(available_memory(), self._memory)
            if free is None or free >= needed:
                return
            if other is not self:
                other.unload()

    def _unload_others(self) -> bool:
        freed = [other.unload() for other in self._others if other is not self]
        return any(freed)

    def _run(self) -> None:
        while not self._queue.closed:
            job = self._queue.take(self.name, self._idle if self.loaded else None)
            if job is None:
                self.unload()
            else:
                self._serve(job)
                self._queue.done(job)
        self.unload()

    def _serve(self, job: Job) -> None:
        job.start()
        error: SanaError | None = None
        try:
            self._draw_loaded(job)
        except SanaError as caught:
            error = caught
        except Exception as caught:  # what nobody foresaw ends a job, not the server
            logger.debug("a job failed", exc_info=True)
            error = SanaError(" ".join(f"{type(caught).__name__}: {caught}".split()))
        if error is not None:
            # its frames would keep what was being computed
            error.__traceback__ = error.__cause__ = error.__context__ = None
        self.used = time.monotonic()
        job.end(error)

    def _draw_loaded(self, job: Job) -> None:
        """Draw with the model, which may be let go for another one between the load and the picture."""
        while True:
            self.load(job.progress, job.cancel)
            with self._busy:
                if self._sana is None:
                    continue
                try:
                    return self._draw(job, self._sana)
                except OutOfMemory as error:
                    if job.pictures:
                        raise
                    failed = error
            # not while this one is held: another worker may wait for it
            with self._loading:
                if not self._unload_others():
                    raise failed

    def _draw(self, job: Job, sana: Sana) -> None:
        request, pace = job.request, self.pace
        options: dict[str, Any] = {name: getattr(request, name) for name in _OPTIONS}
        clock = pace.clock(request)
        stream = sana.stream(
            request.prompt, images=request.images, on_progress=job.progress, cancel=job.cancel, **options
        )
        with closing(stream) as steps:
            for step in steps:
                each = step.total // request.images
                picture, index = divmod(step.index, each)
                if step.image is not None:
                    pace.learn(request, step.image.metadata["steps"], each, step.image.timings)
                    self._on_picture(job, job.take(step.image))
                elif job.preview_wanted or job.preview(index, each):
                    job.preview_wanted = False
                    job.show(step.preview(job.linear), picture, index)
                job.expect(clock.left(step.index + 1, step.total, request.images - len(job.pictures)))
