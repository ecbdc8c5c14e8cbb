"""A model hub on this machine: what a download uses of one, and faults that it is told to have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from safetensors.numpy import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_model(folder: Path, *, variants: bool = False, count: int = 64) -> Path:
    """Every file of a SANA pipeline, with ``count`` weights in each component.

    ``variants`` adds fp16 files beside the fp32 ones, and shards.
    """
    texts = {
        "model_index.json": {"_class_name": "SanaPipeline"},
        "scheduler/scheduler_config.json": {"_class_name": "DPMSolverMultistepScheduler"},
        "tokenizer/tokenizer.json": {},
        "transformer/config.json": {},
        "vae/config.json": {},
        "text_encoder/config.json": {},
    }
    weights = [f"{name}/diffusion_pytorch_model" for name in ("transformer", "vae")]
    if variants:
        shards = [f"model{v}-0000{i}-of-00002.safetensors" for v in ("", ".fp16") for i in (1, 2)]
        for name in shards:
            (folder / "text_encoder").mkdir(parents=True, exist_ok=True)
            save_file({name: np.zeros(4, np.float16)}, folder / "text_encoder" / name)
        texts["text_encoder/model.safetensors.index.json"] = {"weight_map": {"a": shards[0], "b": shards[1]}}
        texts["text_encoder/model.safetensors.index.fp16.json"] = {
            "weight_map": {"a": shards[2], "b": shards[3]}
        }
    else:
        weights.append("text_encoder/model")
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    for name in weights:
        save_file({name[:1]: np.zeros(count, np.float32)}, folder / f"{name}.safetensors")
        if variants:
            save_file({"a": np.zeros(64, np.float16)}, folder / f"{name}.fp16.safetensors")
    return folder


class Hub(ThreadingHTTPServer):
    """The parts of a model hub that a download uses: revision, file list, and files with ranges."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commit = COMMIT
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.fetched: list[tuple[str, str]] = []  # (path of a file, its Range header)
        self.large = False  # whether weights have checksums of their own, as in Git LFS
        self.spoil: set[str] = set()  # files of which a byte arrives changed
        self.answer = b""  # to every question, in place of the right one
        self.info = b""  # to the question what a repository holds, in place of the right one
        self.headers: dict[str, str] = {}  # of files, in place of the right ones
        self.stall: dict[str, int] = {}  # bytes of a file after which nothing more comes
        self.cut: dict[str, int] = {}  # bytes of a file after which the connection is closed, once
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def listing(self, repository: str) -> bytes:
        """What a repository holds."""
        folder = self.repositories[repository]
        siblings = [_sibling(folder, name, self.large) for name in _files(folder)]
        return json.dumps({"id": repository, "sha": self.commit, "siblings": siblings}).encode()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        repository = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if repository in self.server.gated:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if self.server.answer:
            return self._send(200, self.server.answer, {"Content-Type": "text/html"})
        folder = self.server.repositories.get(repository)
        if folder is None:
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if parts[0] != "api":
            return self._file(folder, "/".join(parts[4:]))
        if parts[4:5] == ["tree"]:
            listing = [
                {
                    "type": "file",
                    "path": name,
                    "size": (folder / name).stat().st_size,
                    "oid": _hash(folder / name),
                }
                for name in _files(folder)
            ]
            return self._send(200, json.dumps(listing).encode())
        return self._send(200, self.server.info or self.server.listing(repository))

    def _file(self, folder: Path, name: str) -> None:
        if not (folder / name).is_file():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        data = (folder / name).read_bytes()
        linked = self.server.large and name.endswith(".safetensors")
        etag = hashlib.sha256(data).hexdigest() if linked else _hash(folder / name)
        if name in self.server.spoil:
            data = data[:-1] + bytes([data[-1] ^ 1])
        headers = {
            "X-Repo-Commit": self.server.commit,
            "ETag": f'"{etag}"',
            "Accept-Ranges": "bytes",
            **self.server.headers,
        }
        asked = self.headers.get("Range", "")
        if self.command == "GET":
            self.server.fetched.append((name, asked))
        if asked:
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(206, data[start:], headers)
        if self.command == "HEAD":
            return self._send(200, data, headers)
        self._send(200, data, headers, end=self.server.cut.pop(name, None) or self.server.stall.get(name))
        if name in self.server.stall:
            time.sleep(60)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, end: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:end])
            self.wfile.flush()
            self.close_connection = end is not None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    """As git names a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(folder: Path, name: str, large: bool) -> dict[str, object]:
    path = folder / name
    sibling: dict[str, object] = {"rfilename": name, "size": path.stat().st_size, "blobId": _hash(path)}
    if large and name.endswith(".safetensors"):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        sibling["lfs"] = {"sha256": sha256, "size": path.stat().st_size, "pointerSize": 130}
    return sibling


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers, in threads of its own."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
