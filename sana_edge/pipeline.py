"""Sana: a model that is loaded once and makes pictures, one at a time, for any thread."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.generation import Step, batch_generation, describe, generation, stop_if
from sana_edge.image import Image
from sana_edge.progress import Progress, unseen, watched
from sana_edge.request.loading import LoadOptions
from sana_edge.request.request import Options, Request
from sana_edge.runtime import Runtime, load_runtime
from sana_edge.system.threads import PROCESS

if TYPE_CHECKING:
    from typing_extensions import Unpack


logger = logging.getLogger("sana_edge")


class Sana:
    """A loaded model.

        with Sana.load("sana-tiny") as sana:
            sana.generate("a red house", seed=7).save("house.png")

    One picture is made at a time: a second thread that calls the same object waits its turn. Different
    objects are independent.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime: Runtime | None = runtime
        self._lock = threading.Lock()
        self._owner: int | None = None

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] = "sana-tiny",
        *,
        device: str = "auto",
        dtype: str = "auto",
        int8: bool = False,
        backend: str = "auto",
        engines: str | os.PathLike[str] | None = None,
        trust_engine: bool = False,
        offline: bool = False,
        progress: bool = False,
        revision: str | None = None,
        decoder: str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        threads: int | None = None,
        memory: int | str | None = None,
        prompt_cache: bool = True,
    ) -> Sana:
        """Load a model; downloads it if it is a public one that is not on this machine.

        Args:
            model: a bundled name, a name that ``sana-edge models list`` shows, a folder in diffusers
                layout, a folder that ``sana-edge export`` made, which needs no torch, or a Hugging Face
                repository.
            device: "auto", "cpu" or "cuda"; for exported folders also "gpu" and "npu", which are Intel's
                (without one "gpu" is NVIDIA's), and "tensorrt", which is onnxruntime's own TensorRT.
            dtype: of the denoiser, "auto", "fp32", "bf16" or "fp16"; auto is the checkpoint's own,
                fp32 instead of fp16 on the CPU, and of bf16 where it has no instructions for that, and what
                an engine computes in. In an INT8 model, of what is not INT8.
            int8: a bundled model's INT8 package, or else INT8 layers made while loading, without
                calibration. A package is INT8 also without it.
            backend: what the denoiser's steps run on, "auto", "torch", "triton" or "cuda"; the last two are
                for INT8 models on a CUDA device, where auto takes the best that can run. An exported
                folder runs on "tensorrt", "onnxruntime" or "openvino", of which auto takes the first that
                works here: TensorRT only where ``sana-edge build`` has made its engines.
            engines: the folder that ``sana-edge build`` wrote TensorRT's engines into, and asks for them;
                the user's own if left out.
            trust_engine: load engines also from elsewhere than the user's own folder. Loading one runs the
                code in it.
            offline: never use the network.
            progress: show on stderr what is downloaded and loaded.
            revision: of a repository, a branch, a tag or a commit; its main branch if left out.
            decoder: an autoencoder in place of the model's own: "dc-ae-lite", which is smaller, a folder in
                diffusers layout, a file such as TAESANA's, or a repository. Exported folders have theirs in
                them.
            on_progress: called with what is downloaded (the repository; bytes done, all bytes) or loaded
                ("loading NAME"; parts done, all parts), also from other threads.
            cancel: set it from another thread to end a download, or the loading before the next part; what
                was downloaded is kept.
            threads: that compute on a CPU; left out, ``OMP_NUM_THREADS`` or the cores, within a container's
                quota.
            memory: what may be taken, in bytes or as "8GB", "7500MB", "8GiB": by the process on a CPU, by its
                tensors on a GPU. Networks that do not fit into it together are loaded one after the other,
                for each picture, and decoded in strips or tiles. Left out: what is free.
            prompt_cache: keep what the text encoder makes of each prompt, in memory and in the user's cache
                (docs/files.md); the encoder is loaded with the first prompt that is not there, and not with
                the model. The pictures are the same.

        Raises:
            SanaError: ModelNotFound, CheckpointError, UnsupportedDevice, MissingDependency, InvalidInput,
                OutOfMemory, or Cancelled.
        """
        options = LoadOptions(
            device=device,
            dtype=dtype,
            int8=int8,
            backend=backend,
            engines=None if engines is None else Path(engines),
            trust_engine=trust_engine,
            offline=offline,
            progress=progress,
            revision=revision,
            decoder=None if decoder is None else os.fspath(decoder),
            threads=threads,
            memory=memory,
            prompt_cache=prompt_cache,
        )
        told = watched(on_progress, cancel, "loading")
        runtime, folder = load_runtime(os.fspath(model), options, told)
        kinds = f"{runtime.dtype}, {runtime.quantization}" if runtime.quantization else runtime.dtype
        used = f"{runtime.place}, backend {runtime.backend.name}"
        logger.info("loaded %s from %s: %s on %s", runtime.name, folder, kinds, used)
        for name, reason in runtime.backend.reasons.items():
            logger.info("backend %s is not used: %s", name, reason)
        for note in runtime.notes:
            logger.warning(note)
        return cls(runtime)

    def close(self) -> None:
        """Let go of the model and free its memory; a stream that is under way finishes with it first."""
        if PROCESS.forked:
            # freeing would wait for threads that are not here; the memory is the parent's
            return
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            self._free(runtime)

    def __enter__(self) -> Sana:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height in pixels that the model was trained, or exported, for: the default size."""
        return self._open().native_size

    @property
    def peak_memory(self) -> int | None:
        """The most bytes used so far: on CUDA by this process's tensors, on the CPU by the whole process."""
        return self._open().peak_memory

    @overload
    def generate(
        self,
        prompt: str,
        *,
        images: None = None,
        variations: None = None,
        on_step: Callable[[Step], None] | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> Image: ...

    @overload
    def generate(
        self,
        prompt: str,
        *,
        images: int,
        variations: None = None,
        on_step: Callable[[Step], None] | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> list[Image]: ...

    @overload
    def generate(
        self,
        prompt: str,
        *,
        images: None = None,
        variations: int,
        on_step: Callable[[Step], None] | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> list[Image]: ...

    def generate(
        self,
        prompt: str,
        *,
        images: int | None = None,
        variations: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> Image | list[Image]:
        """Make one picture, or a list of ``images`` with the seeds seed, seed + 1, ..., or of ``variations``.

        Args:
            prompt: what the picture shows; what does not fit into 300 tokens is cut, and noted.
            images: how many; left out, the result is the picture itself.
            variations: how many pictures near one: near that of ``seed``, whose noise gets a share of
                another's, or near ``image`` where ``strength`` is left out, each by a seed of its own.
            on_step: called after each step, on this thread; an exception from it ends the generation.
            on_progress: called with ("denoise", steps done, all steps) after each step, and with ("decode",
                parts done, all parts) while a picture is decoded, in parts of any kind.
            cancel: set it from another thread to stop before the next step or part of a decode.
            negative_prompt: what the picture should not show; needs guidance above 1.
            size: (width, height) in pixels; the model's native size if left out. It is drawn at the nearest
                size that the model was trained on, or else the next multiples of 32, then resized and
                cropped, as diffusers does.
            exact_size: draw at just this size, whose sides are multiples of 32 then.
            steps: denoising steps; 20 if left out, 2 for Sprint models.
            guidance: how strictly the prompt is followed, 0 to 1000; 4.5 if left out, 1 turns it off.
            seed: 0 to 2**63 - 1; random if left out. A seed draws the same noise on every device, and a
                picture does not depend on how many are made with it.
            sampler: "flow-dpm", "flow-euler" or "scm"; what the model was made for if left out.
            flow_shift: of the flow samplers' noise levels, above 0 to 100; the model's own if left out.
            tile: side in pixels of the tiles to decode in, 0 for never; left out, in tiles of 1024 where the
                free memory asks for it. They change pixels a little: a picture's metadata has the side.
            instruction: the text right before the prompt, as it is; SANA's own if left out, none if empty. An
                exported folder has SANA's computed, and reads another anew with every prompt.
            image: a picture to start from: a file, one of Pillow or of this library, or (H, W, 3) uint8. Its
                size is the default of ``size``; another is stretched, as diffusers does.
            strength: how much of ``image`` is drawn anew, above 0 to 1: the share of the steps that are
                taken, on as much noise (SDEdit, arXiv 2108.01073); 0.6 if left out.
            mask: of ``image``, white where it is drawn anew; what is black stays as it is, to the bit.
            variation_strength: how far variations are from the one, above 0 to 1; 0.2 if left out, 0.3 of an
                image, whose ``strength`` it is.
            variation_seed: whose noise the first variation gets, the others those that follow; seed + 1 if
                left out.
            variation: seeds and strengths whose noise is mixed in, one after the other, as a picture's
                metadata has them: 8 and 0.2 of [[8, 0.2]]. Of several ``images`` the last seed counts up.

        It also takes a picture's ``**metadata``, whose "version" tells it from other arguments, and leaves
        out what was the model's part.

        Raises:
            InvalidInput: an argument cannot be served; nothing was computed.
            Cancelled: ``cancel`` was set; there is no picture.
            OutOfMemory: the picture does not fit into memory.
            SanaError: the numbers overflowed, and there is no picture.
        """
        pictures = []
        count = 1 if images is None else images
        # closed also when on_step raises: the traceback would keep the stream, and its lock, alive
        stream = self.stream(
            prompt, images=count, variations=variations, on_progress=on_progress, cancel=cancel, **options
        )
        with closing(stream) as steps:
            for step in steps:
                if on_step is not None:
                    on_step(step)
                if step.image is not None:
                    pictures.append(step.image)
        return pictures[0] if images is None and variations is None else pictures

    def stream(
        self,
        prompt: str,
        *,
        images: int = 1,
        variations: int | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
        **options: Unpack[Options],
    ) -> Generator[Step, None, None]:
        """Take the steps of `generate` one by one, with its arguments; the last step has the picture.

        The arguments are checked at once; work begins with the first step. Leaving the loop cancels, and
        nothing is decoded then. Until the iterator is used up, closed or collected, other calls wait; in the
        thread that took the last step, which would wait for itself, they are an error.
        """
        runtime = self._open()
        request = Request.of(prompt, images=images, variations=variations, **options)
        plan = request.plan(runtime.trained_side, runtime.sampler.kind, runtime.fixed_size)
        runtime.check_plan(plan)
        cancel = cancel or threading.Event()
        steps = generation(runtime, plan, on_progress or unseen, cancel, _foreign(runtime, options))
        return _inside(runtime.computing, self._alone(runtime, cancel, steps))

    def batch(
        self,
        requests: Sequence[Request],
        *,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Image]:
        """Make the pictures of several requests together: each step is one pass of all through the denoiser.

        They differ in prompts and seeds alone. A backend adds up a batch in another order than a single
        picture: pixels differ from those of `generate` by roundings, which INT8 makes about as large as what
        it changes anyway.

        Args:
            requests: of one picture each, none with an image.
            on_progress, cancel: as of `generate`.

        Raises:
            InvalidInput: they differ in more, or this model draws one at a time, as exported ones do.
            Cancelled, OutOfMemory, SanaError: see `generate`.
        """
        runtime = self._open()
        plans = [r.plan(runtime.trained_side, runtime.sampler.kind, runtime.fixed_size) for r in requests]
        own: dict[str, Any] = {"prompt": "", "negative_prompt": "", "seed": 0, "variation": (), "init": None}
        alike = {dataclasses.replace(plan, **own) for plan in plans}
        if len(alike) != 1 or any(p.images != 1 or p.init is not None for p in plans):
            found = "a batch is of requests for one picture each that differ in prompts and seeds alone"
            raise InvalidInput(found, "leave out images, and draw the others in another batch")
        runtime.check_plan(plans[0], len(plans))
        cancel = cancel or threading.Event()
        steps = batch_generation(runtime, plans, on_progress or unseen, cancel)
        with closing(_inside(runtime.computing, self._alone(runtime, cancel, steps))) as taken:
            return [step.image for step in taken if step.image is not None]

    @property
    def description(self) -> dict[str, str]:
        """What its pictures' metadata says of the model: model, dtype, backend, decoder, quantization."""
        return describe(self._open())

    def _open(self) -> Runtime:
        if self._runtime is None:
            raise SanaError("this Sana is closed", "load the model again")
        PROCESS.check()
        return self._runtime

    def _free(self, runtime: Runtime) -> None:
        """Free a closed model's memory, unless a stream holds the lock, which does it at its end."""
        if self._lock.acquire(blocking=False):
            try:
                runtime.close()
            finally:
                self._lock.release()

    def _alone(
        self, runtime: Runtime, cancel: threading.Event, steps: Generator[Step, None, None]
    ) -> Generator[Step, None, None]:
        """Take the steps while holding the lock."""
        with self._turn(runtime, cancel), closing(steps):
            for step in steps:
                yield step
                # the next step may be taken by another thread than the last one
                self._owner = threading.get_ident()

    @contextmanager
    def _turn(self, runtime: Runtime, cancel: threading.Event) -> Iterator[None]:
        """Wait for the generation under way in another thread, if any, and hold the lock."""
        if self._owner == threading.get_ident():
            raise SanaError(
                "a stream of this model is still open in this thread", "close it or use it up first"
            )
        while not self._lock.acquire(timeout=0.1):
            stop_if(cancel)
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()
            # behind the release: a `close` that found the lock taken has set this before
            if self._runtime is None:
                self._free(runtime)


def _inside(
    computing: Callable[[], AbstractContextManager[Any]], steps: Generator[Step, None, None]
) -> Generator[Step, None, None]:
    """Take each step inside of ``computing()``, which is left before the caller gets it."""
    with closing(steps):
        while True:
            with computing():
                step = next(steps, None)
            if step is None:
                return
            yield step


def _foreign(runtime: Runtime, options: Mapping[str, object]) -> tuple[str, ...]:
    """A note where another model's metadata are the options."""
    other = options.get("model")
    if other in (None, runtime.name):
        return ()
    return (f"the metadata is of a picture by {other}, this one is by {runtime.name}",)
