"""What arrives at a socket: bodies that are no JSON, too large, half or slow; and the process's life."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import MODEL, SMALL, Client, FakeLoader, RealLoader, serving, until

from sana_edge.image import read_metadata
from sana_edge.serve import http as http_module
from sana_edge.serve import server as server_module
from sana_edge.serve.http import MAX_BODY
from sana_edge.serve.service import Service
from sana_edge.store.known_models import BUNDLED

DRAW = "/v1/images/generations"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"3", b'"prompt"', b"\xff\xfe", b"[" * 100_000],
    ids=lambda body: repr(body[:9]),
)
def test_bodies_that_are_no_request(idle: Client, body: bytes) -> None:
    for path, status in ((DRAW, 400), ("/v1/jobs", 422), ("/sdapi/v1/txt2img", 422)):
        answer = idle.post(path, body)
        assert answer.status == status and "JSON" in str(answer.json["error"]), answer.body


def test_long_prompts(idle: Client) -> None:
    long = {**SMALL, "prompt": "a house " * (10 << 17)}
    answer = idle.post(DRAW, long)
    assert answer.status == 413 and f"the request has more than {MAX_BODY} bytes" in str(answer.json)
    # where pictures may come with it
    answer = idle.post("/v1/jobs", long)
    assert answer.status == 422 and answer.json["error"] == "the prompt has 10485760 characters"
    assert idle.post(DRAW, {**SMALL, "prompt": "a house " * 10_000}).status == 200


def test_an_endless_body_is_not_read(idle: Client) -> None:
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost:{idle.port}\r\nTransfer-Encoding: chunked\r\n\r\n"
    with idle.raw(head.encode()) as connection, contextlib.suppress(OSError):
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        for _ in range(100):
            connection.sendall(chunk)
        pytest.fail("the server reads on")
    assert idle.get("/health").status == 200


def test_odd_text_in_prompts(real: Client) -> None:
    for prompt in ("\ud800 a house", "a\0house", "日本の家 🏠", "a" * 5000, "\u202e" * 50, " a house\r\n"):
        answer = real.post(DRAW, {**SMALL, "steps": 1, "prompt": prompt, "size": "32x32"})
        assert answer.status == 200, answer.body


def test_no_path_of_a_request_is_opened(idle: Client) -> None:
    """A model is one of the server's, whatever it is called."""
    for model in ("/etc/passwd", "../sana-tiny", "one/../two", "C:\\one"):
        assert idle.post(DRAW, {**SMALL, "model": model}).status == 200
    for path in ("/../etc/passwd", "/v1/pictures/..%2f..%2fetc/0", "/%2e%2e/etc/passwd", "/v1/jobs/%00"):
        assert idle.get(path).status == 404


@pytest.mark.parametrize(("method", "path"), [("GET", DRAW), ("PUT", "/v1/jobs"), ("DELETE", "/v1/models")])
def test_other_methods(idle: Client, method: str, path: str) -> None:
    assert idle.ask(method, path).status == 405


def test_half_requests(fake: Client, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and bodies that do not come to their end: the client hangs up, or only waits."""
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(http_module, "BODY_SECONDS", 0.2)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\n".encode()
    for part in (
        b"",
        b"PO",
        head,
        head + b"Content-Length: 99\r\n\r\n",
        head + b'Content-Length: 99\r\n\r\n{"p',
    ):
        fake.raw(part).close()
        with fake.raw(part) as connection:
            assert connection.recv(1 << 16)[:12] in (b"", b"HTTP/1.1 408")
    # the second request of a connection, too
    with fake.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
        assert b"200" in connection.recv(1 << 16)
        connection.sendall(head)
        until(lambda: connection.recv(1 << 16) == b"")
    assert service.queue.running == service.queue.waiting == 0
    assert fake.post(DRAW, SMALL).status == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01" * 50, b"GET / HTTP/9\r\n\r\n", b"X" * 100_000])
def test_what_is_no_http(idle: Client, data: bytes) -> None:
    with idle.raw(data) as connection, contextlib.suppress(ConnectionError):
        assert connection.recv(12) in (b"HTTP/1.1 400", b"")
    assert idle.get("/health").status == 200


def test_what_is_no_http_is_told_in_json(idle: Client) -> None:
    for head in (b"GET /health HTTP/1.1\r\n\r\n", b"GET /\xe9 HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        with idle.raw(head) as connection:
            assert b'{"error":"this is no request of HTTP/1.1"' in connection.recv(1 << 16)


def test_half_a_request_behind_its_answer(idle: Client, caplog: pytest.LogCaptureFixture) -> None:
    """What is no chunk comes when the path was refused long ago."""
    head = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with idle.raw(head) as connection:
        assert b"404" in connection.recv(1 << 16)
        connection.sendall(b"ZZ\r\n")
        with contextlib.suppress(ConnectionError):
            until(lambda: connection.recv(1 << 16) == b"")
    assert idle.get("/health").status == 200 and not caplog.records


def test_too_many_connections(idle: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 2)
    with idle.raw(b"GET /hea"), idle.raw(b"GET /hea"):
        answer = until(lambda: (found := idle.get("/health")).status == 503 and found)
        assert answer.json == {"error": "more than 2 connections are open", "hint": "send it again later"}
    until(lambda: idle.get("/health").status == 200)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_files_that_run_out(idle: Client, caplog: pytest.LogCaptureFixture) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = f"""
import socket, sys
ready = [socket.create_connection(("127.0.0.1", {idle.port})) for _ in range(60)]
print(1, flush=True)
sys.stdin.read()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", many], stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None
        resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 20, limits[1]))
        try:
            child.stdout.readline()
            until(lambda: caplog.records)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            child.communicate()
    assert all(r.getMessage().startswith("the server goes on: ") and not r.exc_info for r in caplog.records)
    assert idle.get("/health").status == 200


def test_a_slow_client_delays_nobody(fake: Client, loader: FakeLoader) -> None:
    """It leaves a stream of large previews unread."""
    body = {**SMALL, "steps": 30, "size": "1024x1024", "preview_every": 1}
    job = fake.post("/v1/jobs", body).json["id"]
    slow = fake.raw(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert fake.post(DRAW, SMALL).status == 200
    assert fake.get(f"/v1/jobs/{job}").json["state"] == "done"
    slow.close()


def test_streams_say_that_they_live(
    fake: Client, loader: FakeLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_module, "HEARTBEAT_SECONDS", 0.05)
    loader.gate = threading.Semaphore(0)
    with fake.send(DRAW, {**SMALL, "stream": True}) as connection:
        seen = b""
        while seen.count(b": still here") < 2:
            seen += connection.recv(1 << 16)
        loader.gate.release(9)
        while b"image_generation.completed" not in seen:
            seen += connection.recv(1 << 16)


def test_an_end_while_it_draws(loader: FakeLoader) -> None:
    """Clients are told, and the server does not wait for the picture."""
    loader.gate = threading.Semaphore(0)
    service = Service({"one": "one"}, loader)
    with serving(service) as client:
        drawn, waiting = client.send(DRAW, SMALL), client.send("/v1/jobs", SMALL)
        until(lambda: service.queue.running)
        assert waiting.recv(12) == b"HTTP/1.1 202"
    assert drawn.recv(12) == b"HTTP/1.1 409"
    for connection in (drawn, waiting):
        connection.close()


@contextlib.contextmanager
def process(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """The command, in a process of its own."""
    command = [sys.executable, "-m", "sana_edge", "serve", "--port", "0", *options]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen(command, **pipes, env={**os.environ, **environment})
    try:
        assert started.stdout is not None
        yield started, Client(started.stdout.readline().strip())
    finally:
        started.kill()
        started.communicate()


def test_the_command_without_torch(tmp_path: Path) -> None:
    """It prints its address alone, draws with an exported folder, tells no prompt, and ends with a signal."""
    without = tmp_path / "torch.py"
    without.write_text("raise ImportError('torch was imported')")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ["--model", str(BUNDLED / MODEL), "--threads", "1", "--queue", "3"]
    with process(*options, PYTHONPATH=paths) as (started, client):
        answer = client.post(DRAW, {**SMALL, "size": "64x64", "prompt": "a SECRET house"})
        assert answer.status == 200 and client.get("/v1/models").json["data"][0]["id"] == MODEL
        client.post(DRAW, {**SMALL, "size": "SECRET"})
        assert client.get("/v1/status").json["limit"] == 3
        started.send_signal(signal.SIGINT)
        out, errors = started.communicate(timeout=60)
        assert started.returncode == 0 and out == "" and "SECRET" not in errors, errors


@pytest.mark.slow
def test_client_that_hangs_up_while_the_picture_is_decoded() -> None:
    """The decode ends before its next part."""
    service = Service({MODEL: MODEL}, RealLoader())
    with serving(service) as client:
        body = {**SMALL, "steps": 1, "size": "1024x1024", "tile": 256}
        connection = client.send(DRAW, body)
        (job,) = until(lambda: service.queue.unfinished(MODEL))
        until(lambda: job.stage.name == "decode")
        connection.close()
        until(lambda: service.ended["cancelled"])
        assert job.stage.done < job.stage.count and not job.pictures


@pytest.mark.slow
def test_killed_and_started_again(tmp_path: Path) -> None:
    """On the same port, at once; a folder of pictures has none that is half."""
    options = ["--model", str(BUNDLED / MODEL), "--threads", "1", "--keep", str(tmp_path)]
    with process(*options) as (started, client):
        for _ in range(5):
            client.post("/v1/jobs", {**SMALL, "images": 10, "size": "256x256"})
        until(lambda: len(list(tmp_path.glob("*.png"))) > 2)
        started.kill()
        started.wait()
    assert all(read_metadata(path)["steps"] == 2 for path in tmp_path.glob("*.png"))
    with process(*options, "--port", str(client.port)) as (_, again):
        assert again.port == client.port
        assert again.post(DRAW, {**SMALL, "size": "64x64"}).status == 200


@pytest.mark.slow
def test_fifty_clients_for_a_minute() -> None:
    """Nothing is lost, each gets the picture it asked for, and memory stays what it is."""
    service = Service({MODEL: MODEL}, RealLoader(), limit=40)
    seconds = float(os.environ.get("SANA_EDGE_LOAD_SECONDS", "60"))
    answers: Counter[int] = Counter()
    expected: dict[int, str] = {}
    wrong: list[Any] = []
    with serving(service) as client:
        for seed in range(8):
            expected[seed] = _draw(client, seed).json["data"][0]["b64_json"]
        end = time.monotonic() + seconds

        def draw(number: int) -> None:
            while time.monotonic() < end:
                answer = _draw(client, number % 8)
                answers[answer.status] += 1
                if answer.status == 200 and answer.json["data"][0]["b64_json"] != expected[number % 8]:
                    wrong.append(number)
                elif answer.status not in (200, 429):
                    wrong.append(answer.body)
                elif answer.status == 429:
                    time.sleep(0.2)

        threads = [threading.Thread(target=draw, args=[number]) for number in range(50)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 3)
        early = psutil.Process().memory_info().rss
        for thread in threads:
            thread.join()
        late = psutil.Process().memory_info().rss
    assert not wrong, wrong[:3]
    # all 50 ask at once for 41 places
    assert answers[200] > 50 and answers[429] > 0
    assert service.ended == {"done": answers[200] + 8} and not service.queue.waiting
    # a picture is 13 kB, a decode at this size some MB: what each request left behind would be more
    assert late - early < 64 << 20


def _draw(client: Client, seed: int) -> Any:
    return client.post(DRAW, {**SMALL, "seed": seed, "steps": 1, "size": "64x64"})
