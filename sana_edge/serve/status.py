"""Whether the server lives, its numbers for Prometheus, and the page."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import resources

import psutil
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from sana_edge import __version__
from sana_edge.serve.http import Json
from sana_edge.serve.service import Service
from sana_edge.system.memory import shown

# the page is one file, which brings all that it shows
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src 'self' data: blob:; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class Status:
    """``/``, ``/health`` and ``/metrics``."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/status", self.status),
        ]

    async def page(self, request: Request) -> Response:
        """The page."""
        return HTMLResponse(resources.files(__package__).joinpath("page.html").read_bytes(), headers=_HEADERS)

    async def health(self, request: Request) -> Response:
        """That it lives; nothing about anybody's pictures, as this needs no key."""
        return Json({"status": "ok", "version": __version__})

    async def status(self, request: Request) -> Response:
        """The models and the queue, for the page."""
        models = [
            {"name": name, "loaded": worker.loaded, "native_size": worker.native_size}
            for name, worker in self._service.workers.items()
        ]
        queue = self._service.queue
        cores, memory = psutil.cpu_count(logical=False) or os.cpu_count(), psutil.virtual_memory().total
        content = {
            "version": __version__,
            "machine": f"{cores} cores, {shown(memory)} of memory",
            "models": models,
            "waiting": queue.waiting,
            "running": queue.running,
            "limit": queue.limit,
        }
        return Json(content)

    async def metrics(self, request: Request) -> Response:
        """Counters and gauges in the text format of Prometheus."""
        return PlainTextResponse(
            "\n".join(_lines(self._service)) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _lines(service: Service) -> Iterator[str]:
    states = {state: service.ended[state] for state in ("done", "failed", "cancelled")}
    yield from _metric("jobs_total", "counter", "jobs that have ended", "state", states)
    pictures = {name: service.pictures[name] for name in service.workers}
    yield from _metric("pictures_total", "counter", "pictures drawn", "model", pictures)
    seconds = {stage: service.seconds.get(stage, 0.0) for stage in ("text", "denoise", "decode")}
    yield from _metric("seconds_total", "counter", "time spent on pictures", "stage", seconds)
    loaded = {name: int(worker.loaded) for name, worker in service.workers.items()}
    yield from _metric("model_loaded", "gauge", "whether a model is in memory", "model", loaded)
    queue = service.queue
    for name, help_text, value in (
        ("jobs_waiting", "jobs in the queue", queue.waiting),
        ("jobs_running", "jobs that are drawn", queue.running),
        ("resident_bytes", "memory of the process", psutil.Process().memory_info().rss),
    ):
        yield from _metric(name, "gauge", help_text, "", {"": value})


def _metric(name: str, kind: str, text: str, label: str, values: Mapping[str, float]) -> Iterator[str]:
    yield f"# HELP sana_edge_{name} {text}"
    yield f"# TYPE sana_edge_{name} {kind}"
    for key, value in values.items():
        quoted = key.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        labels = f'{{{label}="{quoted}"}}' if label else ""
        yield f"sana_edge_{name}{labels} {value}"
