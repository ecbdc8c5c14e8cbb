"""What others send: a hub's answers, and requests to the server and to the sidecar."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import random
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import fuzz
import huggingface_hub.constants as hub_constants
import local_hub
import PIL.Image
from fuzz import Parser

from sana_edge.errors import SanaError
from sana_edge.serve.app import application
from sana_edge.serve.http import Refused
from sana_edge.serve.job import Job
from sana_edge.serve.service import Service
from sana_edge.serve.stdio import Sidecar
from sana_edge.store import hub

REPOSITORY = "someone/sana-mine"
CONFIG = "vae/config.json"


@functools.cache
def local() -> local_hub.Hub:
    """A hub for as long as the process lasts."""
    server = local_hub.Hub()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def write_hub(folder: Path) -> None:
    server = local()
    server.repositories[REPOSITORY] = local_hub.write_model(folder / "remote")
    server.large = True
    (folder / "info.json").write_bytes(server.listing(REPOSITORY))
    (folder / "headers.json").write_text(json.dumps({"X-Repo-Commit": local_hub.COMMIT}))


def pull(folder: Path) -> None:
    """Download a model; what arrives is whole, or nothing is believed to be."""
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, local().endpoint)
    with (
        mock.patch.object(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template),
        mock.patch.object(hub_constants, "ENDPOINT", local().endpoint),
        mock.patch.object(hub_constants, "HF_HUB_CACHE", str(cache)),
        # between attempts
        mock.patch("time.sleep"),
    ):
        try:
            hub.resolve(REPOSITORY, progress=False)
        finally:
            left = {path.name for path in folder.iterdir()}
            assert left <= {"cache", "remote", "info.json", "headers.json"}, left


def read_info(folder: Path) -> None:
    local().info = (folder / "info.json").read_bytes() or b" "
    try:
        pull(folder)
    finally:
        local().info = b""


def read_headers(folder: Path) -> None:
    local().headers = json.loads((folder / "headers.json").read_bytes())
    try:
        pull(folder)
    finally:
        local().headers = {}


def read_remote_config(folder: Path) -> None:
    """A file that is not what the listing says: its checksum is of the file before."""
    local().info = (folder / "info.json").read_bytes()
    try:
        pull(folder)
    finally:
        local().info = b""


HEADERS = (
    *("ETag", "X-Repo-Commit", "Content-Length", "Content-Range", "Content-Encoding", "Location"),
    *("X-Linked-Size", "X-Linked-Etag", "X-Error-Code", "X-Xet-Hash", "Link", "Retry-After"),
)
TEXTS = (
    '"x"',
    "../../x",
    "0",
    "2",
    "-1",
    "9" * 30,
    "bytes 0-1/2",
    "gzip",
    "/",
    "http://127.0.0.1:9/x",
    "a" * 64,
)


def headers_file(content: bytes, draw: random.Random) -> bytes:
    """Headers of which one to three are other ones."""
    found = json.loads(content)
    for _ in range(draw.randint(1, 3)):
        value = draw.choice(TEXTS) if draw.random() < 0.6 else fuzz.header(draw.choice(fuzz.ODD))
        found[draw.choice(HEADERS)] = value
    return json.dumps(found).encode()


class Refusing(Service):
    """A service that plans every job, and takes none."""

    def __init__(self) -> None:
        super().__init__({"a": "a", "b": "b"}, None)  # type: ignore[arg-type]

    def load(self, *_: object) -> None:
        return

    def submit(self, job: Job, *, keep: bool = False) -> Job:
        job.request.plan(256, "flow-dpm")
        raise Refused(503, "nothing is drawn here")


SERVICE = Refusing()
APPLICATION = application(SERVICE)
JSON_PATHS = (
    *("/v1/jobs", "/v1/estimate", "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"),
    *("/sdapi/v1/txt2img", "/sdapi/v1/img2img", "/sdapi/v1/options"),
)


def ask(path: str, body: bytes, kind: str = "application/json") -> int:
    """The status of an answer; what a route does not foresee is raised."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return parts.pop() if parts else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:1"), (b"content-type", kind.encode("latin-1"))]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 1),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    asyncio.run(APPLICATION(scope, receive, send))
    status: int = sent[0]["status"]
    return status


def requests(paths: Sequence[str], body: bytes, kind: str = "application/json") -> None:
    """Ask each path; the job of a right request is refused with 503."""
    statuses = [ask(path, body, kind) for path in paths]
    assert all(status in (200, 400, 404, 413, 422, 503) for status in statuses), statuses
    if 503 not in statuses:
        raise SanaError("refused everywhere")


def picture() -> bytes:
    made = io.BytesIO()
    PIL.Image.new("RGBA", (8, 8), (9, 8, 7, 0)).save(made, "PNG")
    return made.getvalue()


def body() -> dict[str, Any]:
    shown = base64.b64encode(picture()).decode()
    numbers = {"steps": 2, "guidance": 4.5, "cfg_scale": 5, "seed": 7, "strength": 0.5, "flow_shift": 3.0}
    more = {"width": 64, "height": 64, "batch_size": 1, "n_iter": 1, "preview_every": 1, "tile": 512}
    texts = {"prompt": "a", "negative_prompt": "b", "sampler": "flow-dpm", "model": "a", "instruction": ""}
    openai = {"size": "64x64", "n": 1, "stream": False, "partial_images": 1, "response_format": "b64_json"}
    others = {"output_format": "jpeg", "output_compression": 80, "exact_size": True, "background": "auto"}
    webui = {"sampler_name": "Euler", "styles": [], "override_settings": {"sd_model_checkpoint": "a"}}
    pictures = {"image": shown, "mask": shown, "init_images": [shown], "denoising_strength": 0.5}
    return {**numbers, **more, **texts, **openai, **others, **webui, **pictures}


BOUNDARY = b"sana-edge-fuzz"


def form() -> bytes:
    fields = [
        (b'name="prompt"', b"a red house"),
        (b'name="n"', b"1"),
        (b'name="size"', b"64x64"),
        (b'name="strength"', b"0.5"),
        (b'name="image[]"; filename="a.png"\r\nContent-Type: image/png', picture()),
    ]
    parts = (
        b"--" + BOUNDARY + b"\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + data + b"\r\n"
        for head, data in fields
    )
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def lines() -> bytes:
    generate = {"type": "generate", "id": "1", **body()}
    steer = [{"type": kind, "id": "1"} for kind in ("cancel", "preview", "shutdown")]
    return b"".join(json.dumps(line).encode() + b"\n" for line in (generate, *steer))


def read_lines(folder: Path) -> None:
    out = io.BytesIO()
    sidecar = Sidecar(Refusing(), io.BytesIO((folder / "lines").read_bytes()), out)
    sidecar.run()
    sidecar.close()
    told = [json.loads(line) for line in out.getvalue().splitlines()]
    assert told[0]["type"] == "ready" and all(line["type"] == "error" for line in told[1:]), told


BYTES, JSON = fuzz.any_bytes, fuzz.json_file
PARSERS: dict[str, Parser] = {
    "hub listing": Parser("info.json", JSON, write_hub, read_info, 0.05),
    "hub headers": Parser("headers.json", headers_file, write_hub, read_headers, 0.05),
    "hub file": Parser(f"remote/{CONFIG}", BYTES, write_hub, read_remote_config, 0.02),
    "hub weights": Parser(
        "remote/vae/diffusion_pytorch_model.safetensors", BYTES, write_hub, read_remote_config, 0.02
    ),
    "request": Parser(
        "body.json",
        JSON,
        lambda f: (f / "body.json").write_text(json.dumps(body())),
        lambda f: requests(JSON_PATHS, (f / "body.json").read_bytes()),
        0.3,
    ),
    "request bytes": Parser(
        "body.json",
        BYTES,
        lambda f: (f / "body.json").write_text(json.dumps(body())),
        lambda f: requests(JSON_PATHS, (f / "body.json").read_bytes()),
        0.2,
    ),
    "form": Parser(
        "form",
        BYTES,
        lambda f: (f / "form").write_bytes(form()),
        lambda f: requests(
            ["/v1/images/edits"],
            (f / "form").read_bytes(),
            f"multipart/form-data; boundary={BOUNDARY.decode()}",
        ),
        0.5,
    ),
    "sidecar": Parser(
        "lines", fuzz.lines_file, lambda f: (f / "lines").write_bytes(lines()), read_lines, 0.5
    ),
    "sidecar bytes": Parser("lines", BYTES, lambda f: (f / "lines").write_bytes(lines()), read_lines, 0.5),
}
