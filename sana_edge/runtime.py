"""From a model's name to what makes its pictures: torch for a model folder, engines for an exported one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sana_edge.config import SamplerConfig
from sana_edge.errors import InvalidInput, MissingDependency, torch_extra
from sana_edge.progress import Progress, bar, both, unseen
from sana_edge.request.bounds import plain
from sana_edge.request.loading import BACKENDS, DEVICES, TORCH_BACKENDS, TORCH_DEVICES, LoadOptions
from sana_edge.request.plan import Plan
from sana_edge.sampler import Origin, Sampler
from sana_edge.store import hub
from sana_edge.system.budget import parse_memory
from sana_edge.system.memory import memory_errors
from sana_edge.system.threads import PROCESS, check_threads

# a latent (1, C, h, w) fp32: a tensor, or a numpy array
Latent = Any


class Backend(Protocol):
    """What computes the steps; ``reasons`` has for each that is preferred to it why it is not used."""

    @property
    def name(self) -> str: ...
    @property
    def reasons(self) -> Mapping[str, str]: ...


class Runtime(Protocol):
    """A loaded model as `sana_edge.Sana` needs it; `torch_runtime.runtime.TorchRuntime` explains each method.

    What ``schedule``, ``read`` and ``join`` give is for ``predict`` only. ``computing`` is entered around
    all work, ``synchronize`` waits for it, and so does what ``mark`` gives for work until then, where work is
    queued. ``close`` frees what does not go with the last reference; work
    that comes after it is done all the same, and needs another ``close``.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def decoder(self) -> str | None: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def backend(self) -> Backend: ...
    @property
    def sampler(self) -> SamplerConfig: ...
    @property
    def place(self) -> str: ...
    @property
    def native_size(self) -> tuple[int, int]: ...
    @property
    def trained_side(self) -> int: ...
    @property
    def fixed_size(self) -> tuple[int, int] | None: ...
    @property
    def peak_memory(self) -> int | None: ...

    def check_plan(self, plan: Plan, count: int = 1) -> None: ...
    def computing(self) -> AbstractContextManager[Any]: ...
    def synchronize(self) -> None: ...
    def mark(self) -> Callable[[], None] | None: ...
    def read(self, plan: Plan) -> tuple[Any, tuple[str, ...]]: ...
    def schedule(self, plan: Plan) -> tuple[Sampler, Any]: ...
    def join(self, contexts: Sequence[Any]) -> Any: ...
    def predict(
        self, plan: Plan, tables: Any, context: Any, count: int = 1
    ) -> tuple[Callable[[Latent, int], Latent], tuple[str, ...]]: ...
    def origin(self, plan: Plan) -> Origin[Latent]: ...
    def noise(self, plan: Plan, picture: int) -> Callable[[], Latent]: ...
    def noises(self, plans: Sequence[Plan]) -> Callable[[], Latent]: ...
    def decode(
        self,
        latent: Latent,
        size: tuple[int, int] | None = None,
        on_progress: Progress | None = None,
        *,
        tile: int | None = None,
        on_tiled: Callable[[int], None] | None = None,
    ) -> NDArray[np.uint8]: ...
    def preview(self, latent: Latent, linear: bool = False) -> NDArray[np.uint8]: ...
    def release(self) -> None: ...
    def close(self) -> None: ...


def load_runtime(model: str, options: LoadOptions, on_progress: Progress = unseen) -> tuple[Runtime, Path]:
    """Load a model, and say which folder it is; errors are those of `sana_edge.Sana.load`.

    Tells ``on_progress`` what is downloaded (bytes) and loaded (parts); what that raises ends both.
    """
    options = dataclasses.replace(options, threads=plain(options.threads))
    # which says what is wrong before anything is looked for
    _limit(options)
    exported = exported_for(model, options)
    PROCESS.enter()
    if exported is not None:
        return _load_engines(exported, options, on_progress), exported
    return _load_torch(model, options, on_progress)


def exported_for(model: str, options: LoadOptions) -> Path | None:
    """The exported folder that a model's name means with these options; None: torch runs it.

    Raises:
        InvalidInput: options that there are not, or that do not go together or with the model.
        SanaError: as `sana_edge.store.hub.exported`.
    """
    backend, device, engines = options.backend, options.device, options.engines
    for value, what, known in ((backend, "backend", BACKENDS), (device, "device", DEVICES)):
        if value not in known:
            raise InvalidInput(f"unknown {what} {value!r}", f"choose {', '.join(known)}")
    if engines is not None and backend not in ("auto", "tensorrt"):
        hint = "leave out the folder of engines, or choose backend tensorrt"
        raise InvalidInput(f"backend {backend} does not run the engines in {engines}", hint)
    check_threads(options.threads)
    exported = hub.exported(model)
    if exported is not None:
        return exported
    engine = backend not in TORCH_BACKENDS or engines is not None
    graphs = hub.bundled_graphs(model, int8=options.int8)
    if graphs is not None and (engine or device not in TORCH_DEVICES):
        return graphs
    if engine:
        build = ", `sana-edge build onnx`" if backend == "tensorrt" or engines is not None else ""
        made = f"`sana-edge export {model}{' --int8' if options.int8 else ''} --output onnx`{build}"
        hint = f"{made}, then give the folder onnx as the model"
        what = f"backend {backend} runs" if engines is None else "engines are of"
        raise InvalidInput(f"{what} exported folders, {model} is none", hint)
    if device not in TORCH_DEVICES:
        hint = f"choose {', '.join(TORCH_DEVICES)}; `sana-edge export {model} --output onnx` makes a folder"
        hint += " for the others"
        raise InvalidInput(f"device {device} is for exported folders, {model} is none", hint)
    return None


def check_exported(folder: Path, options: LoadOptions) -> None:
    """Raise `InvalidInput` where options are of models that torch runs, and not of an exported folder."""
    if options.backend in TORCH_BACKENDS and options.backend != "auto":
        hint = f"choose {', '.join(name for name in BACKENDS if name not in TORCH_BACKENDS)} or auto"
        raise InvalidInput(f"backend {options.backend} runs models, {folder} is an exported folder", hint)
    if options.decoder is not None:
        hint = "`sana-edge convert DECODER --output NEW --base MODEL`, then export NEW"
        raise InvalidInput(f"{folder} is an exported folder, which has its decoder in it", hint)
    if options.revision is not None:
        found = f"revision {options.revision!r} is of a repository, {folder} is none"
        raise InvalidInput(found, "leave out the revision")


def _load_torch(model: str, options: LoadOptions, on_progress: Progress) -> tuple[Runtime, Path]:
    hub.check_name(model)
    try:
        # whose libraries are mapped
        with memory_errors("torch"), torch_extra():
            from sana_edge.torch_runtime.device import check_target
            from sana_edge.torch_runtime.runtime import TorchRuntime
    except MissingDependency as error:
        graphs = hub.bundled_graphs(model, int8=True)
        if graphs is not None and options.backend == "auto":
            note = f"{graphs.name}, its exported INT8 package, stands in for {model}: {error.message}"
            return _load_engines(graphs, options, on_progress, (note,)), graphs
        # where there is no torch, an exported folder was meant
        hint = f"give a folder that `sana-edge export` made, or {error.hint}"
        raise MissingDependency(f"{model} is no exported folder, and {error.message}", hint) from error
    int8, dtype, backend = options.int8, options.dtype, options.backend
    # what can be said before the model is found
    place = check_target(options.device, dtype, backend)
    with torch_extra():
        found = hub.resolve(
            model,
            int8=int8,
            offline=options.offline,
            progress=options.progress,
            revision=options.revision,
            decoder=options.decoder,
            on_progress=on_progress,
        )
    needed = sum(file.stat().st_size for file in found.path.rglob("*.safetensors") if file.is_file())
    with torch_extra(), memory_errors(model, needed), bar(not options.progress, "part") as shown:
        loaded = TorchRuntime.load(
            found,
            device=place,
            dtype=dtype,
            int8=int8,
            backend=backend,
            on_progress=both(on_progress, shown),
            threads=options.threads,
            memory=_limit(options),
            prompt_cache=options.prompt_cache,
        )
    return loaded, found.path


def _load_engines(
    folder: Path, options: LoadOptions, on_progress: Progress, notes: tuple[str, ...] = ()
) -> Runtime:
    from sana_edge.engines.runtime import EngineRuntime

    check_exported(folder, options)
    with memory_errors(str(folder)), bar(not options.progress, "part") as shown:
        return EngineRuntime.load(
            folder,
            device=options.device,
            dtype=options.dtype,
            int8=options.int8,
            # who names engines wants them, or to know why not
            backend=options.backend if options.engines is None else "tensorrt",
            engine_folder=options.engines,
            trust_engine=options.trust_engine,
            threads=options.threads,
            memory=_limit(options),
            prompt_cache=options.prompt_cache,
            notes=notes,
            on_progress=both(on_progress, shown),
        )


def _limit(options: LoadOptions) -> int | None:
    """The budget in bytes."""
    return None if options.memory is None else parse_memory(options.memory)
