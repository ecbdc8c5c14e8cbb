"""The server's socket and its life: it listens, answers until a signal comes, and cancels what is left."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from typing import Any

import h11
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sana_edge.errors import InvalidInput, SanaError, one_line, reason
from sana_edge.serve.app import application
from sana_edge.serve.guard import is_loopback
from sana_edge.serve.http import Json, Refused, failure
from sana_edge.serve.service import Service

logger = logging.getLogger("sana_edge")

# seconds in which a request's headers must be here
HEADER_SECONDS = 30.0
# connections at once; so many more are answered with 503, and others closed, as files run out at 1024
MAX_CONNECTIONS, SPARE = 512, 128


def listen(host: str, port: int, key: str | None) -> socket.socket:
    """A socket that listens.

    Args:
        port: 0 takes one that is free.

    Raises:
        InvalidInput: others could reach it, and there is no key.
        SanaError: the address cannot be had.
    """
    if not is_loopback(host) and not key:
        hint = "leave out --host, or say with --api-key what they must know"
        raise InvalidInput(f"everybody who reaches {host} could draw", hint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise SanaError(f"there is no address {host}: {error}", "choose --host 127.0.0.1") from error
    try:
        if os.name == "posix":
            # elsewhere it lets two programs listen on one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        taken = error.errno == errno.EADDRINUSE
        hint = "another program listens there: choose another --port, or 0 for a free one"
        raise SanaError(
            f"cannot listen on {host}:{port}: {error.strerror}", hint if taken else "choose another --port"
        ) from error
    return found


def address(listening: socket.socket) -> str:
    """The URL of a socket that `listen` gave."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Answers requests on a socket until `stop`, or SIGINT or SIGTERM in the main thread."""

    def __init__(self, service: Service, key: str | None = None) -> None:
        self._service = service
        config = uvicorn.Config(
            application(service, key),
            http=_Protocol,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="critical",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)

    def answer(self, listening: socket.socket) -> bool:
        """Answer until the end; jobs that are unfinished then are cancelled.

        False where a worker computes on, in a step that cannot be interrupted.
        """
        try:
            # uvicorn raises the signal again, which is how a server ends
            with contextlib.suppress(KeyboardInterrupt):
                self.run(sockets=[listening])
        finally:
            ended = self._service.close()
        return ended

    def stop(self) -> None:
        """End `answer`, from any thread."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what goes wrong beside a request, such as files that run out, be one line."""
        asyncio.get_running_loop().set_exception_handler(_say)
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cancel the jobs first, whose clients then get their answers."""
        self._service.stop()
        await super().shutdown(sockets)


def _say(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    why = f": {reason(error)}" if isinstance(error, BaseException) else ""
    logger.warning("the server goes on: %s", one_line(f"{context.get('message')}{why}"))


async def _busy(scope: Scope, receive: Receive, send: Send) -> None:
    """The application of connections beyond the limit."""
    error = Refused(503, f"more than {MAX_CONNECTIONS} connections are open", "send it again later")
    response = failure(scope["path"], error)
    response.headers["connection"] = "close"
    await response(scope, receive, send)


class _Protocol(H11Protocol):
    """uvicorn's, which closes connections that do not send a request's headers to their end."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = _busy
        if len(self.connections) > MAX_CONNECTIONS + SPARE:
            transport.close()
        self._late = self.loop.call_later(HEADER_SECONDS, self._close_if_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None and self._waits:
            self._late = self.loop.call_later(HEADER_SECONDS, self._close_if_late)

    def handle_events(self) -> None:
        super().handle_events()
        if self._late is not None and not self._waits:
            self._late.cancel()
            self._late = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer was begun before the rest of the request came."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = Json({"error": "this is no request of HTTP/1.1", "hint": "send one"}, 400)
            headers = [*answer.raw_headers, (b"connection", b"close")]
            events = (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    @property
    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _close_if_late(self) -> None:
        if self._waits:
            self.transport.close()
