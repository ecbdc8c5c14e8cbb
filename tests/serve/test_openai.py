"""OpenAI's image API, by its own client, by requests as other clients send them, and field by field."""

from __future__ import annotations

import base64
import io
import re
import threading
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from serving import MODEL, SMALL, Client, FakeLoader, until

from sana_edge.cli.main import main
from sana_edge.serve.openai import spread
from sana_edge.serve.service import Service
from sana_edge.store.known_models import BUNDLED

PATH = "/v1/images/generations"
# what `SMALL` has beyond OpenAI's own fields
EXTRA = {name: value for name, value in SMALL.items() if name != "prompt"}


@pytest.fixture
def openai(real: Client) -> Any:
    module = pytest.importorskip("openai")
    return module.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)


def open_picture(data: str) -> PIL.Image.Image:
    return PIL.Image.open(io.BytesIO(base64.b64decode(data)))


def test_generate(openai: Any) -> None:
    answer = openai.images.generate(prompt="a red house", n=3, size="64x32", model=MODEL, extra_body=EXTRA)
    assert [open_picture(entry.b64_json).size for entry in answer.data] == [(64, 32)] * 3
    assert [entry.seed for entry in answer.data] == [7, 8, 9]
    assert answer.size == "64x32" and answer.output_format == "png"


def test_stream_with_true_partial_pictures(openai: Any) -> None:
    stream = openai.images.generate(
        prompt="a red house",
        size="256x256",
        stream=True,
        partial_images=2,
        extra_body={**EXTRA, "steps": 12, "n": 2},
    )
    events = list(stream)
    kinds = ["image_generation.partial_image", "image_generation.partial_image", "image_generation.completed"]
    assert [event.type for event in events] == kinds * 2
    assert [event.partial_image_index for event in events if "partial" in event.type] == [0, 1, 0, 1]
    whole = openai.images.generate(prompt="a red house", size="256x256", extra_body={**EXTRA, "steps": 12})
    assert events[2].b64_json == whole.data[0].b64_json
    # each is nearer to the picture than the one before
    final = PIL.Image.open(io.BytesIO(base64.b64decode(events[2].b64_json))).tobytes()
    distances = [
        sum(abs(a - b) for a, b in zip(open_picture(event.b64_json).tobytes(), final, strict=True))
        for event in events[:2]
    ]
    assert distances[0] > distances[1] > 0


@pytest.mark.parametrize(
    ("count", "steps", "expected"),
    [(0, 20, []), (1, 20, [10]), (3, 20, [5, 10, 15]), (3, 2, [1]), (3, 1, []), (2, 3, [1, 2])],
)
def test_partials_are_spread_over_the_steps(count: int, steps: int, expected: list[int]) -> None:
    assert [step + 1 for step in range(steps) if spread(count)(step, steps)] == expected


def test_models(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == [MODEL, "second"]
    assert openai.models.retrieve("second").id == "second"
    with pytest.raises(Exception, match="there is no such model") as error:
        openai.models.retrieve("a/b")
    assert error.value.status_code == 404  # type: ignore[attr-defined]


def test_errors_as_the_client_knows_them(openai: Any) -> None:
    import openai as module

    with pytest.raises(module.BadRequestError, match="size 65x64 is not a multiple of 32: try") as error:
        openai.images.generate(prompt="a house", size="65x64", extra_body=EXTRA)
    assert error.value.body["hint"].startswith("try 64x64")
    with pytest.raises(module.BadRequestError, match="cannot read the image"):
        openai.images.edit(image=b"png", prompt="a house")
    with pytest.raises(module.APIError, match="sampler scm does not work"):
        # known only to the model, when the stream has begun
        list(openai.images.generate(prompt="a house", stream=True, extra_body={"sampler": "scm"}))


def test_pictures_by_url_and_in_other_formats(real: Client) -> None:
    entry = {**SMALL, "size": "64x64", "response_format": "url", "output_format": "webp"}
    answer = real.post(PATH, {**entry, "output_compression": 40})
    url = answer.json["data"][0]["url"]
    assert url.startswith(f"{real.url}/v1/pictures/")
    picture = real.get(url.removeprefix(real.url))
    assert picture.headers["content-type"] == "image/webp"
    assert PIL.Image.open(io.BytesIO(picture.body)).format == "WEBP"
    assert real.get(url.removeprefix(real.url)[:-1] + "1").status == 404


def test_the_same_seed_gives_the_same_bytes(real: Client, tmp_path: Path) -> None:
    """Through every face, and as the command line does."""
    openai = real.post(PATH, {**SMALL, "size": "64x64"}).json["data"][0]["b64_json"]
    automatic = real.post("/sdapi/v1/txt2img", {**SMALL, "width": 64, "height": 64}).json["images"][0]
    job = real.post("/v1/jobs", {**SMALL, "size": [64, 64], "n": 2}).json["id"]
    real.get(f"/v1/jobs/{job}/events")
    picture = real.get(f"/v1/jobs/{job}?pictures=1").json["pictures"][0]
    assert openai == automatic == picture["b64_json"]
    file = tmp_path / "house.png"
    options = ["--seed", "7", "--steps", "2", "--size", "64x64", "--exact-size", "--threads", "1"]
    model = str(BUNDLED / MODEL)
    assert main(["generate", "a red house", "--model", model, "--output", str(file), *options]) == 0
    assert base64.b64decode(openai) == file.read_bytes() == real.get(picture["url"]).body


RECORDED: dict[str, dict[str, Any]] = {
    "Open WebUI": {
        "model": "dall-e-3",
        "prompt": "a red house",
        "n": 1,
        "size": "64x64",
        "response_format": "b64_json",
    },
    "LibreChat": {
        "model": "gpt-image-1",
        "prompt": "a red house",
        "n": 1,
        "size": "auto",
        "quality": "auto",
        "background": "auto",
        "output_format": "png",
    },
    # its configuration names a model that gives no choice of the response's format
    "Open WebUI, gpt-image": {"model": "gpt-image-1", "prompt": "a red house", "n": 2, "size": "64x64"},
    "LiteLLM": {"model": "openai/sana", "prompt": "a red house", "n": 2, "size": "64x64", "user": None},
    "null": {"prompt": "a red house", "n": None, "size": None, "stream": None, "seed": None, "style": None},
}


@pytest.mark.parametrize("body", RECORDED.values(), ids=RECORDED)
def test_requests_of_clients(real: Client, body: dict[str, Any]) -> None:
    answer = real.post(PATH, {**body, "steps": 1}, Authorization="Bearer anything")
    assert answer.status == 200 and len(answer.json["data"]) == (body["n"] or 1)
    size = (64, 64) if body["size"] == "64x64" else (256, 256)
    assert open_picture(answer.json["data"][0]["b64_json"]).size == size


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "there is no prompt"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": ["a"]}, r"prompt is \['a'\]"),
    ({"n": 0}, "n is 0"),
    ({"n": 11}, "n is 11: choose a whole number from 1 to 10"),
    ({"n": "2"}, "n is '2'"),
    ({"n": 1.5}, "n is 1.5"),
    ({"n": True}, "n is True"),
    ({"size": "64"}, "size is '64'"),
    ({"size": 64}, "size is 64"),
    ({"size": [64, 64, 64]}, "size is"),
    ({"size": "0x64"}, "size 0x64 is too small"),
    ({"size": "-64x64"}, "size is"),
    ({"size": "99999999x64"}, "too large"),
    ({"size": "64x64; rm"}, "size is"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 10**400}, "steps is a huge number"),
    ({"steps": None, "num_inference_steps": "4"}, "num_inference_steps is '4'"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "seed is 9223372036854775808"),
    ({"seed": "7"}, "seed is"),
    ({"guidance": -1}, "guidance is -1"),
    ({"guidance_scale": "x" * 10**5}, "guidance_scale is .{0,80}\\.\\.\\.:"),
    ({"negative_prompt": 3}, "negative_prompt is 3"),
    ({"sampler": "Euler a"}, "unknown sampler 'Euler a'"),
    ({"exact_size": "yes"}, "exact_size is 'yes'"),
    ({"flow_shift": 0}, "flow shift is 0"),
    ({"tile": 33}, "tile is 33"),
    ({"instruction": 4}, "instruction is 4"),
    ({"stream": "true"}, "stream is 'true'"),
    ({"stream": True, "partial_images": 4}, "partial_images is 4"),
    ({"response_format": "file"}, "response_format is 'file': choose b64_json, url"),
    ({"output_format": "gif"}, "output_format is 'gif'"),
    ({"output_compression": 101}, "output_compression is 101"),
    ({"model": 4}, "model is 4"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(wrong)[:40] for wrong, _ in WRONG])
def test_every_field_wrong_in_turn(idle: Client, wrong: dict[str, Any], message: str) -> None:
    answer = idle.post(PATH, {**SMALL, **wrong})
    error = answer.json["error"]
    assert answer.status == 400 and re.search(message, error["message"]), error
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 400


def test_client_that_hangs_up(fake: Client, service: Service, loader: FakeLoader) -> None:
    """Its job is cancelled, drawn or waiting, streamed or not."""
    loader.gate = threading.Semaphore(0)
    connections = [fake.send(PATH, {**SMALL, "stream": streamed}) for streamed in (False, True)]
    connections.append(fake.send("/sdapi/v1/txt2img", SMALL))
    until(lambda: service.queue.running == 1 and service.queue.waiting == 2)
    for connection in connections:
        connection.close()
    until(lambda: service.ended["cancelled"] == 3)
    loader.gate.release(100)
    assert fake.post(PATH, SMALL).status == 200


def test_full_queue(fake: Client, service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    connections = [fake.send(PATH, SMALL) for _ in range(3)]
    until(lambda: service.queue.running == 1 and service.queue.waiting == 2)
    for path, shape in ((PATH, lambda body: body["error"]), ("/v1/jobs", dict), ("/sdapi/v1/txt2img", dict)):
        answer = fake.post(path, SMALL)
        assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
        assert shape(answer.json)["hint"]
    loader.gate.release(100)
    for connection in connections:
        assert connection.recv(12) == b"HTTP/1.1 200"
        connection.close()
