"""Pictures in requests: edits, image to image and jobs draw what the command draws, or say what is wrong."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from serving import MODEL, SMALL, Client, until

from sana_edge.cli.main import main
from sana_edge.serve.http import MAX_PICTURES_BODY

FORM = "multipart/form-data"
EDITS, REDRAW = "/v1/images/edits", "/sdapi/v1/img2img"
MORE = {key: SMALL[key] for key in ("seed", "steps", "exact_size")}


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> bytes:
    noise = np.random.default_rng(3).integers(0, 256, (4, 3, 3), dtype=np.uint8)
    return _png(np.asarray(PIL.Image.fromarray(noise).resize((96, 64), PIL.Image.Resampling.BICUBIC)))


@pytest.fixture(scope="module")
def half() -> bytes:
    """White where it is drawn anew."""
    mask = np.zeros((64, 96), np.uint8)
    mask[:, 64:] = 255
    return _png(mask)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _pixels(data: bytes) -> Any:
    return np.asarray(PIL.Image.open(io.BytesIO(data)))


def test_every_face_draws_what_the_command_draws(
    real: Client, photo: bytes, half: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photo.png").write_bytes(photo)
    (tmp_path / "mask.png").write_bytes(half)
    monkeypatch.chdir(tmp_path)
    given = ["generate", SMALL["prompt"], "--model", MODEL, "--seed", "7", "--steps", "2", "--exact-size"]
    given += ["--backend", "onnxruntime", "--image", "photo.png", "--mask", "mask.png", "--strength", "0.9"]
    assert main([*given, "--output", "a.png"]) == 0
    expected = (tmp_path / "a.png").read_bytes()
    assert np.array_equal(_pixels(expected)[:, :64], _pixels(photo)[:, :64])
    assert not np.array_equal(_pixels(expected)[:, 64:], _pixels(photo)[:, 64:])

    automatic = {"init_images": [_base64(photo)], "denoising_strength": 0.9, "mask": _base64(half)}
    answer = real.post(REDRAW, {**SMALL, **automatic}).json
    assert base64.b64decode(answer["images"][0]) == expected
    inverted = {**automatic, "mask": _base64(_png(255 - _pixels(half))), "inpainting_mask_invert": 1}
    assert real.post(REDRAW, {**SMALL, **inverted}).json["images"] == answer["images"]

    asked = {**SMALL, "image": f"data:image/png;base64,{_base64(photo)}", "mask": _base64(half)}
    job = real.post("/v1/jobs", {**asked, "strength": 0.9}).json["id"]
    until(lambda: real.get(f"/v1/jobs/{job}").json["state"] == "done")
    assert real.get(f"/v1/pictures/{job}/0").body == expected


def test_edits_of_the_clients_library(real: Client, photo: bytes, half: bytes) -> None:
    module = pytest.importorskip("openai", reason="openai is not installed")
    client = module.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0)
    clear = np.full((64, 96, 4), 255, np.uint8)
    clear[:, 64:, 3] = 0
    files = {"image": ("a.png", photo), "mask": ("m.png", _png(clear))}
    edited = client.images.edit(prompt="a red house", n=2, **files, extra_body=MORE).data
    masked = _pixels(base64.b64decode(edited[0].b64_json))
    assert len(edited) == 2 and np.array_equal(masked[:, :64], _pixels(photo)[:, :64])
    assert not np.array_equal(masked[:, 64:], _pixels(photo)[:, 64:])
    stream = client.images.edit(
        prompt="a red house", image=photo, stream=True, partial_images=1, extra_body={**MORE, "strength": 1}
    )
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]
    client.close()


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (EDITS, {"prompt": "a house"}, "there is no image"),
        (EDITS, {"prompt": "a house", "image": "/etc/passwd"}, "image is no picture in base64"),
        (EDITS, {"prompt": "a house", "image": "https://example.com/a.png"}, "image is no picture in base64"),
        (EDITS, {"prompt": "a house", "image": [1]}, "image is no picture in base64"),
        (EDITS, {"prompt": "a house", "image": "aGVsbG8="}, "cannot read the image"),
        (EDITS, {"prompt": "a house", "image": "PHOTO", "mask": "PHOTO"}, "the mask is transparent nowhere"),
        (EDITS, {"prompt": "a house", "image": "PHOTO", "mask": "aGVsbG8="}, "cannot read the mask"),
        (EDITS, {"prompt": "a house", "image": "PHOTO", "strength": 3}, "strength is 3"),
        (REDRAW, {"prompt": "a house"}, "init_images is null"),
        (REDRAW, {"prompt": "a house", "init_images": "PHOTO"}, "init_images is"),
        (REDRAW, {"prompt": "a house", "init_images": ["PHOTO", "PHOTO"]}, "init_images is 2 pictures"),
        (REDRAW, {"prompt": "a house", "init_images": ["../a.png"]}, "init_images is no picture in base64"),
        (REDRAW, {"prompt": "a house", "init_images": ["PHOTO"], "denoising_strength": 0}, "strength is 0"),
        ("/v1/jobs", {"prompt": "a house", "image": 5}, "image is no picture in base64"),
        ("/v1/jobs", {"prompt": "a house", "strength": 0.5}, "a strength was given, but no image"),
    ],
)
def test_what_is_refused(idle: Client, photo: bytes, path: str, body: Any, message: str) -> None:
    sent = json.dumps(body).replace("PHOTO", _base64(photo)).encode()
    answer = idle.ask("POST", path, sent)
    assert answer.status in (400, 422)
    error = answer.json["error"]
    assert (error["message"] if isinstance(error, dict) else error).startswith(message)


def _form(parts: list[tuple[str, bytes]], boundary: bytes = b"xx") -> bytes:
    lines = [
        b'--%s\r\ncontent-disposition: form-data; name="%s"; filename="a"\r\n\r\n%s\r\n'
        % (boundary, name.encode(), value)
        for name, value in parts
    ]
    return b"".join(lines) + b"--%s--\r\n" % boundary


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (b"no form", f"{FORM}; boundary=xx", "this is no form"),
        (b"--xx\r\nbad", f"{FORM}; boundary=xx", "there is no image"),
        (_form([("image", b"x")]), FORM, "this is no form"),
        (_form([("image", b"x"), ("image", b"y")]), f"{FORM}; boundary=xx", "there is more than one image"),
        (_form([("image[]", b"x")] * 20), f"{FORM}; boundary=xx", "this is no form"),
        (_form([("image", b"x")]), f"{FORM}; boundary=xx", "there is no prompt"),
    ],
)
def test_odd_forms(idle: Client, body: bytes, kind: str, message: str) -> None:
    answer = idle.ask("POST", EDITS, body, {"content-type": kind})
    assert answer.status == 400 and answer.json["error"]["message"].startswith(message)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_or_bytes(idle: Client, photo: bytes) -> None:
    bomb = io.BytesIO()
    PIL.Image.new("1", (12_000, 10_000)).save(bomb, "PNG")
    asked = {"prompt": "a house", "image": _base64(bomb.getvalue())}
    assert "has 12000x10000 pixels" in idle.post(EDITS, asked).json["error"]["message"]
    large = b'{"prompt": "%s"}' % (b"a" * MAX_PICTURES_BODY)
    assert idle.ask("POST", EDITS, large).status == 413
    assert idle.ask("POST", "/v1/images/generations", large).status == 413
