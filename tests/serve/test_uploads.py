"""Pictures that come with requests, through each face: of any kind, wrong ones, and none from a path."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
from serving import SMALL, Client, RealLoader, serving

from sana_edge import Sana
from sana_edge.image import metadata_of
from sana_edge.serve import uploads
from sana_edge.serve.fields import Fields
from sana_edge.serve.service import Service
from sana_edge.store.known_models import BUNDLED

TORCH = "sana-tiny-int8"
EDITS = "/v1/images/edits"
START = {**SMALL, "steps": 4, "strength": 0.5}


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> PIL.Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return PIL.Image.fromarray(values).convert(mode)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def form(parts: dict[str, str | bytes]) -> tuple[bytes, str]:
    """A body of multipart/form-data and its type."""
    lines = []
    for name, value in parts.items():
        file = '; filename="a.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        lines += [b"--edge", f'Content-Disposition: form-data; name="{name}"{file}'.encode(), b"", data]
    return b"\r\n".join([*lines, b"--edge--", b""]), "multipart/form-data; boundary=edge"


@pytest.fixture(scope="module")
def torch_server() -> Iterator[Client]:
    """A model with an encoder."""
    with serving(Service({TORCH: TORCH}, RealLoader())) as client:
        yield client


def half_mask(size: tuple[int, int] = (64, 32)) -> np.ndarray:
    """White, to be drawn anew, on the right."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[:, size[0] // 2 :] = 255
    return mask


def test_the_same_picture_through_every_face(torch_server: Client) -> None:
    """And from Python; what the mask keeps is the picture itself."""
    image, mask = picture(), half_mask()
    alpha = PIL.Image.fromarray(np.dstack([np.array(image), 255 - mask]))
    with Sana.load(BUNDLED / TORCH, threads=1) as sana:
        options = {name: value for name, value in START.items() if name != "prompt"}
        expected = sana.generate("a red house", image=image, mask=mask, **options).png()  # type: ignore[call-overload]
    fields = {
        name: str(value).lower() if name == "exact_size" else str(value) for name, value in START.items()
    }
    body, kind = form({**fields, "image": encoded(image), "mask": encoded(alpha)})
    openai = torch_server.ask("POST", EDITS, body, {"Content-Type": kind})
    assert openai.status == 200, openai.body
    white = text(encoded(PIL.Image.fromarray(mask)))
    start = {**SMALL, "steps": 4, "denoising_strength": 0.5, "init_images": [text(encoded(image))]}
    automatic = torch_server.post("/sdapi/v1/img2img", {**start, "mask": white})
    job = torch_server.post("/v1/jobs", {**START, "image": text(encoded(image)), "mask": white}).json["id"]
    torch_server.get(f"/v1/jobs/{job}/events")
    drawn = torch_server.get(f"/v1/jobs/{job}?pictures=1").json["pictures"][0]["b64_json"]
    assert base64.b64decode(drawn) == expected
    assert openai.json["data"][0]["b64_json"] == automatic.json["images"][0] == drawn
    pixels = np.array(PIL.Image.open(io.BytesIO(expected)))
    kept, anew = (np.array(image) == pixels).all(2)[:, :32], (np.array(image) == pixels).all(2)[:, 32:]
    assert kept.all() and not anew.all()
    # the other way round
    inverted = text(encoded(PIL.Image.fromarray(255 - mask)))
    again = torch_server.post("/sdapi/v1/img2img", {**start, "mask": inverted, "inpainting_mask_invert": 1})
    assert again.json["images"][0] == drawn


def test_openai_client(torch_server: Client) -> None:
    module = pytest.importorskip("openai")
    client = module.OpenAI(base_url=f"{torch_server.url}/v1", api_key="none", max_retries=0)
    extra = {"steps": 4, "seed": 7, "exact_size": True}
    whole = client.images.edit(
        image=("a.png", encoded(picture()), "image/png"), prompt="a red house", n=2, extra_body=extra
    )
    assert len(whole.data) == 2 and whole.size == "64x32"
    events = client.images.edit(
        image=[("a.png", encoded(picture()), "image/png")],
        prompt="a red house",
        size="64x64",
        stream=True,
        partial_images=1,
        extra_body=extra,
    )
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("image", {"model": "gpt-image-1", "prompt": "a house", "n": "1", "response_format": "b64_json"}),
        ("image[]", {"model": "dall-e-2", "prompt": "a house", "size": "64x64", "background": "auto"}),
        ("image[]", {"model": "gpt-image-1", "prompt": "a house", "quality": "auto", "size": "auto"}),
    ],
    ids=["Open WebUI", "Open WebUI, from a list", "LibreChat"],
)
def test_edits_of_clients(real: Client, field: str, body: dict[str, str | bytes]) -> None:
    data, kind = form({**body, "steps": "2", "exact_size": "true", field: encoded(picture())})
    headers = {"Content-Type": kind, "Authorization": "Bearer anything"}
    answer = real.ask("POST", f"{EDITS}?api-version=2025-04-01", data, headers)
    assert answer.status == 200, answer.body
    (one,) = answer.json["data"]
    size = (64, 64) if body.get("size") == "64x64" else (64, 32)
    assert PIL.Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).size == size


def test_webuiapi(torch_server: Client) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(host=torch_server.host, port=torch_server.port)
    result = api.img2img(
        images=[picture()],
        mask_image=PIL.Image.fromarray(half_mask()),
        prompt="a red house",
        steps=2,
        seed=7,
        width=64,
        height=64,
    )
    assert result.image.size == (64, 64) and result.info["all_seeds"] == [7]


GOOD = {
    "JPEG": encoded(picture(), "JPEG"),
    "CMYK": encoded(picture("CMYK"), "JPEG"),
    "grey": encoded(picture("L")),
    "palette": encoded(picture("P"), "GIF"),
    "alpha": encoded(picture("RGBA")),
    "WebP": encoded(picture("RGBA"), "WEBP"),
    "16 bits": encoded(PIL.Image.fromarray(np.full((32, 64), 40_000, np.uint16))),
    "one bit": encoded(picture("1")),
    "animated": encoded(picture(), "GIF", save_all=True, append_images=[picture("L")]),
    "TIFF": encoded(picture(), "TIFF"),
    "BMP": encoded(picture(), "BMP"),
}


@pytest.mark.parametrize("data", GOOD.values(), ids=GOOD)
def test_pictures_of_any_kind(idle: Client, data: bytes) -> None:
    for value in (text(data), f"data:image/png;base64,{text(data)}"):
        assert idle.post("/v1/jobs", {**SMALL, "image": value}).status == 202
    body, kind = form({"prompt": "a house", "image[]": data})
    assert idle.ask("POST", EDITS, body, {"Content-Type": kind}).status == 200


def test_a_mask_in_lab_becomes_grey() -> None:
    found = uploads.decode(encoded(PIL.Image.new("LAB", (8, 8)), "TIFF"), "mask")
    assert found.convert("L").size == (8, 8)


def test_rotation_of_exif() -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert uploads.decode(encoded(picture(), "JPEG", exif=exif), "image").size == (32, 64)


def wrong() -> dict[str, tuple[Any, str]]:
    good = encoded(picture())
    huge = encoded(PIL.Image.new("1", (8000, 8000)))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    return {
        "a path": ("/etc/hostname", "the image is no base64"),
        "an address": ("http://localhost/a.png", "the image is no base64"),
        "a file's address": ("file:///etc/hostname", "the image is no base64"),
        "no base64": ("*", "the image is no base64"),
        "no text": (3, "image is 3"),
        "a list": ([text(good)], "image is"),
        "no picture": (text(b"hello"), "cannot read the image"),
        "cut": (text(good[:-2000]), "cannot read the image"),
        "huge": (text(huge), "the image has 8000x8000 pixels"),
        "a program": (text(postscript), "cannot read the image"),
        "an SVG": (text(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "cannot read the image"),
    }


@pytest.mark.parametrize(("value", "message"), wrong().values(), ids=wrong())
def test_wrong_pictures(idle: Client, value: Any, message: str) -> None:
    answer = idle.post("/v1/jobs", {**SMALL, "image": value})
    assert answer.status == 422 and message in answer.json["error"] and answer.json["hint"], answer.body
    answer = idle.post("/sdapi/v1/img2img", {**SMALL, "init_images": [value]})
    assert answer.status == 422 and answer.json["hint"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"strength": 0}, "strength is 0"),
        ({"strength": "half"}, "strength is 'half'"),
        ({"mask": "*"}, "the mask is no base64"),
        ({"mask": text(encoded(PIL.Image.new("L", (64, 32))))}, "the mask is black everywhere"),
        ({"image": None, "strength": 0.5}, "a strength was given, but no image"),
        ({"image": None, "mask": text(encoded(picture()))}, "a mask was given, but no image"),
    ],
)
def test_wrong_masks_and_strengths(idle: Client, more: dict[str, Any], message: str) -> None:
    answer = idle.post("/v1/jobs", {**SMALL, "image": text(encoded(picture())), **more})
    assert answer.status == 422 and message in answer.json["error"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"prompt": "a house"}, "there is no image"),
        ({"image": encoded(picture())}, "there is no prompt"),
        ({"prompt": "a house", "image": "text"}, "cannot read the image"),
        ({"prompt": b"a house", "image": encoded(picture())}, "prompt is a file"),
        ({"prompt": "a house", "image": encoded(picture()), "image[]": encoded(picture())}, "several fields"),
        ({"prompt": "a house", "image": encoded(picture()), "n": "two"}, "n is 'two'"),
        ({"prompt": "a house", "image": encoded(picture()), "mask": encoded(picture())}, "mask has no alpha"),
    ],
)
def test_wrong_forms(idle: Client, parts: dict[str, str | bytes], message: str) -> None:
    body, kind = form(parts)
    answer = idle.ask("POST", EDITS, body, {"Content-Type": kind})
    assert answer.status == 400 and message in answer.json["error"]["message"], answer.body


def test_broken_forms(idle: Client) -> None:
    body, kind = form({"prompt": "a house", "image": encoded(picture())})
    for broken, header in (
        (body, "multipart/form-data"),
        (body, "multipart/form-data; boundary=other"),
        (body[:-20], kind),
        (b"", kind),
        (b"\r\n" * 1000, kind),
        (form({f"field{number}": "a" for number in range(200)})[0], kind),
        (form({"prompt": "a" * (2 << 20)})[0], kind),
    ):
        assert idle.ask("POST", EDITS, broken, {"Content-Type": header}).status == 400, broken[:50]


def test_numbers_that_are_texts(idle: Client) -> None:
    """A form has no types: a prompt of digits stays one."""
    body, kind = form({"prompt": "1984", "n": "2", "seed": "7", "steps": "2", "image": encoded(picture())})
    answer = idle.ask("POST", EDITS, body, {"Content-Type": kind}).json["data"]
    assert [entry["seed"] for entry in answer] == [7, 8]


def test_pixels_are_let_go(service: Service) -> None:
    """A finished job is kept for a while, what it started from is not."""
    job = service.submit(Fields({**SMALL, "image": text(encoded(picture()))}).job(service.known))
    assert job.wait(60) and job.state == "done" and job.request.image is None


def test_variations_of_a_picture(torch_server: Client) -> None:
    """One of ours is drawn again with other noise, any other by a prompt from itself."""
    module = pytest.importorskip("openai")
    client = module.OpenAI(base_url=f"{torch_server.url}/v1", api_key="none", max_retries=0)
    ours = torch_server.post("/v1/images/generations", {**SMALL, "size": "64x32"}).json["data"][0]["b64_json"]
    file = ("a.png", base64.b64decode(ours), "image/png")
    near = client.images.create_variation(image=file, n=2, extra_body={"variation_seed": 50})
    opened = [PIL.Image.open(io.BytesIO(base64.b64decode(entry.b64_json))) for entry in near.data]
    made = [metadata_of(image) or {} for image in opened]
    assert [(entry["seed"], entry["variation"]) for entry in made] == [(7, [[50, 0.2]]), (7, [[51, 0.2]])]
    other = ("a.png", encoded(picture()), "image/png")
    with pytest.raises(module.BadRequestError, match="there is no prompt"):
        client.images.create_variation(image=other)
    (drawn,) = client.images.create_variation(image=other, extra_body={"prompt": "a house", "steps": 2}).data
    made = metadata_of(PIL.Image.open(io.BytesIO(base64.b64decode(drawn.b64_json)))) or {}
    assert made["strength"] == 0.3 and "variation" not in made
    with pytest.raises(module.BadRequestError, match="variations is 11"):
        client.images.create_variation(image=file, n=11)


@pytest.mark.parametrize(
    "charset", ["punycode", '"idna"', "latin-1", "utf-8; charset=punycode", "*=utf-8''puny%63ode"]
)
def test_a_form_in_another_encoding_is_refused(idle: Client, charset: str) -> None:
    """Some take hours to decode a megabyte."""
    body, kind = form({"prompt": "a" * 1_000_000, "image": b""})
    joined = charset if charset.startswith("*") else f"={charset}"
    answer = idle.ask("POST", EDITS, body, {"Content-Type": f"{kind}; Charset{joined}"})
    assert answer.status == 400 and "UTF-8" in answer.json["error"]["message"]


def test_a_form_that_says_utf_8_is_read(idle: Client) -> None:
    body, kind = form({"prompt": "a"})
    answer = idle.ask("POST", EDITS, body, {"Content-Type": f'{kind}; charset="UTF-8"'})
    assert "there is no image" in answer.json["error"]["message"]
