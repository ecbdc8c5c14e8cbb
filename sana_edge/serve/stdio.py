"""The sidecar: requests as lines of JSON on stdin, events as lines of JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import IO, Any

from sana_edge import __version__
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.serve.events import News
from sana_edge.serve.fields import Fields, shown
from sana_edge.serve.service import PATIENCE, Service
from sana_edge.serve.uploads import MAX_UPLOAD

# of the lines; a later one may add types and fields
PROTOCOL = 1
# bytes of a line, with pictures in base64
MAX_LINE = MAX_UPLOAD


class Sidecar:
    """Lines in, lines out; docs/embedding.md has their schema.

    Args:
        lines: requests, whose end is the end of the parent.
        out: gets one JSON object a line, and nothing else.
    """

    def __init__(self, service: Service, lines: IO[bytes], out: IO[bytes]) -> None:
        self._service = service
        self._lines = lines
        self._out = out
        self._writing = threading.Lock()
        # by the id that the parent gave
        self._news: dict[str, News] = {}
        self._changed = threading.Event()
        self._teller = threading.Thread(target=self._tell, name="sidecar", daemon=True)
        self._over = False

    def run(self) -> None:
        """Load the default model, then answer until "shutdown" or the end of the lines.

        Raises:
            SanaError: the model cannot be loaded; the parent was told.
        """
        try:
            self._service.load(self._loading)
        except SanaError as error:
            self._error(None, error)
            raise
        self._teller.start()
        models = list(self._service.workers)
        self._write(
            {"id": None, "type": "ready", "protocol": PROTOCOL, "version": __version__, "models": models}
        )
        while line := self._lines.readline(MAX_LINE + 1):
            try:
                if len(line) > MAX_LINE:
                    self._skip(line)
                    raise InvalidInput(f"a line has more than {MAX_LINE} bytes", "send less")
                if line.strip() and not self._take(Fields.parse(line)):
                    break
            except SanaError as error:
                self._error(None, error)

    def close(self) -> bool:
        """Cancel what is left, and tell; False where a worker computes on, or the parent does not read."""
        done = self._service.close()
        self._over = True
        self._changed.set()
        if self._teller.is_alive():
            self._teller.join(PATIENCE)
        return done and not self._teller.is_alive()

    def _take(self, asked: Fields) -> bool:
        """Answer one line; False for "shutdown"."""
        kind = asked.values.get("type")
        identity = asked.values.get("id")
        if kind == "shutdown":
            return False
        if not isinstance(identity, str) or len(identity) > 200:
            raise InvalidInput(f"id is {shown(identity)}", "give each job a string of at most 200 characters")
        try:
            if kind == "generate":
                self._generate(identity, asked)
            elif kind in ("cancel", "preview"):
                self._steer(identity, kind)
            else:
                raise InvalidInput(f"type is {shown(kind)}", "choose generate, cancel, preview or shutdown")
        except SanaError as error:
            self._error(identity, error)
        return True

    def _generate(self, identity: str, asked: Fields) -> None:
        if identity in self._news:
            raise InvalidInput(f"job {identity!r} is not finished", "give each job an id of its own")
        job = asked.job(self._service.known)
        job.watch(self._changed.set)
        self._service.submit(job)
        self._news[identity] = News(job)
        self._changed.set()

    def _steer(self, identity: str, kind: str) -> None:
        news = self._news.get(identity)
        if news is None:
            # it may have ended just now, which the parent will read
            return
        if kind == "cancel":
            self._service.cancel(news.job)
        else:
            news.job.preview_wanted = True

    def _tell(self) -> None:
        """Write what happens; in a thread of its own, so that a parent that reads slowly delays no worker."""
        while not self._over:
            self._changed.wait()
            self._changed.clear()
            for identity, news in list(self._news.items()):
                events = news.take()
                if news.over:
                    # the id is free before the parent reads of the end
                    del self._news[identity]
                for event in events:
                    self._write({"id": identity, **event})

    def _skip(self, line: bytes) -> None:
        while line and not line.endswith(b"\n"):
            line = self._lines.readline(MAX_LINE)

    def _loading(self, name: str, done: int, count: int) -> None:
        stage = {"type": "progress", "stage": "loading", "name": name, "done": done, "count": count}
        self._write({"id": None, **stage})

    def _error(self, identity: str | None, error: SanaError) -> None:
        self._write({"id": identity, "type": "error", "error": error.message, "hint": error.hint})

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, separators=(",", ":")).encode("ascii") + b"\n"
        with self._writing:
            try:
                self._out.write(line)
                self._out.flush()
            except (OSError, ValueError):
                # nobody reads on: the end of the lines follows
                pass


def take_stdout() -> IO[bytes]:
    """Stdout for lines of JSON alone: what anything else prints, also a C library, goes to stderr."""
    sys.stdout.flush()
    private = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return os.fdopen(private, "wb")


def run(service: Service) -> None:
    """Serve on stdin and stdout until the parent ends it, or ends."""
    sidecar = Sidecar(service, sys.stdin.buffer, take_stdout())
    try:
        sidecar.run()
    finally:
        if not sidecar.close():
            # a step that cannot be interrupted must not keep the process of a parent that has gone
            os._exit(1)
