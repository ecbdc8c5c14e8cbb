"""Pictures in: what people bring as pixels, and image to image and inpainting against diffusers' parts."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaSprintImg2ImgPipeline
from numpy.typing import NDArray
from safetensors.torch import save_file

from sana_edge import Image, InvalidInput, Sana
from sana_edge.decoding import resize_and_crop
from sana_edge.errors import CheckpointError
from sana_edge.image import read_metadata
from sana_edge.init_image import InitImage, read_image, read_mask, under
from sana_edge.prompt import CHI
from sana_edge.request.request import Request
from sana_edge.store import package
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.weights import load_state

PROMPT = "a red house left of a yellow star"
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def sana(tiny_folder: Path) -> Iterator[Sana]:
    with Sana.load(str(tiny_folder)) as sana:
        yield sana


@pytest.fixture(scope="module")
def photo() -> Pixels:
    """Blobs of colour, 160x96."""
    noise = np.random.default_rng(3).integers(0, 256, (6, 10, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(noise).resize((160, 96), PIL.Image.Resampling.BICUBIC))


def same(ours: Pixels, theirs: Pixels) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 10
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("steps", "strength", "size"), [(2, 0.5, None), (2, 1.0, None), (5, 0.7, (128, 96)), (4, 0.26, (64, 64))]
)
def test_sprint_equals_diffusers(
    tiny_sprint_folder: Path, photo: Pixels, steps: int, strength: float, size: tuple[int, int] | None
) -> None:
    width, height = size or (160, 96)
    pipeline = SanaSprintImg2ImgPipeline.from_pretrained(tiny_sprint_folder)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        PROMPT,
        image=PIL.Image.fromarray(photo),
        strength=strength,
        num_inference_steps=steps,
        **({} if steps == 2 else {"intermediate_timesteps": None}),
        guidance_scale=3.0,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(7),
        use_resolution_binning=False,
    ).images
    with Sana.load(tiny_sprint_folder) as sprint:
        options: dict[str, Any] = {"steps": steps, "strength": strength, "guidance": 3.0, "seed": 7}
        image = sprint.generate(PROMPT, image=photo, size=size, **options)
    same(image.pixels, np.asarray(expected))
    assert image.metadata["strength"] == strength and len(image.metadata["image_sha256"]) == 64


@torch.inference_mode()
def reference(
    pipeline: Any, photo: Pixels, steps: int, strength: float, mask: NDArray[np.float32] | None = None
) -> Pixels:
    """SDEdit and inpainting of diffusers' parts, with guidance 4.5 and seed 7."""
    pixels = pipeline.image_processor.preprocess(PIL.Image.fromarray(photo))
    original = pipeline.vae.encode(pixels).latent * pipeline.vae.config.scaling_factor
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    begin = int(steps - steps * strength)
    scheduler.set_begin_index(begin)
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(7))

    def noised(index: int) -> torch.Tensor:
        sigma = scheduler.sigmas[index]
        mixed: torch.Tensor = (1 - sigma) * original + sigma * noise
        return mixed

    prompt, mask_of, negative, negative_mask = pipeline.encode_prompt(
        PROMPT, complex_human_instruction=list(CHI)
    )
    latent = noised(begin)
    part = None if mask is None else torch.from_numpy(mask)
    for index, t in enumerate(scheduler.timesteps[begin:], start=begin):
        unguided, guided = (
            pipeline.transformer(latent, text, t[None], encoder_attention_mask=known).sample
            for text, known in ((negative, negative_mask), (prompt, mask_of))
        )
        latent = scheduler.step(unguided + 4.5 * (guided - unguided), t, latent).prev_sample
        if part is not None:
            latent = part * latent + (1 - part) * noised(index + 1)
    decoded = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    return np.asarray(pipeline.image_processor.postprocess(decoded)[0])


@pytest.mark.parametrize("sampler", ["flow-dpm", "flow-euler"])
@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_image_to_image_is_sdedit(
    sana: Sana, tiny_folder: Path, photo: Pixels, sampler: Any, strength: float
) -> None:
    pipeline = SanaPipeline.from_pretrained(tiny_folder)
    if sampler == "flow-euler":
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = reference(pipeline, photo, 6, strength)
    image = sana.generate(PROMPT, image=photo, strength=strength, steps=6, seed=7, sampler=sampler)
    same(image.pixels, expected)
    assert set(image.timings) == {"text", "encode", "denoise", "decode"}


def test_a_mask_keeps_the_rest(sana: Sana, tiny_folder: Path, photo: Pixels) -> None:
    mask = np.zeros((96, 160), np.uint8)
    mask[40:, 70:] = 255
    cells = np.zeros((1, 1, 3, 5), np.float32)
    cells[..., 1:, 2:] = 1
    expected = reference(SanaPipeline.from_pretrained(tiny_folder), photo, 4, 0.8, cells)
    image = sana.generate(PROMPT, image=photo, mask=mask, strength=0.8, steps=4, seed=7).pixels
    assert np.array_equal(image[mask == 0], photo[mask == 0])
    same(image[40:, 70:], expected[40:, 70:])


def test_previews_and_progress(sana: Sana, photo: Pixels) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"image": photo, "strength": 0.5, "steps": 4, "images": 2, "seed": 1}
    steps = list(sana.stream(PROMPT, on_progress=lambda *told: seen.append(told[1:]), **options))
    assert [(step.index, step.total) for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [step.image is None for step in steps] == [True, False, True, False]
    assert seen[0] == (1, 4) and steps[0].preview().shape == (96, 160, 3)
    first, second = (step.image for step in steps if step.image)
    alone = sana.generate(PROMPT, seed=2, **{k: v for k, v in options.items() if k not in ("images", "seed")})
    assert np.array_equal(second.pixels, alone.pixels) and not np.array_equal(first.pixels, second.pixels)


def test_what_is_cropped_away_lies_around(photo: Pixels) -> None:
    """Drawn in a bucket, then resized and cropped, a picture comes back to where it was."""
    drawn = (160, 128)
    laid = InitImage(photo, 0.5, np.full((96, 160), 255, np.uint8)).at(drawn)[0]
    assert laid.shape == (3, 128, 160) and np.array_equal(under(photo, (160, 96)), photo)
    back = resize_and_crop(laid, (160, 96)).transpose(1, 2, 0)
    # nothing was scaled, so nothing is lost
    assert np.abs((back + 1) * 127.5 - photo).max() < 1e-3


COLOUR = (200, 100, 50)


def _file(folder: Path, name: str, **options: Any) -> Callable[[PIL.Image.Image], Path]:
    def save(image: PIL.Image.Image) -> Path:
        image.save(folder / name, **options)
        return folder / name

    return save


def test_kinds_of_files(tmp_path: Path) -> None:
    plain = PIL.Image.new("RGB", (20, 10), COLOUR)
    exact = {"RGB": plain, "P": plain.convert("P", palette=PIL.Image.Palette.ADAPTIVE)}
    for mode, image in exact.items():
        path = _file(tmp_path, f"{mode}.png")(image)
        for given in (path, str(path), image):
            assert np.array_equal(read_image(given), np.asarray(plain)), mode
    half = PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert set(read_image(half).ravel()) == {127}, "on white"
    assert set(read_image(PIL.Image.new("L", (4, 4), 9)).ravel()) == {9}
    assert set(read_image(np.full((4, 4), 9, np.uint8)).ravel()) == {9}
    deep = np.full((4, 4), 0x8080, np.uint16)
    assert set(read_image(_file(tmp_path, "deep.png")(PIL.Image.fromarray(deep))).ravel()) == {0x80}
    cmyk = read_image(_file(tmp_path, "c.jpg", quality=100)(plain.convert("CMYK")))
    assert np.abs(cmyk.astype(int) - COLOUR).max() <= 4, "of the JPEG"
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    assert read_image(_file(tmp_path, "turned.jpg", exif=exif)(plain)).shape == (20, 10, 3)


def test_an_animation_says_that_its_first_picture_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]
    assert "the first one is taken" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "the image is of type int"),
        (b"\x89PNG", "cannot read the image"),
        (np.zeros((4, 4, 3)), "the image is an array 4x4x3 of float64"),
        (np.zeros((4, 4, 5), np.uint8), "the image is an array 4x4x5 of uint8"),
        (np.zeros((0, 4, 3), np.uint8), "the image is an array 0x4x3 of uint8"),
        ("missing.png", "image missing.png does not exist"),
        (__file__, "cannot read the image"),
    ],
)
def test_what_is_no_picture(given: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        Request(PROMPT, image=given)


@pytest.mark.parametrize("cut", [10, 60, 200])
def test_a_cut_file(tmp_path: Path, photo: Pixels, cut: int) -> None:
    PIL.Image.fromarray(photo).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:cut])
    with pytest.raises(InvalidInput, match="cannot read the image"):
        read_image(tmp_path / "a.png")


def test_masks() -> None:
    values = np.zeros((10, 20), np.uint8)
    values[:, 10:] = 1
    for mask in (values, values.astype(bool), values * 255, PIL.Image.fromarray(values * 255)):
        assert np.array_equal(read_mask(mask, (20, 10)), values * 255)
    assert read_mask(values * 255, (40, 20)).shape == (20, 40)
    with pytest.raises(InvalidInput, match="black everywhere"):
        read_mask(values * 0, (20, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones((4, 4), np.uint8)}, "a mask was given, but no image"),
        ({"strength": 0.5}, "a strength was given, but no image"),
        *(
            ({"image": "x", "strength": value}, "strength is")
            for value in (0, -1, 1.1, float("nan"), True, "1")
        ),
        ({"image": np.zeros((9000, 8, 3), np.uint8)}, "size 8x9000 is too large"),
        ({"image": np.zeros((40, 40, 3), np.uint8), "exact_size": True}, "is not a multiple of 32"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Request(PROMPT, **options)


@pytest.mark.parametrize(
    ("steps", "strength", "taken"), [(20, 0.6, 12), (20, 1, 20), (4, 0.1, 1), (2, 1e-20, 1), (1, 0.5, 1)]
)
def test_steps_taken(photo: Pixels, steps: int, strength: float, taken: int) -> None:
    plan = Request(PROMPT, image=photo, strength=strength, steps=steps).plan(128, "flow-dpm")
    assert plan.steps - plan.skip == taken


def test_a_package_of_before_draws_but_not_from_a_picture(tmp_path: Path, photo: Pixels) -> None:
    """It has no encoder."""
    shutil.copytree(BUNDLED / "sana-tiny-int8", tmp_path / "old")
    folder = tmp_path / "old" / "vae"
    (weights,) = folder.glob("*.safetensors")
    save_file({k: v for k, v in load_state(folder).items() if k.startswith("decoder.")}, weights)
    config = json.loads((folder / "config.json").read_text())
    config[package.KEY]["checksum"] = package.checksum(folder)
    (folder / "config.json").write_text(json.dumps(config))
    with Sana.load(tmp_path / "old", device="cpu", backend="torch") as sana:
        options: dict[str, Any] = {"size": (64, 64), "steps": 1, "seed": 1}
        with Sana.load("sana-tiny", int8=True, device="cpu", backend="torch") as new:
            expected = new.generate(PROMPT, **options).pixels
        assert np.array_equal(sana.generate(PROMPT, **options).pixels, expected)
        with pytest.raises(InvalidInput, match="old has no encoder, which an image needs") as caught:
            sana.generate(PROMPT, image=photo, **options)
    assert "quantize" in str(caught.value.hint)


def test_metadata_of_a_stranger_names_no_file(tmp_path: Path, photo: Pixels) -> None:
    """Nor does a picture that starts a program where Pillow opens it."""
    mine, theirs = tmp_path / "mine.png", tmp_path / "theirs.png"
    PIL.Image.fromarray(photo).save(mine)
    options = {"prompt": PROMPT, "version": "0.1.0", "image": str(mine), "mask": str(mine)}
    Image(photo, 1, options).save(theirs)
    assert read_metadata(theirs) == {"prompt": PROMPT, "version": "0.1.0"}
    PIL.Image.fromarray(photo).save(tmp_path / "a.eps")
    with pytest.raises(InvalidInput, match="cannot read the image"):
        read_image(tmp_path / "a.eps")


def test_an_encoder_with_nan_is_refused(tiny_folder: Path, tmp_path: Path, photo: Pixels) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    (weights,) = (tmp_path / "model/vae").glob("*.safetensors")
    state = load_state(tmp_path / "model/vae")
    name = "encoder.conv_out.weight"
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, weights)
    with Sana.load(tmp_path / "model") as sana, pytest.raises(CheckpointError, match=r"conv_out\.weight"):
        sana.generate(PROMPT, image=photo, steps=1)


def tiff(count: int) -> bytes:
    """A picture whose file has so many others after it."""
    entries = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, 1), (279, 4, 1, 1)]
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    size = 2 + len(packed) + 4
    parts = (
        struct.pack("<H", len(entries)) + packed + struct.pack("<I", 8 + size * (i + 1)) for i in range(count)
    )
    return b"II*\0" + struct.pack("<I", 8) + b"".join(parts)


def test_pictures_of_a_file_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a few megabytes may have a hundred thousand."""
    from PIL.TiffImagePlugin import TiffImageFile

    seeks: list[int] = []
    seek = TiffImageFile._seek
    monkeypatch.setattr(TiffImageFile, "_seek", lambda self, frame: (seeks.append(frame), seek(self, frame)))
    assert read_image(tiff(1000)).shape == (1, 1, 3)
    assert len(seeks) < 10


@pytest.mark.filterwarnings("error")
def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 1]], np.float32)).save(tmp_path / "a.tiff")
    assert read_image(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 255, 0, 255]


def test_kinds_that_become_no_mask(tmp_path: Path) -> None:
    """Lab in a TIFF, of which Pillow makes no grey."""
    path = tmp_path / "a.tiff"
    PIL.Image.new("LAB", (8, 8)).save(path)
    assert read_image(path).shape == (8, 8, 3)
    with pytest.raises(InvalidInput, match="cannot read the mask: conversion from LAB"):
        read_mask(path, (8, 8))


@pytest.mark.filterwarnings("error")
def test_pictures_of_many_pixels_are_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PIL.Image.new("1", (9_500, 9_500)).save(path)
    assert read_image(path).shape == (9_500, 9_500, 3)
