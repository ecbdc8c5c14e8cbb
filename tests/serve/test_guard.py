"""Who may ask: names of this machine, our own page, and whoever has the key."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator

import pytest
from serving import SMALL, Client, FakeLoader, serving

from sana_edge.errors import InvalidInput, SanaError
from sana_edge.serve.guard import is_loopback
from sana_edge.serve.server import address, listen
from sana_edge.serve.service import Service

KEY = "schlüssel"
DRAW = "/v1/images/generations"


@pytest.fixture(scope="module")
def keyed() -> Iterator[Client]:
    with serving(Service({"one": "one"}, FakeLoader()), KEY) as client:
        yield client


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "127.1.2.3", "[::1]:80"]
)
def test_names_of_this_machine(idle: Client, name: str) -> None:
    assert idle.get("/v1/models", Host=name.format(port=idle.port)).status == 200


@pytest.mark.parametrize(
    "name", ["example.com", "example.com:{port}", "127.0.0.1.example.com", "192.168.0.1", "", "[::1", "a]b"]
)
def test_names_that_lead_here(idle: Client, name: str) -> None:
    """As those do which another site's page has itself called by (DNS rebinding)."""
    answer = idle.post("/v1/jobs", SMALL, Host=name.format(port=idle.port))
    assert answer.status == 403 and "is not this machine" in answer.json["error"]


def test_two_hosts_are_none(idle: Client) -> None:
    head = f"GET /v1/models HTTP/1.1\r\nHost: localhost:{idle.port}\r\nHost: a\r\n\r\n"
    with idle.raw(head.encode()) as connection:
        assert connection.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 403")


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize(
    "origin", ["http://example.com", "http://localhost:1", "https://localhost", "null", "file://", "http://["]
)
def test_pages_of_others_draw_nothing(idle: Client, keyed: Client, key: str | None, origin: str) -> None:
    client = keyed if key else idle
    password = base64.b64encode(f"any:{key}".encode()).decode()
    answer = client.post(DRAW, SMALL, Origin=origin, Authorization=f"Basic {password}")
    assert answer.status == 403 and "is another site" in answer.json["error"]["message"]
    # a browser asks before it sends JSON
    assert client.ask("OPTIONS", DRAW, headers={"Origin": origin}).status == 403


def test_our_own_page_draws(idle: Client) -> None:
    for name in ("localhost", "127.0.0.1"):
        place = f"{name}:{idle.port}"
        assert idle.post(DRAW, SMALL, Host=place, Origin=f"http://{place}").status == 200


def test_the_page_brings_all_that_it_shows(idle: Client) -> None:
    answer = idle.get("/")
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert b"http://" not in answer.body.replace(b"http://www.w3.org", b"") and b"https://" not in answer.body


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"somebody:{password}".encode()).decode()


@pytest.mark.parametrize("header", [f"Bearer {KEY}".encode().decode("latin-1"), basic(KEY)])
def test_the_key(keyed: Client, header: str) -> None:
    """Under any name of the machine."""
    assert keyed.post(DRAW, SMALL, Authorization=header, Host="pictures.example.com").status == 200


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer x", basic("x"), basic(""), "Basic !!", f"Bearer {'x' * 9000}", "Digest a"],
)
@pytest.mark.parametrize("path", [DRAW, "/sdapi/v1/txt2img", "/v1/jobs", "/metrics", "/", "/nothing"])
def test_a_wrong_key(keyed: Client, header: str, path: str) -> None:
    answer = keyed.post(path, SMALL, **({"Authorization": header} if header else {}))
    assert answer.status == 401 and "key" in str(answer.json)
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_what_needs_no_key(keyed: Client) -> None:
    assert keyed.get("/health").json == keyed.get("/health", Authorization="Bearer x").json
    body = {**SMALL, "response_format": "url"}
    url = keyed.post(DRAW, body, Authorization=basic(KEY)).json["data"][0]["url"]
    assert keyed.get(url.removeprefix(keyed.url)).headers["content-type"] == "image/png"


def test_others_need_a_key() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com", ""):
        assert not is_loopback(host)
        with pytest.raises(InvalidInput, match="could draw") as error:
            listen(host, 0, None)
        assert "--api-key" in error.value.hint
    listen("0.0.0.0", 0, "key").close()


def test_addresses_that_cannot_be_had() -> None:
    with listen("127.0.0.1", 0, None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SanaError, match=f"cannot listen on 127.0.0.1:{port}") as error:
            listen("127.0.0.1", port, None)
        assert "another program listens there" in error.value.hint
        assert address(taken) == f"http://127.0.0.1:{port}"
    with pytest.raises(SanaError, match="there is no address"):
        listen("no such host.invalid", 0, "key")


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6() -> None:
    try:
        listening = listen("::1", 0, None)
    except SanaError:
        pytest.skip("no IPv6 on this machine")
    with listening:
        assert address(listening).startswith("http://[::1]:")
