"""The face of OpenAI's image API: generations, edits, streams with true partial pictures, and models."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sana_edge.errors import InvalidInput
from sana_edge.image import metadata_of
from sana_edge.request.plan import random_seed
from sana_edge.serve.fields import MAX_PICTURES, Fields
from sana_edge.serve.http import Events, Json, Refused, event, fields, finished, form, openai_error, status_of
from sana_edge.serve.job import Job, never
from sana_edge.serve.service import Service
from sana_edge.serve.uploads import transparent

# of a picture's metadata, what a request has, too
_MADE = (
    *("prompt", "negative_prompt", "seed", "size", "exact_size", "steps", "guidance", "sampler"),
    *("flow_shift", "instruction", "tile", "variation"),
)
# of each picture of a stream
MAX_PARTIALS = 3


class OpenAI:
    """Routes under ``/v1/``. Fields without use here, such as ``quality`` and ``style``, are ignored."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/images/variations", self.variations, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
        ]

    async def generations(self, request: Request) -> Response:
        """Draw: JSON with all pictures, or a stream of events."""
        return await self._draw(request, await fields(request), "image_generation", {})

    async def edits(self, request: Request) -> Response:
        """Draw from a picture, where its mask is transparent, or anywhere; the rest stays."""
        asked = await form(request)
        return await self._draw(request, asked, "image_edit", await asyncio.to_thread(_start, asked))

    async def variations(self, request: Request) -> Response:
        """Draw near a picture: one of ours with a little other noise, any other by a prompt."""
        asked, start = await asyncio.to_thread(_near, await form(request))
        return await self._draw(request, asked, "image_variation", start)

    async def _draw(self, request: Request, asked: Fields, kind: str, start: dict[str, Any]) -> Response:
        streamed, by_url = asked.flag("stream"), _by_url(asked)
        partials = asked.whole("partial_images", low=0, high=MAX_PARTIALS) or 0
        count = asked.whole("n", low=1, high=MAX_PICTURES)
        wanted = await asyncio.to_thread(asked.request, images=count, size=asked.size(), **start)
        job = Job(
            self._service.known(asked.text("model")),
            wanted,
            preview=spread(partials) if streamed else never,
            linear=asked.linear(),
            encoding=asked.encoding(),
        )
        self._service.submit(job, keep=by_url)
        if streamed:
            return Events(self._service, job, _Stream(job, kind).take, owned=True)
        await finished(request, self._service, job)
        base = str(request.base_url) if by_url else None
        return await asyncio.to_thread(lambda: Json(_answer(job, base)))

    async def models(self, request: Request) -> Response:
        """The models that requests may name; any other name is the first."""
        return Json({"object": "list", "data": [_model(name) for name in self._service.workers]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        if name not in self._service.workers:
            raise Refused(404, "there is no such model", f"choose {', '.join(self._service.workers)}")
        return Json(_model(name))


class _Stream:
    """The events of a job as OpenAI has them."""

    def __init__(self, job: Job, kind: str) -> None:
        self._job, self._kind = job, kind
        self._previews = 0
        self._pictures = 0
        # of the current picture
        self._index = 0
        self._over = False

    def take(self) -> list[bytes]:
        """The events since the last call."""
        job, events = self._job, []
        ended = job.finished
        previews = [preview for preview in job.previews if preview.number >= self._previews]
        pictures = list(job.pictures[self._pictures :])
        while previews or pictures:
            if previews and previews[0].picture <= self._pictures:
                preview = previews.pop(0)
                self._previews = preview.number + 1
                events.append(self._event("partial_image", preview.base64, partial_image_index=self._index))
                self._index += 1
            elif pictures:
                picture = pictures.pop(0)
                self._pictures, self._index = picture.index + 1, 0
                size = f"{picture.width}x{picture.height}"
                events.append(self._event("completed", picture.base64, size=size, seed=picture.seed))
            else:
                break
        if ended and job.error is not None and not self._over:
            error = openai_error(job.error, status_of(job.error, 400))
            events.append(event("error", {"type": "error", "error": error}))
        self._over = ended
        return events

    def _event(self, kind: str, b64_json: str, **more: Any) -> bytes:
        name = f"{self._kind}.{kind}"
        output_format = self._job.encoding.kind.lower()
        created = int(self._job.created)
        content = {"type": name, "b64_json": b64_json, "created_at": created, "output_format": output_format}
        return event(name, {**content, **more})


def _start(asked: Fields) -> dict[str, Any]:
    """What a drawing starts from."""
    image, mask = asked.picture("image"), asked.picture("mask")
    if image is None:
        raise InvalidInput("there is no image", "send one, or draw with /v1/images/generations")
    strength = asked.number("strength")
    return {"image": image, "mask": None if mask is None else transparent(mask), "strength": strength}


def _near(asked: Fields) -> tuple[Fields, dict[str, Any]]:
    """Variations as fields of a request, and what a drawing starts from."""
    image = asked.picture("image")
    if image is None:
        raise InvalidInput("there is no image", "send one")
    made = metadata_of(image) or {}
    values = {**{name: made[name] for name in _MADE if name in made}, **asked.values}
    values |= {"n": None, "variations": 1 if values.get("n") is None else values["n"]}
    if values.get("variation_seed") is None:
        values["variation_seed"] = random_seed()
    # what it was drawn from is not in the file
    again = "seed" in made and "image_sha256" not in made
    if again:
        return Fields(values), {}
    return Fields({**values, "variation": None}), {"image": image, "strength": asked.number("strength")}


def spread(count: int) -> Any:
    """When ``count`` partial pictures are made: evenly over the steps, never after the last."""

    def preview(step: int, steps: int) -> bool:
        # part i of count + 1 ends with step i * steps / (count + 1), counted from 1
        return step + 1 in {i * steps // (count + 1) for i in range(1, count + 1)} and step + 1 < steps

    return preview


def _by_url(asked: Fields) -> bool:
    return asked.choice("response_format", ("b64_json", "url")) == "url" and not asked.flag("stream")


def _answer(job: Job, base: str | None) -> dict[str, Any]:
    """All pictures; those that are fetched lie under ``base``."""
    data = []
    for picture in job.pictures:
        where = (
            {"b64_json": picture.base64}
            if base is None
            else {"url": f"{base}v1/pictures/{job.id}/{picture.index}"}
        )
        timings = {name: round(seconds, 5) for name, seconds in picture.timings.items()}
        data.append({**where, "seed": picture.seed, "timings": timings, "notes": list(picture.notes)})
    first = job.pictures[0]
    return {
        "created": int(job.created),
        "data": data,
        "model": job.model,
        "output_format": job.encoding.kind.lower(),
        "size": f"{first.width}x{first.height}",
    }


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sana-edge"}
