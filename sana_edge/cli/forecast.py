"""The forecast of ``sana-edge plan``: what runs a model here, its memory and its time, and what would fit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sana_edge.cli import engine_times
from sana_edge.cli.fastest import export_place, suited
from sana_edge.cli.proposals import Ask, Proposal, least_of, proposals_of, smaller, work_of
from sana_edge.errors import MissingDependency, SanaError, torch_extra
from sana_edge.plan.memory import (
    BASE,
    RUNNING,
    Order,
    Stage,
    engine_stages,
    fitting_dtypes,
    in_turn,
    order,
    torch_stages,
)
from sana_edge.plan.model import Facts, facts_of
from sana_edge.prompt import CHI
from sana_edge.request.loading import LoadOptions
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.runtime import check_exported, exported_for
from sana_edge.store import hub, manifest
from sana_edge.store.manifest import is_exported
from sana_edge.store.tokenizer import PromptTokenizer
from sana_edge.system.memory import available_memory, shown, used_memory

# tokens of SANA's instruction in Gemma's vocabulary
_INSTRUCTION = 246
# of the first picture's time, from which on a further one is worth a note
_SHORTER = 0.9
_EXPORTED = "the first `generate` exports it for OpenVINO, which then draws faster than what is said here"


@dataclass(frozen=True)
class Forecast:
    """What a picture will take. Bytes; seconds of the first picture, without loading.

    Attributes:
        place: "cpu" or "cuda".
        base: what libraries take before a model is loaded.
        stages: of the networks, in the order of their work.
        way: how they fit, None where they do not; and the peak of it, or the least that they need.
        limit: what may be taken in all; None: unknown.
        seconds: by "text", "denoise" and "decode"; empty where nothing was timed.
    """

    model: str
    backend: str
    place: str
    kinds: str
    size: tuple[int, int]
    drawn: tuple[int, int]
    steps: int
    base: int
    stages: tuple[Stage, ...]
    way: Order | None
    peak: int
    limit: int | None
    download: int
    disk: int
    seconds: dict[str, float]
    proposals: tuple[Proposal, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            **dataclasses.asdict(self),
            "fits": self.way is not None,
            "stages": [{**dataclasses.asdict(stage), "peak": stage.peak} for stage in self.stages],
            "total_seconds": sum(self.seconds.values()) if self.seconds else None,
        }


def forecast(model: str, request: Request, options: LoadOptions, *, image: bool, probe: bool) -> Forecast:
    """What a picture of a model will take here.

    Args:
        image: it starts from a picture.
        probe: time some layers.

    Raises:
        SanaError: as `sana_edge.Sana.load`, but that nothing is downloaded or loaded.
    """
    exported = exported_for(model, options)
    if exported is not None:
        return _of_engine(exported, request, options, image, probe)
    try:
        return _of_torch(model, request, options, image, probe)
    except MissingDependency:
        # as `generate` does
        exported = hub.bundled_graphs(model, int8=True) if options.backend == "auto" else None
        if exported is None:
            raise
        return _of_engine(exported, request, options, image, probe)


def _of_torch(model: str, request: Request, options: LoadOptions, image: bool, probe: bool) -> Forecast:
    facts = facts_of(model, int8=options.int8, decoder=options.decoder, revision=options.revision)
    found = None if facts.path is None else suited(model, options)
    export = None if found is None else export_place(found)
    if export is not None and is_exported(export):
        return _of_engine(export, request, options, image, probe)
    plan = request.plan(facts.denoiser.native_size, facts.sampler)
    with torch_extra():
        # which loading a text encoder imports
        import transformers.models.gemma2.modeling_gemma2  # noqa: F401

        from sana_edge.fused import backends
        from sana_edge.torch_runtime import probe as timing
        from sana_edge.torch_runtime.device import check_target, torch_threads
        from sana_edge.torch_runtime.load import load_dtype
    device = check_target(options.device, options.dtype, options.backend)
    int8 = options.int8 or facts.int8
    backend = backends.choose(options.backend, device, options.dtype, int8, facts.denoiser)
    dtype = options.dtype
    if dtype == "auto":
        dtype = load_dtype(facts.stored["denoiser"].dtype, device, fused=backend.fused)
    on_host = device.type == "cpu"
    base, free = _base("torch"), available_memory(device)
    limit = _limit(base if on_host else 0, free, options)
    text_dtype = None
    if options.dtype == "auto" and on_host and limit is not None:
        dtype, text_dtype = fitting_dtypes(facts, dtype, int8=int8, free=max(limit - base, 0))
    work = work_of(plan, image)
    stages = torch_stages(facts, work, dtype, text_dtype, int8=int8, host=on_host)
    spent: dict[str, float] = {}
    if probe:
        with torch_threads(options.threads):
            timed = timing.seconds(
                facts, work, dtype=dtype, int8=int8, device=device, instruction=_instruction(facts)
            )
        spent = _spent(timed, plan)
    ask = Ask(facts, plan, dtype, int8, on_host, image, options)
    return _forecast(
        name=facts.name,
        backend=f"torch ({backend.name})" if backend.fused else "torch",
        place=device.type,
        kinds=f"{dtype}, INT8" if int8 else dtype,
        plan=plan,
        base=base if on_host else 0,
        stages=stages,
        limit=limit,
        download=facts.download,
        disk=facts.disk,
        seconds=spent,
        proposals=lambda room: tuple(proposals_of(ask, room)),
        notes=(*_notes(facts, int8, on_host), *([_EXPORTED] if export is not None else [])),
    )


def _of_engine(folder: Path, request: Request, options: LoadOptions, image: bool, probe: bool) -> Forecast:
    from sana_edge.engines import choose
    from sana_edge.engines.engine import Settings

    check_exported(folder, options)
    described = manifest.read(folder)
    settings = Settings(threads=options.threads, precision=options.dtype, engine_folder=options.engines)
    backend = options.backend if options.engines is None else "tensorrt"
    kind = choose.choose(backend, options.device, folder, settings)
    plan = request.plan(described.native_size, described.sampler.kind, described.size)
    base, work = _base(kind.name), work_of(plan, image)
    limit = _limit(base, available_memory(), options)
    stages = engine_stages(described, work, kind.name, kind.precision)
    spent: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    if probe:
        times = engine_times.measured(folder, described, plan, options)
        spent, further = times.first, sum(times.further.values())
        if further < _SHORTER * sum(spent.values()):
            notes = (f"a further picture of the same process takes about {further:.2g} s",)
    return _forecast(
        name=described.name,
        backend=kind.name,
        place=kind.device,
        kinds=f"{kind.precision}, INT8" if described.quantization else kind.precision,
        plan=plan,
        base=base,
        stages=stages,
        limit=limit,
        download=0,
        disk=sum(file.bytes for file in described.files.values()),
        seconds=spent,
        proposals=lambda room: (
            tuple(smaller(plan, lambda p: least_of(described, p, kind, image), room))
            if order(stages, room) is None
            else ()
        ),
        notes=notes,
    )


def _forecast(
    *, name: str, plan: Plan, limit: int | None, base: int, stages: Sequence[Stage], **rest: Any
) -> Forecast:
    room = None if limit is None else max(limit - base, 0)
    way = order(stages, room)
    peak = base + (in_turn(stages, tiles=plan.tile != 0) if way is None else way[1])
    known = [stage for stage in stages if stage.name != "text"]
    again = order(known, room)
    if again is not None:
        said = f"{shown(base + again[1])} with a prompt that was drawn before: its text encoder is not loaded"
        rest["notes"] = (*rest["notes"], said)
    proposals = rest.pop("proposals")
    return Forecast(
        model=name,
        size=plan.size,
        drawn=(plan.width, plan.height),
        steps=plan.steps,
        base=base,
        stages=tuple(stages),
        way=None if way is None else way[0],
        peak=peak,
        limit=limit,
        proposals=() if room is None or (way is not None and way[0] == "together") else proposals(room),
        **rest,
    )


def _spent(found: dict[str, float], plan: Plan) -> dict[str, float]:
    steps = plan.steps - plan.skip
    return {"text": found["text"], "denoise": steps * found["step"], "decode": found["decode"]}


def _base(library: str) -> int:
    """What a library takes without a model: what it has now, and what it will have once it computes."""
    return (used_memory() or BASE[library]) + RUNNING[library]


def _limit(base: int, free: int | None, options: LoadOptions) -> int | None:
    """What may be taken in all: what is free and what libraries have, within the budget."""
    there = None if free is None else base + free
    if options.memory is None:
        return there
    return int(options.memory) if there is None else min(there, int(options.memory))


def _instruction(facts: Facts) -> int:
    if facts.path is None or not os.path.isdir(facts.path / "tokenizer"):
        return _INSTRUCTION
    try:
        return len(PromptTokenizer(facts.path / "tokenizer").encode("\n".join(CHI)))
    except SanaError:
        return _INSTRUCTION


def _notes(facts: Facts, int8: bool, on_host: bool) -> tuple[str, ...]:
    from sana_edge.int8.matmul import describe

    fast, why = describe("cpu")
    notes = []
    if int8 and on_host and not fast:
        notes.append(f"INT8 saves memory here, not time: {why}")
    if facts.path is None:
        notes.append("not on this machine: sizes are those that its authors publish")
    return tuple(notes)
