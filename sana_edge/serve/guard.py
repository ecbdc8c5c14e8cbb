"""Who may ask: this machine's programs and our own page, or whoever has the key."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from sana_edge.serve.http import Refused, failure

# without a key: whether it lives, and pictures under names that cannot be guessed, which clients fetch bare
_OPEN = ("/health", "/v1/pictures/")


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is this machine's own."""
    if host.lower() == "localhost":
        return True
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


class Guard:
    """Stands before the application.

    A page of another site can send requests to this machine, also under a name of its own that leads here
    (DNS rebinding); its Origin or its Host tells. Behind a key any Host is good, as such a page has no key.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except Refused as error:
                await failure(scope["path"], error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value.decode("latin-1").strip().lower() for name, value in headers if name == b"host"]
        host = hosts[0] if len(hosts) == 1 else ""
        if self._key is None and not is_loopback(_without_port(host)):
            hint = "call the server by 127.0.0.1 or localhost, or start it with --api-key"
            raise Refused(403, f"Host {host!r} is not this machine", hint)
        for name, value in headers:
            origin = value.decode("latin-1").lower()
            if name == b"origin" and (not host or _place(origin) != host):
                raise Refused(403, f"Origin {origin!r} is another site", "only the server's own page may ask")
        if self._key is not None and not scope["path"].startswith(_OPEN):
            given = [value for name, value in headers if name == b"authorization"]
            if len(given) != 1 or not hmac.compare_digest(_secret(given[0]), self._key):
                message = "the key is wrong" if given else "there is no key"
                hint = "send `Authorization: Bearer KEY`, or the key as the password of Basic authentication"
                raise Refused(401, message, hint)


def _place(origin: str) -> str:
    """Host and port of an Origin; empty for "null" and what is no page of HTTP."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return ""
    return parts.netloc if parts.scheme in ("http", "https") else ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        inside, closing, _ = host.partition("]")
        return inside + closing
    return host.rpartition(":")[0] if ":" in host else host


def _secret(header: bytes) -> bytes:
    """The key in a header: a bearer's token, or the password of anybody."""
    scheme, _, value = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""
