"""`sana-edge quantize`: a float model in, an INT8 package with a report of what that cost out."""

from __future__ import annotations

import shutil
from pathlib import Path

from sana_edge.atomic import write_json
from sana_edge.calib import calibrate, package_component
from sana_edge.calib.job import Job, layer_names
from sana_edge.calib.package_writer import new_folder
from sana_edge.calib.prompts import PromptSet, default_set, load_prompts
from sana_edge.calib.report.measure import Run, measure
from sana_edge.calib.report.picture import draw
from sana_edge.calib.report.report import FILE, PICTURE, Layer, Report
from sana_edge.calib.settings import Settings, calibration_folder
from sana_edge.calib.trajectory import Comparison, Trajectory, compare, follow
from sana_edge.config import AutoencoderConfig
from sana_edge.errors import InvalidInput
from sana_edge.memory import memory_errors
from sana_edge.progress import Progress, unseen
from sana_edge.request import MAX_SEED, Plan, Request
from sana_edge.store import hub, package
from sana_edge.store.folder import read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.torch_runtime.runtime import Stages, choose_device, load_stages


def quantize(
    model: str,
    output: Path,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    offline: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write a package of an INT8 denoiser, decoder and text encoder, whole or not at all, with its report.

    With calibration the float model runs, in fp32. Without it nothing runs: tensors go from file to file
    one by one, in less memory than the model takes.

    Args:
        model: as `sana_edge.Sana.load` takes it; a float model.
        output: the folder to make. A calibration that is interrupted leaves a hidden folder beside it, which
            the next one takes up.
        device: of the calibration, "auto", "cpu" or "cuda".
        force: replace a model folder at ``output``, but not the float model itself.
        progress: called as the work goes on; a download is shown on stderr where it is given.

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
        found = hub.resolve(model, offline=offline, progress=progress is not None)
        if package.is_package(found.path):
            raise InvalidInput(f"{model} is already quantized", "give the float model that it was made of")
        source = found.path.resolve()
        if output.resolve() in (source, *source.parents):
            raise InvalidInput(f"{output} is where the float model is", "choose another --output")
        job = Job(found, folder, settings, place, progress or unseen)
        if settings.calibrate:
            prompts = given or default_set(found.name, found.path)
            report = _calibrated(job, prompts, calibration_folder(output))
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
        config = AutoencoderConfig.from_dict(read_json(job.model.path / "vae" / "config.json"))
        job.write("vae", package_component.quantized_decoder(config, job.state("vae"), note_error))
        job.write_rest()
    order = {name: place for place, name in enumerate(layer_names(job.denoiser_config))}
    # q, k and v are separate in the file: the lowest stands for the layer
    layers = [Layer(name, min(values)) for name, values in errors.items()]
    layers.sort(key=lambda layer: order.get(layer.name, len(order)))
    note = "without calibration the model was not run: no pictures, no errors of steps, no times"
    return job.report(layers, None, notes=[note])


def _calibrated(job: Job, prompts: PromptSet, observed: Path) -> Report:
    with job.part("load"):
        # a damaged weight would show after the observation, or not at all
        job.check()
        stages = load_stages(job.model, device=job.device, dtype="fp32")
    plans, notes = _plans(job.settings, prompts, stages), list(prompts.notes)
    with job.part("float pictures"):
        references = []
        for number, plan in enumerate(plans, start=1):
            references.append(follow(stages, plan))
            job.progress("float pictures", number, len(plans))
    with job.part("calibrate"):
        calibration = calibrate.calibrate(
            stages, prompts, job.settings, folder=observed, progress=job.progress, note=notes.append
        )
    with job.part("quantize"):
        calibrate.quantize(stages, calibration, job.settings)
        for name, state in (
            ("transformer", stages.denoiser.to_diffusers()),
            ("vae", stages.autoencoder.state_dict()),
        ):
            half = package_component.common_dtype(job.state(name))
            job.write(name, package_component.stored(state, half), calibration)
        # the float model makes room for what was made of it
        del stages, state
        job.write_rest()
    return job.report(
        calibration.layers,
        calibration,
        comparisons=_compare(job, references),
        timesteps=references[0].timesteps.tolist() if references else [],
        runs=_runs(job, plans, notes),
        notes=notes,
    )


def _plans(settings: Settings, prompts: PromptSet, stages: Stages) -> list[Plan]:
    """Pictures to compare: prompts evenly over the set, and noise that calibration did not see."""
    total = len(prompts.prompts)
    count = min(settings.pictures, total)
    plans = []
    for number in range(count):
        request = Request(
            prompts.prompts[number * total // count],
            steps=settings.steps,
            size=settings.size,
            exact_size=settings.size is not None,
            guidance=settings.guidance,
            seed=(settings.seed + total + number) % MAX_SEED,
        )
        plans.append(request.plan(stages.denoiser.config.native_size, stages.sampler.kind))
    return plans


def _compare(job: Job, references: list[Trajectory]) -> list[Comparison]:
    """The package as it was written, loaded as any model is, beside the float model."""
    if not references:
        return []
    with job.part("INT8 pictures"):
        stages = load_stages(ResolvedModel(job.folder, job.model.name), device=job.device, dtype="fp32")
        comparisons = []
        for number, reference in enumerate(references, start=1):
            comparisons.append(compare(stages, reference))
            job.progress("INT8 pictures", number, len(references))
        return comparisons


def _runs(job: Job, plans: list[Plan], notes: list[str]) -> dict[str, Run]:
    if not plans:
        return {}
    with job.part("measure"):
        models = {"float": job.model.path, "int8": job.folder}
        runs = {name: measure(str(path), plans[0], device=job.device.type) for name, path in models.items()}
    notes += [f"the {name} model's time and memory: not measured" for name in runs if runs[name] is None]
    return {name: run for name, run in runs.items() if run is not None}
