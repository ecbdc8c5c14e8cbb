"""The application: the faces behind the guard, and errors in the shape of each."""

from __future__ import annotations

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sana_edge.errors import SanaError
from sana_edge.serve.automatic1111 import Automatic1111
from sana_edge.serve.guard import Guard
from sana_edge.serve.http import Refused, failure
from sana_edge.serve.jobs import Jobs
from sana_edge.serve.openai import OpenAI
from sana_edge.serve.service import Service
from sana_edge.serve.status import Status

logger = logging.getLogger("sana_edge")


def application(service: Service, key: str | None = None) -> Starlette:
    """All routes, as an application of ASGI."""
    faces = (Jobs(service), OpenAI(service), Automatic1111(service), Status(service))
    return Starlette(
        routes=[route for face in faces for route in face.routes()],
        middleware=[Middleware(Guard, key=key)],
        exception_handlers={
            SanaError: _sana_error,
            HTTPException: _http_error,
            ClientDisconnect: _hung_up,
            Exception: _unforeseen,
        },
    )


async def _sana_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SanaError)
    return failure(request.url.path, error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
    hint = "docs/embedding.md lists the routes"
    return failure(request.url.path, Refused(error.status_code, message, hint))


async def _hung_up(request: Request, error: Exception) -> Response:
    # nobody reads it
    return Response(status_code=499)


async def _unforeseen(request: Request, error: Exception) -> Response:
    logger.debug("a request failed", exc_info=error)
    return failure(request.url.path, SanaError(f"{type(error).__name__} in the server"))
