"""The face for applications: jobs that outlive a connection, their events, and the pictures of all faces."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sana_edge.serve.events import News, described
from sana_edge.serve.http import Events, Json, Refused, event, fields
from sana_edge.serve.job import Job
from sana_edge.serve.service import Service
from sana_edge.serve.uploads import MAX_UPLOAD


class Jobs:
    """Routes under ``/v1/jobs``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/v1/jobs", self.submit, methods=["POST"]),
            Route("/v1/jobs", self.jobs),
            Route("/v1/jobs/{id}", self.job),
            Route("/v1/jobs/{id}", self.cancel, methods=["DELETE"]),
            Route("/v1/jobs/{id}/events", self.events),
            Route("/v1/estimate", self.estimate, methods=["POST"]),
            Route("/v1/pictures/{id}/{index}", self.picture),
        ]

    async def submit(self, request: Request) -> Response:
        """Queue a job and say its id."""
        asked = await fields(request, MAX_UPLOAD)
        # off the loop, as pictures are decoded
        job = await asyncio.to_thread(asked.job, self._service.known)
        self._service.submit(job, keep=True)
        return Json(self._described(job), 202, {"location": f"/v1/jobs/{job.id}"})

    async def estimate(self, request: Request) -> Response:
        """How long a job would take from its first step; null at a size that was never drawn."""
        job = await asyncio.to_thread((await fields(request, MAX_UPLOAD)).job, self._service.known)
        return Json({"seconds": self._service.workers[job.model].pace.seconds(job.request)})

    async def jobs(self, request: Request) -> Response:
        """All jobs that are known, oldest first."""
        return Json({"jobs": [self._described(job) for job in self._service.kept()]})

    async def job(self, request: Request) -> Response:
        """How far a job is; ``?pictures=1`` adds the pictures."""
        job = self._find(request)
        content = self._described(job)
        if request.query_params.get("pictures") in ("1", "true"):
            # more may have come since
            for entry in content["pictures"]:
                entry["b64_json"] = job.pictures[entry["picture"]].base64
        return Json(content)

    async def cancel(self, request: Request) -> Response:
        """Cancel a job, and say what it is; nothing happens to one that has ended."""
        job = self._find(request)
        self._service.cancel(job)
        return Json(self._described(job), 200 if job.finished else 202)

    async def events(self, request: Request) -> Response:
        """What has happened to a job, and happens until its end."""
        news = News(self._find(request))

        def render() -> list[bytes]:
            return [event(content["type"], content) for content in news.take()]

        return Events(self._service, news.job, render, owned=False)

    async def picture(self, request: Request) -> Response:
        """One picture, as a file."""
        job, asked = self._find(request), request.path_params["index"]
        # Python refuses to read thousands of digits
        index = int(asked) if asked.isdecimal() and len(asked) < 9 else len(job.pictures)
        if index >= len(job.pictures):
            raise Refused(404, f"picture {asked[:20]} is not there", f"it has {len(job.pictures)}, from 0")
        headers = {"cache-control": "private, max-age=600", "x-content-type-options": "nosniff"}
        return Response(job.pictures[index].data, media_type=job.encoding.media_type, headers=headers)

    def _find(self, request: Request) -> Job:
        job = self._service.find(request.path_params["id"])
        if job is None:
            raise Refused(404, "there is no such job", "a job is kept for 10 minutes after its end")
        return job

    def _described(self, job: Job) -> dict[str, Any]:
        stage = job.stage
        content: dict[str, Any] = {
            "id": job.id,
            "model": job.model,
            "state": job.state,
            "seed": job.request.seed,
            "stage": stage.name,
            "done": stage.done,
            "count": stage.count,
            "seconds_left": job.seconds_left,
            "created": job.created,
            "pictures": [
                {**described(picture), "url": f"/v1/pictures/{job.id}/{picture.index}"}
                for picture in job.pictures
            ],
        }
        if job.error is not None:
            content |= {"error": job.error.message, "hint": job.error.hint}
        return content
