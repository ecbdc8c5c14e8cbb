"""A series on several GPUs and machines: actors of Ray that hold a model each, and one queue.

The driver hands out one chunk at a time to each worker and is the only one that writes. A worker that dies,
or its machine, is replaced and its chunk handed out again: what it had drawn of it was not written yet.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from sana_edge.errors import Cancelled, SanaError, UnsupportedDevice, extra
from sana_edge.progress import Progress
from sana_edge.request.loading import LoadOptions
from sana_edge.series.draw import LARGEST, BatchSize, Outcome, chunks, draw
from sana_edge.series.pictures import Picture

# a picture is given up after so many deaths of its workers; the series after as many of each in a row
_MOST_DEATHS = 3
# seconds between looks at ``cancel``
_LOOK = 0.5
# pictures of a prompt that one worker draws in one go
_RUN = 4


class Cluster:
    """Workers with a model each, until `close`; a context manager.

    Args:
        model: as for `sana_edge.Sana.load`, a name or a path that every machine has.
        options: how it is loaded.
        address: "local" for workers on this machine alone, "auto" for the cluster that ``ray start`` made,
            or that cluster's address.
        workers: how many; left out, one for each GPU, or one where there are none.
        batch: pictures that go through the denoiser at once; None for what is the fastest.
        quality: of JPEG and WebP.

    Raises:
        MissingDependency: Ray is not installed.
        UnsupportedDevice: there is no cluster at the address.
        SanaError: the model cannot be loaded, or workers die before it is.
    """

    def __init__(
        self,
        model: str,
        options: LoadOptions | None = None,
        *,
        address: str = "local",
        workers: int | None = None,
        batch: int | None = 1,
        quality: int | None = None,
    ) -> None:
        with extra("ray", "ray"):
            import ray
        self._ray = ray
        # a program that uses Ray itself keeps its connection
        self._own = not ray.is_initialized()
        if self._own:
            _connect(address)
        self._batch = batch
        self._deaths = 0
        self._error = ("no worker has started", "")
        self._model: Mapping[str, Any] = {}
        # workers that load, by the promise of it, and those that wait for work
        self._starting: dict[Any, Any] = {}
        self._free: list[Any] = []
        try:
            resources = ray.cluster_resources()
            cores, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
            self._count = workers or int(gpus) or 1
            options, needed = _shares(options or LoadOptions(), cores, gpus, self._count)
            kind = ray.remote(Worker).options(**needed, max_restarts=0, max_task_retries=0)
            self._make: Callable[[], Any] = lambda: kind.remote(model, options, batch, quality)
            for _ in range(self._count):
                self._start()
            while not self._model:
                self._welcome(self._next({}, None))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; of a local cluster all processes."""
        if self._own:
            self._ray.shutdown()
            return
        for worker in (*self._starting.values(), *self._free):
            self._ray.kill(worker)

    @property
    def model(self) -> Mapping[str, Any]:
        """As `sana_edge.Sana.description` says."""
        return self._model

    def outcomes(
        self, pictures: Sequence[Picture], on_progress: Progress | None, cancel: threading.Event | None
    ) -> Iterator[Outcome]:
        """Each picture, once, in the order in which they are ready.

        Raises:
            Cancelled: ``cancel`` was set.
            SanaError: worker after worker dies.
        """
        size = BatchSize(LARGEST if self._batch is None else self._batch)
        queue = deque(chunks(pictures, size, _RUN))
        deaths: Counter[str] = Counter()
        # what is being drawn, by the promise of it
        working: dict[Any, tuple[Any, list[Picture]]] = {}
        try:
            while queue or working:
                while queue and self._free:
                    worker, chunk = self._free.pop(), queue.popleft()
                    working[worker.draw.remote(chunk)] = worker, chunk
                promise = self._next(working, cancel)
                if promise not in working:
                    self._welcome(promise)
                    continue
                worker, chunk = working.pop(promise)
                try:
                    outcomes = self._ray.get(promise)
                except self._ray.exceptions.RayError as error:
                    self._died(worker, error)
                    deaths.update(picture.name for picture in chunk)
                    yield from _again(queue, chunk, deaths, error)
                    continue
                self._deaths = 0
                self._free.append(worker)
                yield from outcomes
        finally:
            # of a series that was left: nobody waits for what they draw
            for worker, _ in working.values() if self._ray.is_initialized() else ():
                self._ray.kill(worker)
                self._start()

    def _next(self, working: Mapping[Any, Any], cancel: threading.Event | None) -> Any:
        """The promise of a worker that is ready, or has drawn, or is dead."""
        while True:
            promises = [*working, *self._starting]
            if not promises:
                raise SanaError(*self._error)
            ready, _ = self._ray.wait(promises, num_returns=1, timeout=_LOOK)
            if cancel is not None and cancel.is_set():
                raise Cancelled("the series was cancelled")
            if ready:
                return ready[0]

    def _start(self) -> None:
        worker = self._make()
        self._starting[worker.ready.remote()] = worker

    def _welcome(self, promise: Any) -> None:
        """Take a worker that has loaded its model; one that cannot, on a machine that lacks it, is let go."""
        worker = self._starting.pop(promise)
        try:
            found: Mapping[str, Any] | tuple[str, str] = self._ray.get(promise)
        except self._ray.exceptions.RayError as error:
            self._died(worker, error)
            return
        if isinstance(found, tuple):
            self._error = found
            self._ray.kill(worker)
        else:
            self._model = self._model or found
            self._free.append(worker)

    def _died(self, worker: Any, error: Exception) -> None:
        """Start another worker in the place of one that is dead, or cannot be reached."""
        self._deaths += 1
        if self._deaths > _MOST_DEATHS * self._count:
            raise SanaError(f"{self._deaths} workers died in a row: {_reason(error)}", "see Ray's logs")
        self._ray.kill(worker)
        self._start()


class Worker:
    """An actor: a model, and what draws with it. Errors are values, which every process knows."""

    def __init__(self, model: str, options: LoadOptions, batch: int | None, quality: int | None) -> None:
        from sana_edge.pipeline import Sana

        self._size, self._quality = BatchSize(batch), quality
        self._failed: tuple[str, str] | None = None
        try:
            self._sana = Sana.load(model, **dataclasses.asdict(options))
        except SanaError as error:
            self._failed = error.message, error.hint

    def ready(self) -> Mapping[str, Any] | tuple[str, str]:
        """The model, or why there is none."""
        return self._failed or self._sana.description

    def draw(self, pictures: list[Picture]) -> list[Outcome]:
        parts = chunks(pictures, self._size)
        return [outcome for part in parts for outcome in draw(self._sana, part, self._size, self._quality)]


def _again(
    queue: deque[list[Picture]], chunk: list[Picture], deaths: Mapping[str, int], error: Exception
) -> Iterator[Outcome]:
    """Hand a dead worker's pictures out again, each by itself; those that keep killing workers fail."""
    for picture in reversed(chunk):
        if deaths[picture.name] < _MOST_DEATHS:
            queue.appendleft([picture])
        else:
            died = SanaError(f"its worker died {_MOST_DEATHS} times: {_reason(error)}", "see Ray's logs")
            yield Outcome.failed(picture, died)


def _shares(
    options: LoadOptions, cores: float, gpus: float, count: int
) -> tuple[LoadOptions, dict[str, float]]:
    """How a worker loads, and what Ray sets aside for it: a GPU or its share of one, or of the cores."""
    options = dataclasses.replace(options, progress=False)
    if gpus:
        return options, {"num_gpus": min(1.0, gpus / count), "num_cpus": 0}
    each = max(int(cores) // count, 1)
    threads = each if options.threads is None else options.threads
    # rounded down, or the last one finds no room
    share = each if cores >= count else int(cores / count * 1000) / 1000
    return dataclasses.replace(options, threads=threads), {"num_cpus": share}


def _connect(address: str) -> None:
    """Find the cluster, or start one on this machine that only this machine reaches."""
    # nothing is told to anybody
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        with _own_signals():
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        hint = "`ray start --head` on one machine, or --ray local"
        raise UnsupportedDevice(f"there is no Ray cluster at {address}: {_reason(error)}", hint) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the program's way of ending on SIGTERM: Ray's own aborts it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        # None where it was not made in Python
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _reason(error: Exception) -> str:
    """Its first line."""
    return str(error).strip().partition("\n")[0]
