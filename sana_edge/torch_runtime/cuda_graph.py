"""One denoising step of one size, recorded once as a CUDA graph and replayed for every step and prompt.

A `StepGraph` has the memory that its recording reads: what changes with a step or with a prompt is copied
there. Without a GPU it calls its function every time.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sana_edge.errors import OutOfMemory, SanaError

logger = logging.getLogger("sana_edge")

# the first run of a kernel may load its code, which a capture cannot
_WARM_UPS = 2

Run = Callable[[], Tensor]
# gives what does the same as a function each time it is called; RuntimeError if it cannot
Recorder = Callable[[Run], Run]
# what a step computes of its own inputs and of the prompt's
Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def eager(run: Run) -> Run:
    """A recorder for devices without graphs."""
    return run


# Before it a replay sets the random generator, even of a graph without random numbers, and raises while
# another thread captures (pytorch/pytorch pull request 143777).
OLDEST_TORCH = (2, 7)
# two captures at once would break each other: a capture begins with waiting for the device
_CAPTURING = threading.Lock()


class _Process:
    """Why this process records no more: the end of a capture failed."""

    stopped = ""


def refusal() -> str:
    """Why steps are not recorded in this process; empty where they are.

    After a capture whose end fails torch, up to 2.12, goes on allocating from its pool (issues 173421
    and 180395 of pytorch/pytorch): another capture would fail with it.
    """
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version and (int(version[1]), int(version[2])) < OLDEST_TORCH:
        needed = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is older than {needed}, whose graphs two threads may use"
    return _Process.stopped


class CudaGraphs:
    """A recorder on a CUDA device, or the current one; what it gives is one tensor, which every call writes.

    All that one recorder records shares its memory: not for two at the same time.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self._pool: object = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, run: Run) -> Run:
        if refused := refusal():
            raise RuntimeError(refused)
        with torch.cuda.device(self._device):
            return self._record(run)

    def _record(self, run: Run) -> Run:
        before = torch.cuda.current_stream()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if not self._graphs:
            # The pool of graphs that are gone cannot be used again while a tensor in it lives, such as a
            # result of theirs.
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with _CAPTURING:
                result = _capture(run, graph, stream, self._pool)
        finally:
            # where a capture fails torch stays on its stream
            torch.cuda.set_stream(before)
        self._graphs.add(graph)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def _capture(run: Run, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: object) -> Tensor:
    """Where the capture cannot be ended, no other is begun."""
    if refused := refusal():
        raise RuntimeError(refused)
    # other threads may use the device meanwhile
    mode = {"stream": stream, "pool": pool, "capture_error_mode": "thread_local"}
    failed: BaseException | None = None
    try:
        with torch.cuda.graph(graph, **mode):  # type: ignore[arg-type]
            try:
                return run()
            except BaseException as error:
                failed = error
                raise
    except BaseException as error:
        # that of the function itself has gone through an end that succeeded
        if error is not failed:
            _Process.stopped = f"a capture failed in this process: {first_line(failed or error)}"
        raise


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextlib.contextmanager
def _triton_errors() -> Iterator[None]:
    """Turn Triton's own errors inside into `SanaError`; some are no RuntimeError."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "triton":
            raise
        text = f"a Triton kernel cannot run: {type(error).__name__}: {first_line(error)}"
        raise SanaError(text, "choose the backend cuda or torch") from error


class StepGraph:
    """A function with memory of its own for its inputs; not for two threads at once.

    Args:
        step: tensors of the shapes that a step has.
        prompt: also, of what stays the same over a prompt's steps.
        what: is done by it, for the note.

    Attributes:
        step: the function's own memory of a step's tensors, which it may change.
        note: why the function is not recorded; empty where it is.
    """

    def __init__(
        self,
        function: Function,
        step: Sequence[Tensor],
        prompt: Sequence[Tensor],
        recorder: Recorder,
        what: str = "denoising runs",
    ) -> None:
        inputs = [t.clone() for t in step], [t.clone() for t in prompt]
        self.step, self._prompt = inputs
        # a recording goes on reading what the function holds
        self._function = function
        self.note = ""

        def run() -> Tensor:
            # not of self, which would keep itself, and the function's network, until a garbage collection
            with _triton_errors():
                return function(*inputs)

        try:
            self._run = recorder(run)
        except (torch.OutOfMemoryError, OutOfMemory):
            raise
        except (RuntimeError, SanaError) as error:
            # the end of a capture that failed is an error as well
            if isinstance(error.__context__, (torch.OutOfMemoryError, OutOfMemory)):
                raise error.__context__ from None
            self.note = f"{what} without a CUDA graph: {first_line(error)}"
            logger.warning(self.note)
            self._run = run

    def load(self, prompt: Sequence[Tensor]) -> None:
        """Take another prompt's tensors, of the same shapes."""
        _copy(self._prompt, prompt)

    def __call__(self, step: Sequence[Tensor]) -> Tensor:
        """The function of a step's tensors; the next call may overwrite the result.

        What is in ``self.step`` at its place stays as it is.
        """
        _copy(self.step, step)
        return self._run()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if any(target.shape != source.shape for target, source in zip(targets, sources, strict=True)):
        raise ValueError("a step graph was given tensors of other shapes than it was made for")
    for target, source in zip(targets, sources, strict=True):
        if source is not target:
            target.copy_(source)
