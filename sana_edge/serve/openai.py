"""The face of OpenAI's image API: generations and edits, also as streams with true partial pictures."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sana_edge.errors import InvalidInput
from sana_edge.init_image import MAX_PIXELS
from sana_edge.serve.fields import MAX_PICTURES, Fields
from sana_edge.serve.http import (
    MAX_PICTURES_BODY,
    Events,
    Json,
    Refused,
    event,
    fields,
    finished,
    openai_error,
    status_of,
)
from sana_edge.serve.job import Job, never
from sana_edge.serve.service import Service

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
        return await self._draw(request, await fields(request), "image_generation")

    async def edits(self, request: Request) -> Response:
        """Draw from a picture: as much of it as ``strength`` says, with a mask where that is transparent."""
        asked = await fields(request, MAX_PICTURES_BODY)
        image = asked.picture("image")
        if image is None:
            raise InvalidInput("there is no image", "send one, or draw with /v1/images/generations")
        mask, strength = asked.picture("mask"), asked.number("strength")
        if mask is not None:
            # all of what is masked
            strength = 1.0 if strength is None else strength
        cut = None if mask is None else await asyncio.to_thread(_transparent, mask)
        return await self._draw(request, asked, "image_edit", image=image, mask=cut, strength=strength)

    async def variations(self, request: Request) -> Response:
        """Pictures are drawn from a prompt."""
        raise Refused(400, "variations without a prompt are not there", "send a prompt to /v1/images/edits")

    async def _draw(self, request: Request, asked: Fields, kind: str, **more: Any) -> Response:
        streamed, by_url = asked.flag("stream"), _by_url(asked)
        partials = asked.whole("partial_images", low=0, high=MAX_PARTIALS) or 0
        images = asked.whole("n", low=1, high=MAX_PICTURES)
        # a picture that is sent is decoded here
        wanted = await asyncio.to_thread(lambda: asked.request(images=images, size=asked.size(), **more))
        job = Job(
            self._service.known(asked.text("model")),
            wanted,
            preview=spread(partials) if streamed else never,
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
        self._job = job
        self._kind = kind
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


def _transparent(mask: bytes) -> NDArray[np.uint8]:
    """White where a picture is transparent, black where it is not.

    Raises:
        InvalidInput: it is no picture, or nothing of it can be transparent.
    """
    try:
        with PIL.Image.open(io.BytesIO(mask)) as image:
            alpha = (
                image.convert("RGBA").getchannel("A") if image.width * image.height <= MAX_PIXELS else None
            )
    except Exception as error:
        raise InvalidInput(f"cannot read the mask: {error}", "send a PNG") from error
    found = None if alpha is None else 255 - np.array(alpha)
    if found is None or not found.any():
        raise InvalidInput("the mask is transparent nowhere", "make transparent what is to be drawn anew")
    return found


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
        data.append({**where, "seed": picture.seed, "notes": list(picture.notes)})
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
