"""What is drawn for what is asked, against diffusers: tables, choice, resizing and whole pictures."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

from sana_edge.decoding import resize_and_crop
from sana_edge.errors import InvalidInput
from sana_edge.request.request import Request
from sana_edge.sizes import bucket, resized
from sana_edge.torch_runtime.decoding import resize_and_crop as torch_resize_and_crop

TABLES = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}
SIDES = (*range(1, 40, 7), *range(64, 8193, 271), 1024, 1080, 1920, 3840, 2160, 8192)


@pytest.mark.parametrize("native", TABLES)
def test_the_same_bucket_as_diffusers(native: int) -> None:
    for width, height in product(SIDES, SIDES):
        h, w = PixArtImageProcessor.classify_height_width_bin(height, width, TABLES[native])
        assert bucket(width, height, native) == (w, h), (width, height)


def test_other_models_draw_at_the_next_multiple() -> None:
    assert bucket(1, 1, 256) == (32, 32)
    assert bucket(1920, 1080, 256) == (1920, 1088)
    assert bucket(512, 384, 256) == (512, 384)


@pytest.mark.parametrize("asked", [(1, 1), (7, 3), (64, 64), (61, 93), (300, 20), (33, 500)])
def test_resizing_is_diffusers(asked: tuple[int, int]) -> None:
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    expected = PixArtImageProcessor.resize_and_crop_tensor(pixels, *asked)
    assert torch.equal(torch_resize_and_crop(pixels, asked), expected)
    # positions up to 500 round by 2^-16, times a slope of at most 2 in each direction
    found = resize_and_crop(pixels[0].numpy(), asked)
    np.testing.assert_allclose(found, expected[0].numpy(), rtol=0, atol=2e-4)
    assert found.dtype == np.float32


def test_every_size_is_reached() -> None:
    """Also where factor times side ends just below it, as of 640x480, where diffusers crops to one row."""
    for drawn, asked in product([(1344, 768), (1024, 1024), (704, 1408)], product(SIDES, SIDES)):
        (width, height), (left, top) = resized(drawn, asked)
        assert width >= asked[0] and height >= asked[1] and left >= 0 and top >= 0


def test_plans() -> None:
    plan = Request("a", size=(1920, 1080)).plan(1024, "flow-dpm")
    assert ((plan.width, plan.height), plan.size) == ((1344, 768), (1920, 1080))
    assert plan.metadata()["size"] == [1920, 1080] and "enlarged" in plan.size_notes[0]
    assert Request(**{**plan.metadata(), "size": (1920, 1080)}).plan(1024, "flow-dpm") == plan
    exact = Request("a", size=(1024, 768), exact_size=True).plan(1024, "flow-dpm")
    assert (exact.width, exact.height) == exact.size == (1024, 768) and exact.size_notes == ()
    assert exact.metadata()["exact_size"] is True
    far = Request("a", size=(512, 512), exact_size=True).plan(4096, "flow-dpm")
    assert "far from 4096x4096" in far.size_notes[0]
    small = Request("a", size=(300, 300)).plan(1024, "flow-dpm")
    assert (small.width, small.height) == (1024, 1024) and small.size_notes == ()
    # also of models without buckets, such as a fine-tuned one of 768 px
    near = Request("a", size=(640, 800)).plan(768, "flow-dpm")
    assert near.size_notes == ()
    odd = Request("a", size=(256, 250)).plan(768, "flow-dpm")
    assert "256x256 is far from 768x768" in odd.size_notes[0]
    # a graph of one size draws at that size and no other
    assert Request("a").plan(1024, "flow-dpm", fixed=(768, 512)).size == (768, 512)
    fixed = Request("a", size=(768, 512)).plan(1024, "flow-dpm", fixed=(768, 512))
    assert (fixed.width, fixed.height) == (768, 512)


@pytest.mark.parametrize("size", [(1000, 512), (33, 64)])
def test_an_exact_size_is_a_multiple_of_32(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidInput, match="not a multiple of 32") as caught:
        Request("a", size=size, exact_size=True)
    assert "leave out the exact size" in caught.value.hint


SAMPLES = [
    *((32, 32), (512, 512), (1, 1), (100, 700), (1000, 150), (640, 470), (481, 640), (511, 513)),
    *((1234, 777), (37, 1000)),
]


@pytest.mark.parametrize("kind", ["sana", "sprint"])
def test_the_same_call_gives_the_same_picture(tmp_path: Path, kind: str) -> None:
    """Tiny models that call themselves of 512 px (Sprint: 1024) at ten sizes, with binning on."""
    import diffusers
    import tiny

    from sana_edge import Sana

    write = tiny.write_pipeline if kind == "sana" else tiny.write_sprint_pipeline
    folder = write(tmp_path / "m")
    side = 16 if kind == "sana" else 32
    path = folder / "transformer" / "config.json"
    path.write_text(path.read_text().replace('"sample_size": 4', f'"sample_size": {side}'))
    name = "SanaPipeline" if kind == "sana" else "SanaSprintPipeline"
    theirs = getattr(diffusers, name).from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    with Sana.load(folder) as ours:
        for width, height in SAMPLES:
            generator = torch.Generator().manual_seed(5)
            steps = 1 if kind == "sana" else 2
            expected = theirs(
                "a red house", width=width, height=height, num_inference_steps=steps, generator=generator
            ).images[0]
            image = ours.generate("a red house", size=(width, height), steps=steps, seed=5)
            assert image.pixels.shape == (height, width, 3) and expected.size == (width, height)
            difference = np.abs(image.pixels.astype(int) - np.asarray(expected).astype(int))
            assert difference.max() <= 1, (width, height)
