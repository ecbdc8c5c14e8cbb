"""The sidecar: lines in, lines out, and the end of its parent."""

from __future__ import annotations

import io
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

import pytest
from serving import MODEL, SMALL, FakeLoader, until

from sana_edge.serve import stdio
from sana_edge.serve.service import Service
from sana_edge.serve.stdio import Sidecar
from sana_edge.store.known_models import BUNDLED


class Parent:
    """A sidecar in a thread, and its parent's ends of the pipes."""

    def __init__(self, service: Service) -> None:
        lines, sends = os.pipe()
        reads, out = os.pipe()
        self.input: IO[bytes] = os.fdopen(sends, "wb")
        self._output = os.fdopen(reads, "rb")
        self.sidecar = Sidecar(service, os.fdopen(lines, "rb"), os.fdopen(out, "wb"))
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, content: Any) -> None:
        line = content if isinstance(content, bytes) else json.dumps(content).encode() + b"\n"
        self.input.write(line)
        self.input.flush()

    def next(self, kind: str, identity: str | None = None) -> dict[str, Any]:
        """The next event of a kind; those before it are skipped."""
        while True:
            event = self.events.get(timeout=60)
            if event["type"] == kind and (identity is None or event["id"] == identity):
                return event

    def _run(self) -> None:
        self.sidecar.run()
        self.sidecar.close()

    def _read(self) -> None:
        for line in self._output:
            self.events.put(json.loads(line))


@pytest.fixture
def parent(service: Service) -> Iterator[Parent]:
    made = Parent(service)
    ready = made.next("ready")
    assert ready["models"] == ["one", "two", "three"] and ready["protocol"] == 1
    yield made
    made.input.close()
    made.thread.join(60)


def test_generate(parent: Parent) -> None:
    parent.send({"type": "generate", "id": "a", **SMALL, "images": 2, "preview_every": 1})
    events = [parent.next(kind, "a") for kind in ("progress", "preview", "image", "image", "done")]
    assert [event["seed"] for event in events if event["type"] == "image"] == [7, 8]
    # the id is free again
    parent.send({"type": "generate", "id": "a", **SMALL, "model": "two"})
    assert parent.next("image", "a")["metadata"]["model"] == "two"


def test_an_id_is_free_before_its_end_is_told(parent: Parent, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar, known = parent.sidecar, list[bool]()
    write = sidecar._write

    def noted(event: dict[str, Any]) -> None:
        if event["type"] == "done":
            known.append("a" in sidecar._news)
        write(event)

    monkeypatch.setattr(sidecar, "_write", noted)
    parent.send({"type": "generate", "id": "a", **SMALL})
    parent.next("done", "a")
    assert known == [False]


def test_cancel_preview_and_shutdown(parent: Parent, service: Service, loader: FakeLoader) -> None:
    for fake in loader.models.values():
        fake.gate = threading.Semaphore(0)
    gate = loader.models["one"].gate
    for identity in ("a", "b", "c"):
        parent.send({"type": "generate", "id": identity, **SMALL, "steps": 9})
    until(lambda: service.queue.running == 1 and service.queue.waiting == 2)
    parent.send({"type": "preview", "id": "a"})
    parent.send({"type": "cancel", "id": "nobody"})
    parent.send({"type": "cancel", "id": "b"})
    assert parent.next("cancelled", "b")["error"] == "the job was cancelled"
    gate.release()
    assert parent.next("preview", "a")["step"] == 1
    parent.send({"type": "cancel", "id": "a"})
    parent.next("cancelled", "a")
    parent.send({"type": "shutdown"})
    parent.next("error" if service.queue.waiting else "cancelled", "c")
    parent.thread.join(60)
    assert not parent.thread.is_alive() and not loader.loaded


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"no json\n", "this is no JSON"),
        (b"[]\n", "this is JSON, but no object"),
        (b'{"type": "generate", "prompt": "a"}\n', "id is None"),
        (b'{"type": "generate", "id": 3, "prompt": "a"}\n', "id is 3"),
        (b'{"type": "draw", "id": "a"}\n', "type is 'draw'"),
        (b'{"id": "a"}\n', "type is None"),
        (b'{"type": "generate", "id": "a"}\n', "there is no prompt"),
        (b'{"type": "generate", "id": "a", "prompt": "b", "steps": 0}\n', "steps is 0"),
        (b'{"type": "generate", "id": "a", "prompt": "b", "preview_every": -1}\n', "preview_every is -1"),
        (b'{"type": "generate", "id": "a", "prompt": "' + b"b" * 30_000 + b'"}\n', "a line has more"),
        (b"\xff\n", "this is no JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_lines(parent: Parent, line: bytes, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdio, "MAX_LINE", 10_000)
    parent.send(b"\n")
    parent.send(line)
    error = parent.next("error")
    assert error["error"].startswith(message) and error["hint"]
    # and goes on
    parent.send({"type": "generate", "id": "b", **SMALL})
    parent.next("done", "b")


def test_two_jobs_of_one_id_and_a_full_queue(parent: Parent, loader: FakeLoader) -> None:
    loader.models["one"].gate = threading.Semaphore(0)
    for identity in ("a", "a", "b", "c", "d"):
        parent.send({"type": "generate", "id": identity, **SMALL})
    assert parent.next("error")["error"] == "job 'a' is not finished"
    assert parent.next("error")["id"] == "d"


def test_a_model_that_cannot_be_loaded() -> None:
    out = io.BytesIO()
    service = Service({"one": "one"}, FakeLoader(room=0))
    sidecar = Sidecar(service, io.BytesIO(), out)
    with pytest.raises(Exception, match="not enough memory for one"):
        sidecar.run()
    assert sidecar.close()
    assert json.loads(out.getvalue())["error"] == "not enough memory for one"


def test_the_process_ends_with_its_parent() -> None:
    """Stdout has lines of JSON alone, also while libraries load, and the end of stdin is the end."""
    command = [sys.executable, "-m", "sana_edge", "serve", "--stdio", "--threads", "1"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--model", str(BUNDLED / MODEL)], **pipes) as started:
        body = {"type": "generate", "id": "a", **SMALL, "size": "64x64"}
        later = {**body, "id": "b", "steps": 1000}
        started.stdin.write("".join(f"{json.dumps(line)}\n" for line in (body, later)).encode())
        started.stdin.flush()
        events = []
        while not events or (events[-1]["id"], events[-1].get("stage")) != ("b", "denoise"):
            events.append(json.loads(started.stdout.readline()))
        started.stdin.close()
        rest = [json.loads(line) for line in started.stdout]
        assert started.wait(60) == 0, started.stderr.read()
    assert [event["type"] for event in events if event["id"] == "a"][-2:] == ["image", "done"]
    assert rest[-1]["type"] == "cancelled"
