"""`sana-edge quantize`: a float model in, an INT8 package with a report of what that cost out."""

from __future__ import annotations

import itertools
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sana_edge.calib import package_component
from sana_edge.calib.calibrate import Calibration, calibrate_decoder, calibrate_denoiser, joined
from sana_edge.calib.estimate import estimated_seconds, shown_time
from sana_edge.calib.job import Job, layer_names
from sana_edge.calib.networks import Networks
from sana_edge.calib.observe import Observation
from sana_edge.calib.package_writer import new_folder
from sana_edge.calib.prompts import PromptSet, default_set, load_prompts
from sana_edge.calib.report.measure import Run, measure
from sana_edge.calib.report.picture import draw
from sana_edge.calib.report.report import FILE, PICTURE, Layer, Report
from sana_edge.calib.sensitivity import probe
from sana_edge.calib.settings import Settings, calibration_folder
from sana_edge.calib.trajectory import Comparison, Trajectory, decoded, denoised, judged, retraced
from sana_edge.errors import InvalidInput
from sana_edge.nets.text_encoder import EncodedTexts
from sana_edge.progress import Progress, unseen
from sana_edge.request.bounds import MAX_SEED
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub, package
from sana_edge.store.folder import foreign_parts, read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.tiny_autoencoder import decoder_config
from sana_edge.system.atomic import write_json
from sana_edge.system.memory import give_back, memory_errors, shown
from sana_edge.torch_runtime.device import choose_device
from sana_edge.torch_runtime.runtime import TorchRuntime

logger = logging.getLogger("sana_edge")

# bytes of weights that another process may load to be measured; the float model's may be a laptop's memory
_MEASURED = 4 << 30


def quantize(
    model: str,
    output: Path,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = logger.info,
) -> Report:
    """Write a package of an INT8 denoiser, decoder and text encoder, whole or not at all, with its report.

    With calibration the float model runs, in fp32. Without it nothing runs: tensors go from file to file
    one by one, in less memory than the model takes.

    Args:
        model: as `sana_edge.Sana.load` takes it; a float model.
        output: the folder to make. A calibration that is interrupted leaves a hidden folder beside it, which
            the next one takes up.
        device: of the calibration, "auto", "cpu" or "cuda".
        revision: of a repository, see `sana_edge.store.hub.resolve`.
        force: replace a model folder at ``output``, but not the float model itself.
        progress: called as the work goes on; a download is shown on stderr where it is given.
        say: is told what a calibration will do, and about how long, before it starts.

    Raises:
        InvalidInput: the model is quantized already, ``output`` is taken, or the prompts are not usable.
        CheckpointError: the model is damaged; the message names the tensor.
        SanaError: as `new_folder`, `sana_edge.store.hub.resolve` and `sana_edge.calib.observe.observe`.
    """
    settings, place = settings or Settings(), choose_device(device)
    output = output.absolute()
    with new_folder(output, force=force) as folder, memory_errors(model):
        # a mistake in these shows before anything is downloaded
        given = None if settings.prompts is None else load_prompts(settings.prompts)
        found = hub.resolve(model, offline=offline, progress=progress is not None, revision=revision)
        if package.is_package(found.path):
            raise InvalidInput(f"{model} is already quantized", "give the float model that it was made of")
        source = found.path.resolve()
        if output.resolve() in (source, *source.parents):
            raise InvalidInput(f"{output} is where the float model is", "choose another --output")
        # what is not copied into the package cannot be noted when it draws
        for note in foreign_parts(found.path):
            say(f"note:  {note}")
        job = Job(found, folder, settings, place, progress or unseen)
        if settings.calibrate:
            prompts = given or default_set(found.name, found.path)
            report = _calibrated(job, prompts, calibration_folder(output), say)
        else:
            report = _uncalibrated(job)
        write_json(folder / FILE, report.to_dict())
        (folder / PICTURE).write_bytes(draw(report))
    shutil.rmtree(calibration_folder(output), ignore_errors=True)
    return report


def _uncalibrated(job: Job) -> Report:
    ours = {theirs: name for name, parts in layer_names(job.denoiser_config).items() for theirs in parts}
    errors: dict[str, list[float]] = {}

    def note_error(module: str, sqnr: float) -> None:
        errors.setdefault(ours.get(module, module), []).append(sqnr)

    with job.part("quantize"):
        denoiser = package_component.quantized_denoiser(
            job.denoiser_config, job.state("transformer"), note_error
        )
        job.write("transformer", denoiser)
        config = decoder_config(read_json(job.model.path / "vae" / "config.json"))
        decoder = package_component.quantized_decoder(config, job.state("vae"), note_error)
        encoder = package_component.stored(package_component.quantized_encoder(config, job.state("vae")))
        job.write("vae", itertools.chain(decoder, encoder))
        job.write_rest()
    order = {name: place for place, name in enumerate(layer_names(job.denoiser_config))}
    # q, k and v are separate in the file: the lowest stands for the layer
    layers = [Layer(name, min(values)) for name, values in errors.items()]
    layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    note = "without calibration the model was not run: no pictures, no errors of steps, no times"
    return job.report(layers, None, notes=[note])


def _calibrated(job: Job, prompts: PromptSet, observed: Path, say: Callable[[str], None]) -> Report:
    networks, notes = Networks(job.model, job.device), list(prompts.notes)
    known = networks.empty()
    settings = job.settings.resolved(known.denoiser.config.native_size, known.sampler.kind)
    job, prompts = replace(job, settings=settings), settings.selected(prompts)
    plans = _plans(settings, prompts, known)
    asked = _all_plans(settings, prompts, known, plans)
    say(_announcement(job, known, asked, len(plans)))
    with job.part("load"):
        # a damaged weight would show after the observation, or not at all
        job.check()
        weights = networks.checksum()
    with job.part("read prompts"):
        texts = networks.texts(asked, job.progress)
    calibration, references = _networks(job, networks, texts, weights, prompts, plans, observed, notes.append)
    with job.part("quantize"):
        job.write_rest()
    return job.report(
        calibration.layers,
        calibration,
        comparisons=_compare(job, references),
        timesteps=references[0].timesteps.tolist() if references else [],
        runs=_runs(job, plans, notes),
        notes=notes,
    )


def _announcement(job: Job, runtime: TorchRuntime, asked: list[Plan], pictures: int) -> str:
    """What will be done, and about how long."""
    state, plan, prompts = job.state("text_encoder"), asked[0], len(asked) - pictures
    text = sum(math.prod(state.shape(name)) for name in state if "embed_tokens" not in name)
    seconds = estimated_seconds(runtime, text, job.settings, pictures, plan, prompts)
    return (
        f"calibrating with {prompts} prompts, {plan.steps} steps, {plan.width}x{plan.height}, and comparing "
        f"{pictures} pictures: about {shown_time(seconds)} here"
    )


def _networks(
    job: Job,
    networks: Networks,
    texts: EncodedTexts,
    weights: str,
    prompts: PromptSet,
    plans: list[Plan],
    observed: Path,
    note: Callable[[str], None],
) -> tuple[Calibration, list[Trajectory]]:
    """Write the quantized denoiser and decoder; and what the float model makes of ``plans``.

    The denoiser is loaded twice: its layers are smoothed when the decoder has been observed, and the
    decoder's when the denoiser has made latents for it.
    """
    settings = job.settings
    told: dict[str, Any] = {"progress": job.progress, "note": note}
    options: dict[str, Any] = {name: getattr(settings, name) for name in ("steps", "guidance", "seed")}
    with job.part("load"):
        runtime = networks.denoising(texts)
    with job.part("float pictures"):
        references = []
        for number, plan in enumerate(plans, start=1):
            references.append(denoised(runtime, plan))
            job.progress("float pictures", number, len(plans))
    with job.part("calibrate"):
        observation = Observation(
            runtime, prompts, weights, size=settings.size, folder=observed, **options, **told
        )
        observation.denoise(runtime)
        cells, few = settings.cells, prompts.prompts[: settings.probes]
        given = probe(runtime, few, cells=cells, crop=cells // 2, **options)
        # the denoiser makes room
        del runtime
        runtime = networks.decoding()
    with job.part("float pictures"):
        references = [decoded(runtime, reference) for reference in references]
    with job.part("calibrate"):
        observation.decode(runtime)
        statistics = observation.statistics
        info = {**statistics.info, "checksum": statistics.checksum(), "alpha": settings.alpha}
        decoder = calibrate_decoder(runtime.autoencoder, statistics, given, settings, **told)
    with job.part("quantize"):
        encoder = package_component.quantized_encoder(runtime.autoencoder.config, job.state("vae"))
        sources = {"vae": _written(job, "vae", {**runtime.autoencoder.state_dict(), **encoder})}
        del encoder
        del runtime
    with job.part("calibrate"):
        runtime = networks.denoising(texts)
        denoiser = calibrate_denoiser(runtime.denoiser, statistics, given, settings, **told)
    with job.part("quantize"):
        sources["transformer"] = _written(job, "transformer", runtime.denoiser.to_diffusers())
        calibration = joined(denoiser, decoder, info)
        for name, source in sources.items():
            job.write_config(name, source, calibration)
    return calibration, references


def _written(job: Job, name: str, state: Mapping[str, Tensor]) -> str:
    """Write a quantized network; returns the checksum of what it was made of."""
    half = package_component.common_dtype(job.state(name))
    return job.write_weights(name, package_component.stored(state, half))


def _plans(settings: Settings, prompts: PromptSet, runtime: TorchRuntime) -> list[Plan]:
    """Pictures to compare: prompts evenly over the set, and noise that calibration did not see."""
    total = len(prompts.prompts)
    count = min(settings.pictures or 0, total)
    return [
        _plan(settings, prompts.prompts[number * total // count], runtime, total + number)
        for number in range(count)
    ]


def _all_plans(
    settings: Settings, prompts: PromptSet, runtime: TorchRuntime, plans: list[Plan]
) -> list[Plan]:
    """Of everything whose prompt is read: pictures to compare and those to calibrate with."""
    return [*plans, *(_plan(settings, prompt, runtime, 0) for prompt in prompts.prompts)]


def _plan(settings: Settings, prompt: str, runtime: TorchRuntime, number: int) -> Plan:
    request = Request(
        prompt,
        steps=settings.steps,
        size=settings.size,
        exact_size=settings.size is not None,
        guidance=settings.guidance,
        seed=(settings.seed + number) % MAX_SEED,
    )
    return request.plan(runtime.denoiser.config.native_size, runtime.sampler.kind)


def _compare(job: Job, references: list[Trajectory]) -> list[Comparison]:
    """The package as it was written, loaded as any model is, beside the float model."""
    if not references:
        return []
    with job.part("INT8 pictures"):
        networks = Networks(ResolvedModel(job.folder, job.model.name), job.device)
        texts = networks.texts([reference.plan for reference in references], unseen)
        runtime, found = networks.denoising(texts), []
        for number, reference in enumerate(references, start=1):
            found.append(retraced(runtime, reference))
            job.progress("INT8 pictures", number, len(references))
        del runtime
        runtime = networks.decoding()
        return [judged(runtime, *pair) for pair in zip(references, found, strict=True)]


def _runs(job: Job, plans: list[Plan], notes: list[str]) -> dict[str, Run]:
    if not plans:
        return {}
    with job.part("measure"):
        # to the processes that are measured
        give_back()
        models = {"float": job.model.path, "int8": job.folder}
        runs: dict[str, Run | None] = {}
        for name, path in models.items():
            size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
            fits = size <= _MEASURED or job.device.type != "cpu"
            runs[name] = measure(str(path), plans[0], device=job.device.type) if fits else None
            why = "" if fits else f", as its weights alone are {shown(size)}"
            if runs[name] is None:
                notes.append(f"the {name} model's time and memory: not measured{why}")
    return {name: run for name, run in runs.items() if run is not None}
