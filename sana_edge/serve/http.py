"""What the faces of HTTP share: bodies with limits, errors in each API's shape, clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

# starlette would miss it at the first form only
import python_multipart  # noqa: F401
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sana_edge.errors import Cancelled, InvalidInput, ModelNotFound, OutOfMemory, SanaError
from sana_edge.serve.fields import Fields
from sana_edge.serve.job import Job
from sana_edge.serve.queue import Closed, QueueFull
from sana_edge.serve.service import Service
from sana_edge.serve.uploads import MAX_UPLOAD

# a model reads 300 tokens of a prompt
MAX_BODY = 1 << 20
# bytes beyond the limit that are read, and thrown away, so that the client sees the answer
MAX_READ = 32 << 20
# seconds in which a body must be here, and after which a stream that has no news says that it lives
BODY_SECONDS = 120.0
HEARTBEAT_SECONDS = 15.0
# what below /v1/ is no part of OpenAI's API
_OWN = ("/v1/jobs", "/v1/pictures", "/v1/status", "/v1/estimate")
_CHARSET, _UTF_8 = re.compile("charset([^;]*)", re.I), re.compile(r"\s*=\s*\"?utf-?8\"?\s*", re.I)
_STATUS: dict[type[SanaError], int] = {
    ModelNotFound: 404,
    Cancelled: 409,
    QueueFull: 429,
    Closed: 503,
    OutOfMemory: 507,
}


class Refused(SanaError):
    """A request that is refused, with its status of HTTP."""

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


class Json(Response):
    """JSON in ASCII: half of a surrogate pair, which a client may send, is no UTF-8."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


async def fields(request: Request, most: int = MAX_BODY) -> Fields:
    """Read the body, of at most ``most`` bytes.

    Raises:
        Refused: it is too large, or too slow.
        InvalidInput: it is no JSON object.
    """
    return Fields.parse(await _body(request, most))


async def form(request: Request) -> Fields:
    """Read a form with files, or JSON with base64; errors are those of `fields`."""
    body, kind = await _body(request, MAX_UPLOAD), request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        return Fields.parse(body)
    # Python knows encodings that take hours for a megabyte
    if not all(map(_UTF_8.fullmatch, _CHARSET.findall(kind))):
        raise InvalidInput("the form is not in UTF-8", "send it in UTF-8")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, whole(), max_files=16, max_fields=100, max_part_size=MAX_BODY)
    # nothing goes to the disk
    parser.spool_max_size = MAX_UPLOAD
    try:
        found = await parser.parse()
    except (MultiPartException, KeyError, UnicodeError) as error:
        raise InvalidInput(f"this is no form: {error}", "send multipart/form-data, or JSON") from error
    items = [
        (name, value if isinstance(value, str) else await value.read()) for name, value in found.multi_items()
    ]
    return Fields.of_form(items)


async def _body(request: Request, most: int) -> bytes:
    body, size = bytearray(), 0

    async def read() -> None:
        nonlocal size
        async for part in request.stream():
            size += len(part)
            if size <= most:
                body.extend(part)
            elif size > most + MAX_READ:
                break

    try:
        await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the request took longer than {BODY_SECONDS:.0f} s", "send it again") from error
    if size > most:
        raise Refused(413, f"the request has more than {most} bytes", "send less")
    return bytes(body)


def status_of(error: SanaError, invalid: int) -> int:
    """The status of an error; ``invalid`` is that of a wrong value."""
    if isinstance(error, Refused):
        return error.status
    if isinstance(error, InvalidInput):
        return invalid
    return next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 500)


def failure(path: str, error: SanaError) -> Response:
    """The answer of an error, in the shape that clients of this path read."""
    message, hint = error.message, error.hint
    whole = f"{message}: {hint}" if hint else message
    content: dict[str, Any]
    if path.startswith("/v1/") and not path.startswith(_OWN):
        status = status_of(error, 400)
        content = {"error": openai_error(error, status)}
    elif path.startswith("/sdapi/"):
        status = status_of(error, 422)
        content = {"error": message, "hint": hint, "detail": whole, "errors": whole}
    else:
        status = status_of(error, 422)
        content = {"error": message, "hint": hint}
    headers = {}
    if isinstance(error, QueueFull):
        headers["retry-after"] = str(error.retry_after)
    if status == 401:
        # browsers then ask for the key, which is the password of any user
        headers["www-authenticate"] = 'Basic realm="sana-edge", charset="UTF-8"'
    if status in (408, 413):
        headers["connection"] = "close"
    return Json(content, status, headers)


def openai_error(error: SanaError, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "rate_limit_error" if status == 429 else "server_error"
    kind = "invalid_request_error" if status < 429 else kind
    codes = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}
    whole = f"{error.message}: {error.hint}" if error.hint else error.message
    code = codes.get(status)
    return {"message": whole, "type": kind, "param": None, "code": code, "hint": error.hint}


async def changes(receive: Receive, job: Job) -> AsyncGenerator[bool, None]:
    """Wake with each change of a job, and once more after its end.

    True for a change, false where there was none for `HEARTBEAT_SECONDS`.

    Raises:
        ClientDisconnect: the client has hung up.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def wake() -> None:
        # the loop may be gone
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(changed.set)

    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        with job.watched(wake):
            yield True
            while not job.finished:
                news = await _either(changed, gone)
                changed.clear()
                yield news
        yield True
    finally:
        gone.cancel()


async def _either(changed: asyncio.Event, gone: asyncio.Future[None]) -> bool:
    waiting = asyncio.ensure_future(changed.wait())
    try:
        await asyncio.wait((waiting, gone), timeout=HEARTBEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if gone.done():
        raise ClientDisconnect
    return changed.is_set()


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def finished(request: Request, service: Service, job: Job) -> Job:
    """Wait for the end of a job that nobody else wants; it is cancelled where the client hangs up.

    Raises:
        SanaError: the job's error.
        ClientDisconnect: the client has hung up.
    """
    try:
        async for _ in changes(request.receive, job):
            pass
    finally:
        if not job.finished:
            service.cancel(job)
    if job.error is not None:
        raise job.error
    return job


def event(kind: str, content: Any) -> bytes:
    """One event of a stream."""
    return f"event: {kind}\ndata: {json.dumps(content, separators=(',', ':'))}\n\n".encode("ascii")


class Events(Response):
    """A stream of what ``render`` has after each change of a job, until the job's end.

    Args:
        owned: the job is cancelled where the client hangs up.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, job: Job, render: Callable[[], list[bytes]], *, owned: bool) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._service, self._job, self._render, self._owned = service, job, render, owned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async with contextlib.aclosing(changes(receive, self._job)) as news:
                async for changed in news:
                    parts = await asyncio.to_thread(self._render) if changed else [b": still here\n\n"]
                    for part in parts:
                        await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (ClientDisconnect, OSError):
            pass
        finally:
            if self._owned and not self._job.finished:
                self._service.cancel(self._job)
