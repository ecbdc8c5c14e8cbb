"""The face of Automatic1111's web UI: text and image to image, progress, and lists that clients ask for."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sana_edge.errors import InvalidInput
from sana_edge.request.plan import random_seed
from sana_edge.request.request import SAMPLERS
from sana_edge.serve.fields import MAX_PICTURES, Fields, shown
from sana_edge.serve.http import Json, fields, finished
from sana_edge.serve.job import Job
from sana_edge.serve.service import Service
from sana_edge.serve.uploads import MAX_UPLOAD

_PREFIX = "/sdapi/v1"
# the web UI's names of previews that are no decode; the others are decoded
_LINEAR = ("Approx cheap", "Approx NN")
# what of a request would change the picture there and does not here; true, or a list that is not empty
_FOREIGN = (
    *("enable_hr", "restore_faces", "tiling", "refiner_checkpoint", "script_name", "styles"),
    "alwayson_scripts",
)
_NOTHING: tuple[Any, ...] = (None, False, "", [], {}, "None")
_MAX_BLUR = 64


class Automatic1111:
    """Routes under ``/sdapi/v1/``. Unknown fields are ignored; ``info`` says what has no effect."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._model = service.default
        self._previews = _LINEAR[0]
        # those of this face, in the order of their arrival
        self._jobs: list[Job] = []

    def routes(self) -> list[Route]:
        lists: dict[str, Any] = {
            "samplers": [{"name": name, "aliases": [], "options": {}} for name in SAMPLERS],
            "schedulers": [{"name": "automatic", "label": "Automatic"}],
            "upscalers": [{"name": "None", "model_name": None, "model_path": None, "scale": 1}],
            "latent-upscale-modes": [],
            "sd-vae": [],
            "loras": [],
            "embeddings": {"loaded": {}, "skipped": {}},
            "hypernetworks": [],
            "face-restorers": [],
            "realesrgan-models": [],
            "prompt-styles": [],
            "scripts": {"txt2img": [], "img2img": []},
            "script-info": [],
            "cmd-flags": {},
        }

        def fixed(content: Any) -> Any:
            async def answer(request: Request) -> Response:
                return Json(content)

            return answer

        return [
            *(Route(f"{_PREFIX}/{name}", fixed(content)) for name, content in lists.items()),
            Route(f"{_PREFIX}/options", self.options),
            Route(f"{_PREFIX}/options", self.choose, methods=["POST"]),
            Route(f"{_PREFIX}/sd-models", self.models),
            Route(f"{_PREFIX}/refresh-checkpoints", fixed(None), methods=["POST"]),
            Route(f"{_PREFIX}/progress", self.progress),
            # of the web UI's queue: clients ask it whether anybody is there
            Route("/queue/status", self.waiting),
            Route(f"{_PREFIX}/interrupt", self.interrupt, methods=["POST"]),
            Route(f"{_PREFIX}/skip", self.interrupt, methods=["POST"]),
            Route(f"{_PREFIX}/txt2img", self.draw, methods=["POST"]),
            Route(f"{_PREFIX}/img2img", self.redraw, methods=["POST"]),
        ]

    async def options(self, request: Request) -> Response:
        """The model that is chosen."""
        chosen = {"sd_model_checkpoint": self._model, "show_progress_type": self._previews}
        return Json({**chosen, "sd_vae": "Automatic", "samples_format": "png"})

    async def choose(self, request: Request) -> Response:
        """Choose a model for requests that name none, and the kind of previews; nothing else can be set."""
        asked = await fields(request)
        name, previews = asked.text("sd_model_checkpoint"), asked.text("show_progress_type")
        if name in self._service.workers:
            self._model = name
        if previews is not None:
            self._previews = previews
        return Json({})

    async def models(self, request: Request) -> Response:
        """The models, without where they lie."""
        empty: dict[str, Any] = {"hash": None, "sha256": None, "filename": "", "config": None}
        names = self._service.workers
        return Json([{"title": name, "model_name": name, **empty, "filename": name} for name in names])

    async def waiting(self, request: Request) -> Response:
        """How many jobs wait, as Gradio 3 says it."""
        return Json({"msg": "estimation", "queue_size": self._service.queue.waiting})

    async def draw(self, request: Request) -> Response:
        """Text to image."""
        return await self._answer(request, await fields(request), {})

    async def redraw(self, request: Request) -> Response:
        """Image to image."""
        asked = await fields(request, MAX_UPLOAD)
        return await self._answer(request, asked, await asyncio.to_thread(_start, asked))

    async def _answer(self, request: Request, asked: Fields, start: dict[str, Any]) -> Response:
        job, notes = await asyncio.to_thread(_job, asked, self._service, self._model, start)
        job.linear = self._previews in _LINEAR
        self._service.submit(job)
        self._jobs.append(job)
        try:
            await finished(request, self._service, job)
        finally:
            self._jobs.remove(job)
        return await asyncio.to_thread(lambda: Json(_answer(job, notes)))

    async def interrupt(self, request: Request) -> Response:
        """Cancel what this face is drawing; jobs of other faces go on."""
        for job in self._jobs:
            if job.state == "running":
                self._service.cancel(job)
        return Json({})

    async def progress(self, request: Request) -> Response:
        """How far the first job of this face is, with what there is to see of it."""
        job = next((job for job in self._jobs if job.state == "running"), None)
        steps = each = at = 0
        done = 0.0
        current = None
        if job is not None:
            stage, images = job.stage, job.request.images
            if stage.name == "denoise":
                steps, each = stage.count, stage.count // images
                at = stage.done - len(job.pictures) * each
                done = stage.done / steps
            elif stage.name == "decode":
                done = (len(job.pictures) + 1) / images
            if request.query_params.get("skip_current_image", "false").lower() != "true":
                job.preview_wanted = True
                current = job.previews[-1].base64 if job.previews else None
        state = {
            "skipped": False,
            "interrupted": job is not None and job.cancel.is_set(),
            "job": "" if job is None else "txt2img",
            "job_count": 0 if job is None else job.request.images,
            "job_no": 0 if job is None else len(job.pictures),
            "job_timestamp": "0" if job is None else str(int(job.created)),
            "sampling_step": at,
            "sampling_steps": each,
        }
        left = 0.0 if job is None or job.seconds_left is None else job.seconds_left
        progress = min(done, 0.99) if job is not None else 0.0
        content = {"progress": progress, "eta_relative": left, "state": state}
        return Json({**content, "current_image": current, "textinfo": None})


def _start(asked: Fields) -> dict[str, Any]:
    """What a drawing starts from."""
    images = asked.values.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        raise InvalidInput(f"init_images is {shown(images)}", "give a list with one picture in base64")
    return {
        "image": Fields({"init_images": images[0]}).picture("init_images"),
        "mask": _mask(asked),
        "strength": asked.number("denoising_strength"),
    }


def _mask(asked: Fields) -> PIL.Image.Image | None:
    """White where it is drawn anew, with edges as soft as they are asked for."""
    mask = asked.picture("mask")
    if mask is None:
        return None
    mask = mask.convert("L")
    if asked.whole("inpainting_mask_invert", low=0, high=1):
        mask = PIL.ImageOps.invert(mask)
    both = asked.whole("mask_blur", low=0, high=_MAX_BLUR)
    blur = [
        asked.whole(f"mask_blur_{axis}", low=0, high=_MAX_BLUR) if both is None else both for axis in "xy"
    ]
    return mask.filter(PIL.ImageFilter.GaussianBlur((blur[0] or 0, blur[1] or 0)))


def _mask_notes(asked: Fields) -> list[str]:
    """What of inpainting is not as in the web UI."""
    notes: list[str] = []
    if asked.values.get("mask") in _NOTHING:
        return notes
    if asked.values.get("inpaint_full_res") not in (*_NOTHING, 0):
        notes.append(
            "inpaint_full_res has no effect: the whole picture is drawn, not the masked part enlarged"
        )
    if asked.values.get("inpainting_fill") not in (None, 1):
        notes.append(
            "inpainting_fill is 1 (original): what lies under the mask is what the drawing starts from"
        )
    return notes


def _job(
    asked: Fields, service: Service, model: str, start: dict[str, Any] | None = None
) -> tuple[Job, list[str]]:
    """The job of a request, and what the caller should know about it."""
    notes = [
        f"{name} is not there and has no effect"
        for name in _FOREIGN
        if asked.values.get(name) not in _NOTHING
    ]
    notes += _mask_notes(asked)
    sampler = asked.text("sampler_name", "sampler_index")
    if sampler is not None and sampler not in SAMPLERS:
        notes.append(f"sampler {shown(sampler)} is not there: the model's own is used")
        sampler = None
    settings = asked.values.get("override_settings")
    if settings is not None and not isinstance(settings, dict):
        raise InvalidInput(f"override_settings is {shown(settings)}", "give an object")
    named = Fields(settings or {}).text("sd_model_checkpoint")
    batch, rounds = (asked.whole(name, low=1, high=MAX_PICTURES) or 1 for name in ("batch_size", "n_iter"))
    if batch * rounds > MAX_PICTURES:
        hint = f"ask for at most {MAX_PICTURES} pictures"
        raise InvalidInput(f"batch_size {batch} times n_iter {rounds} is {batch * rounds}", hint)
    width, height = asked.whole("width"), asked.whole("height")
    if (width is None) != (height is None):
        raise InvalidInput(f"width is {shown(width)}, height is {shown(height)}", "give both, or none")
    more: dict[str, Any] = {"sampler": sampler, "variation": _subseed(asked), **(start or {})}
    if asked.whole("seed") == -1:
        # their word for a random one
        asked = Fields({**asked.values, "seed": None})
    request = asked.request(
        images=batch * rounds, size=None if width is None or height is None else (width, height), **more
    )
    return Job(service.known(named) if named in service.workers else model, request), notes


def _subseed(asked: Fields) -> tuple[tuple[int, float], ...]:
    """Their variation seed, of which -1 is a random one, and its strength, of which 0 is none."""
    strength, seed = asked.number("subseed_strength"), asked.whole("subseed")
    if not strength:
        return ()
    return ((random_seed() if seed in (None, -1) else seed, strength),)


def _answer(job: Job, notes: list[str]) -> dict[str, Any]:
    pictures = job.pictures
    first = pictures[0].metadata
    mixed = [picture.metadata.get("variation", [[0, 0]])[-1] for picture in pictures]
    shared = {
        "prompt": first["prompt"],
        "negative_prompt": first["negative_prompt"],
        "seed": pictures[0].seed,
        "width": pictures[0].width,
        "height": pictures[0].height,
        "sampler_name": first["sampler"],
        "cfg_scale": first["guidance"],
        "steps": first["steps"],
    }
    info = {
        **shared,
        "all_prompts": [picture.metadata["prompt"] for picture in pictures],
        "all_negative_prompts": [picture.metadata["negative_prompt"] for picture in pictures],
        "all_seeds": [picture.seed for picture in pictures],
        "all_subseeds": [seed for seed, _ in mixed],
        "subseed": mixed[0][0],
        "subseed_strength": mixed[0][1],
        "batch_size": len(pictures),
        "sd_model_name": first["model"],
        "infotexts": [_infotext(picture.metadata) for picture in pictures],
        "index_of_first_image": 0,
        "job_timestamp": str(math.floor(job.created)),
        "notes": [*notes, *dict.fromkeys(note for picture in pictures for note in picture.notes)],
    }
    parameters = {**shared, "batch_size": len(pictures), "n_iter": 1}
    images = [picture.base64 for picture in pictures]
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def _infotext(metadata: dict[str, Any]) -> str:
    """The text that the web UI shows below a picture."""
    lines = [metadata["prompt"]]
    if metadata["negative_prompt"]:
        lines.append(f"Negative prompt: {metadata['negative_prompt']}")
    width, height = metadata["size"]
    lines.append(
        f"Steps: {metadata['steps']}, Sampler: {metadata['sampler']}, CFG scale: {metadata['guidance']}, "
        f"Seed: {metadata['seed']}, Size: {width}x{height}, Model: {metadata['model']}"
        + "".join(
            f", Variation seed: {seed}, Variation seed strength: {strength}"
            for seed, strength in metadata.get("variation", ())
        )
    )
    return "\n".join(lines)
