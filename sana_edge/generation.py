"""The generation of a plan's pictures on a loaded model: text, steps, decode, each timed."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sana_edge import __version__
from sana_edge.errors import Cancelled, OutOfMemory
from sana_edge.image import Image
from sana_edge.progress import Progress, watched
from sana_edge.request.plan import Plan
from sana_edge.runtime import Latent, Runtime
from sana_edge.sampler import Denoised, denoise
from sana_edge.system.memory import memory_errors
from sana_edge.system.threads import PROCESS


@dataclass(frozen=True, eq=False)
class Step:
    """One denoising step that has been taken.

    Attributes:
        index: 0 to total - 1, over all pictures of the call.
        total: steps times pictures.
        image: the finished picture, on the last step of each; None before.
    """

    index: int
    total: int
    image: Image | None
    _preview: Callable[[bool], NDArray[np.uint8]] = dataclasses.field(repr=False)

    def preview(self, linear: bool = False) -> NDArray[np.uint8]:
        """Decode what the picture will be, as far as this step can tell: RGB uint8, sides of at most 256.

        Costs a small decode, and only when it is called.

        Args:
            linear: the colours of the latent's cells instead, by a linear map, with sides of at most 128: no
                decode, for previews of every step. A model without such a map decodes all the same.
        """
        return self._preview(linear)


def generation(
    runtime: Runtime, plan: Plan, on_progress: Progress, cancel: threading.Event, said: tuple[str, ...] = ()
) -> Generator[Step, None, None]:
    """Yield the steps of a plan that was checked; the last of each picture has it.

    Args:
        on_progress: as of `sana_edge.Sana.generate`.
        cancel: looked at before each step and part of a decode.
        said: notes that the pictures get beside those of the runtime.

    Raises:
        Cancelled, OutOfMemory, SanaError: see `sana_edge.Sana.generate`.
    """
    taken = plan.steps - plan.skip
    total = plan.images * taken
    told = watched(on_progress, cancel, "the generation")
    with _released(runtime), memory_errors(f"{plan.width}x{plan.height}"):
        clock = _Clock(runtime.synchronize)
        with clock.stage("text"):
            context, notes = runtime.read(plan)
        sampler, tables = runtime.schedule(plan)
        with clock.stage("denoise"):
            predict, more = runtime.predict(plan, tables, context)
        origin = None
        if plan.init is not None:
            with clock.stage("encode"):
                origin = runtime.origin(plan)
        for picture in range(plan.images):
            queued = denoise(sampler, predict, runtime.noise(plan, picture), origin)
            steps = _when_done(queued, runtime.mark)
            for i in range(taken):
                stop_if(cancel)
                PROCESS.check()
                with clock.stage("denoise", wait=False):
                    step = next(steps)
                on_progress("denoise", picture * taken + i + 1, total)
                image = None
                if i == taken - 1:
                    stop_if(cancel)
                    tiles: list[int] = []
                    with clock.stage("decode"):
                        pixels = runtime.decode(
                            step.x, plan.size, told, tile=plan.tile, on_tiled=tiles.append
                        )
                    if plan.init is not None:
                        pixels = plan.init.paste(pixels)
                    lines = (*said, *notes, *more)
                    image = _image(runtime, plan, picture, pixels, clock.read(), lines, tiles)
                preview = functools.partial(runtime.preview, step.clean)
                yield Step(picture * taken + i, total, image, preview)


def batch_generation(
    runtime: Runtime, plans: Sequence[Plan], on_progress: Progress, cancel: threading.Event
) -> Generator[Step, None, None]:
    """Yield the steps of several plans that go through the denoiser together, then one with each picture.

    They differ in their texts and seeds alone. Seconds are shared evenly.

    Raises:
        InvalidInput: the runtime cannot join their texts.
        Cancelled, OutOfMemory, SanaError: see `sana_edge.Sana.generate`.
    """
    plan, count = plans[0], len(plans)
    total = plan.steps + count
    told = watched(on_progress, cancel, "the generation")
    with _released(runtime), memory_errors(f"{count} pictures of {plan.width}x{plan.height}"):
        clock = _Clock(runtime.synchronize)
        with clock.stage("text"):
            read = [runtime.read(one) for one in plans]
            context = runtime.join([context for context, _ in read])
        sampler, tables = runtime.schedule(plan)
        with clock.stage("denoise"):
            predict, more = runtime.predict(plan, tables, context, count)
        steps = _when_done(denoise(sampler, predict, runtime.noises(plans)), runtime.mark)
        for i in range(plan.steps):
            stop_if(cancel)
            PROCESS.check()
            with clock.stage("denoise", wait=False):
                step = next(steps)
            on_progress("denoise", i + 1, plan.steps)
            yield Step(i, total, None, functools.partial(runtime.preview, step.clean[:1]))
        shared = {stage: seconds / count for stage, seconds in clock.read().items()}
        for row, (one, (_, notes)) in enumerate(zip(plans, read, strict=True)):
            stop_if(cancel)
            latent, tiles = step.x[row : row + 1], list[int]()
            with clock.stage("decode"):
                pixels = runtime.decode(latent, one.size, told, tile=one.tile, on_tiled=tiles.append)
            image = _image(runtime, one, 0, pixels, {**shared, **clock.read()}, (*notes, *more), tiles)
            image.timings["text"] = shared["text"]
            yield Step(plan.steps + row, total, image, functools.partial(runtime.preview, latent))


def stop_if(cancel: threading.Event) -> None:
    """Raise `Cancelled` once the event is set."""
    if cancel.is_set():
        raise Cancelled("the generation was cancelled")


def _when_done(
    steps: Iterator[Denoised[Latent]], mark: Callable[[], Callable[[], None] | None]
) -> Iterator[Denoised[Latent]]:
    """Steps when they are done, while the next one is queued: a GPU goes on, a cancellation costs a step."""
    under_way: tuple[Denoised[Latent], Callable[[], None]] | None = None
    for step in steps:
        wait = mark()
        if wait is None:
            yield step
            continue
        if under_way is not None:
            under_way[1]()
            yield under_way[0]
        under_way = step, wait
    if under_way is not None:
        under_way[1]()
        yield under_way[0]


class _Clock:
    """Seconds spent in each stage of a picture; the caller's time between steps does not count."""

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, wait: bool = True) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if wait:
            self._synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Return the seconds and start again at zero; the text is read once, for the first picture."""
        seconds, self._seconds = self._seconds, {"text": 0.0}
        return seconds


def _image(
    runtime: Runtime,
    plan: Plan,
    picture: int,
    pixels: NDArray[np.uint8],
    timings: dict[str, float],
    notes: tuple[str, ...],
    tiles: Sequence[int],
) -> Image:
    plan = plan.picture(picture)
    described = describe(runtime)
    # what there always is stands first
    first = {name: described.pop(name) for name in ("model", "dtype", "backend")}
    metadata = {**plan.metadata(), **first, "version": __version__}
    if tiles:
        # which change pixels
        metadata["tile"] = tiles[-1]
        if plan.tile is None:
            short = "as memory was short, which changes pixels a little"
            notes = (*notes, f"decoded in tiles of {tiles[-1]} pixels, {short}; a tile of 0 forbids it")
    return Image(pixels, plan.seed, metadata | described, timings, notes)


def describe(runtime: Runtime) -> dict[str, str]:
    """What a picture's metadata says of the model that made it."""
    described = {"model": runtime.name, "dtype": runtime.dtype, "backend": runtime.backend.name}
    if runtime.decoder is not None:
        described["decoder"] = runtime.decoder
    if runtime.quantization is not None:
        described["quantization"] = runtime.quantization
    return described


@contextmanager
def _released(runtime: Runtime) -> Iterator[None]:
    """Let go of all memory that is not the model where it ran out, so that the next picture may fit."""
    try:
        yield
    except OutOfMemory:
        runtime.release()
        raise
