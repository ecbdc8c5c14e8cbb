"""A server in a thread, a client that sends what it is told to, and a model that draws when it is let."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sana_edge.errors import Cancelled, OutOfMemory
from sana_edge.generation import Step
from sana_edge.image import Image
from sana_edge.request.request import Request
from sana_edge.serve.server import Server, address, listen
from sana_edge.serve.service import Service
from sana_edge.store.known_models import BUNDLED

MODEL = "sana-tiny-int8-onnx"
# the smallest picture
SMALL = {"prompt": "a red house", "seed": 7, "steps": 2, "exact_size": True}


class Answer:
    """A response, read to its end."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str, Any]]:
        """Names and contents of a stream's events."""
        found = []
        for block in self.body.decode().strip().split("\n\n"):
            lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
            if lines:
                found.append((lines["event"], json.loads(lines["data"])))
        return found


class Client:
    """Requests to a server at ``url``."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, dict(headers or {}))
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask(
            "GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    def post(self, path: str, body: Any = None, **headers: str) -> Answer:
        return self.ask(
            "POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )

    def send(self, path: str, body: Any) -> socket.socket:
        """Send a request, and leave its answer unread."""
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\nContent-Length: {len(data)}\r\n\r\n"
        return self.raw(head.encode() + data)

    def raw(self, data: bytes) -> socket.socket:
        connection = socket.create_connection((self.host, self.port), timeout=60)
        connection.sendall(data)
        return connection


@contextlib.contextmanager
def serving(service: Service, key: str | None = None) -> Iterator[Client]:
    """A server in a thread."""
    listening = listen("127.0.0.1", 0, key)
    server = Server(service, key)
    thread = threading.Thread(target=server.answer, args=[listening])
    thread.start()
    try:
        yield Client(address(listening))
    finally:
        server.stop()
        thread.join()


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something that must come; a test that waits in vain fails after a minute."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("it did not come")


class FakeSana:
    """Draws as `Sana` does, a step each time that ``gate`` lets it."""

    native_size = (64, 64)

    def __init__(self, name: str, gate: threading.Semaphore, loaded: list[str]) -> None:
        self.name, self.gate, self.loaded = name, gate, loaded
        self.fails: list[Exception] = []
        loaded.append(name)

    def close(self) -> None:
        self.loaded.remove(self.name)

    def stream(
        self, prompt: str, *, images: int, on_progress: Any, cancel: threading.Event, **options: Any
    ) -> Iterator[Step]:
        width, height = options["size"] or self.native_size
        steps, total = options["steps"] or 2, (options["steps"] or 2) * images
        pixels = np.zeros((height, width, 3), np.uint8)
        plan = Request(prompt, images=images, **options).plan(64, "flow-dpm")
        for index in range(total):
            while not self.gate.acquire(timeout=0.01):
                if cancel.is_set():
                    raise Cancelled("the generation was cancelled")
            if self.fails:
                raise self.fails.pop()
            on_progress("denoise", index + 1, total)
            image = None
            if (index + 1) % steps == 0:
                on_progress("decode", 1, 1)
                one = plan.picture(index // steps)
                metadata = {**one.metadata(), "steps": steps, "model": self.name}
                image = Image(pixels, one.seed, metadata, {"text": 0.0, "denoise": 0.1, "decode": 0.1})
            yield Step(index, total, image, lambda linear: pixels + np.uint8(linear))


class FakeLoader:
    """Loads models of ``FakeSana``, of which ``room`` fit into memory at once."""

    def __init__(self, room: int = 9) -> None:
        # open: nothing waits
        self.gate = threading.Semaphore(1_000_000)
        self.room = room
        self.loaded: list[str] = []
        self.loads = 0
        self.models: dict[str, FakeSana] = {}

    def __call__(self, model: str, on_progress: Any, cancel: threading.Event) -> Any:
        if len(self.loaded) >= self.room:
            raise OutOfMemory(f"not enough memory for {model}")
        self.loads += 1
        on_progress("loading", 1, 1)
        self.models[model] = FakeSana(model, self.gate, self.loaded)
        return self.models[model]

    def size(self, model: str) -> int:
        return 0


def write_command(folder: Path, *options: str) -> None:
    """A script ``sana-edge`` of this checkout, for programs that start it by its name."""
    script = folder / "sana-edge"
    words = shlex.join([sys.executable, "-m", "sana_edge"])
    script.write_text(f'#!/bin/sh\nexec {words} "$@" {shlex.join(["--threads", "1", *options])}\n')
    script.chmod(0o755)


class RealLoader:
    """Loads bundled folders."""

    def __call__(self, model: str, on_progress: Any, cancel: threading.Event) -> Any:
        from sana_edge import Sana

        return Sana.load(BUNDLED / model, threads=1, on_progress=on_progress, cancel=cancel)

    def size(self, model: str) -> int:
        return 0
