"""Variations: pictures near one, by noise mixed into its own or from itself, each made again by its file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import SanaPipeline
from numpy.typing import NDArray

from sana_edge import InvalidInput, Sana, read_metadata
from sana_edge.cli.main import main
from sana_edge.engines.noise import NoiseSource
from sana_edge.noise.variations import varied
from sana_edge.request.bounds import MAX_SEED
from sana_edge.request.request import Request
from sana_edge.store.known_models import BUNDLED

PROMPT = "a red house left of a yellow star"
SMALL: dict[str, Any] = {"steps": 2, "size": (64, 64)}
GRAPHS = "sana-tiny-int8-onnx"


@pytest.fixture(scope="module")
def sana(tiny_folder: Path) -> Iterator[Sana]:
    with Sana.load(str(tiny_folder)) as sana:
        yield sana


def source(seed: int) -> Callable[[], NDArray[np.float32]]:
    noise = NoiseSource(seed)
    return lambda: noise.normal((1, 32, 8, 8))


def test_the_noise_between_two() -> None:
    """Its variance is that of noise, and its correlation to the first the cosine of the angle."""
    first, other = source(7)(), source(8)()
    for strength in (0.05, 0.2, 0.5, 0.9):
        mixed = varied(source, 7, [(8, strength)])()
        # 2048 numbers: the standard error of a deviation of 1 is 1.6 %, of a correlation 2.2 %; four of each
        assert abs(mixed.std() - 1) < 0.064
        expected = np.cos(strength * np.pi / 2)
        assert abs(np.corrcoef(mixed.ravel(), first.ravel())[0, 1] - expected) < 0.088
    assert np.abs(varied(source, 7, [(8, 1.0)])() - other).max() < 1e-6
    # of the same seed, also where it differs in bits that the generator does not have
    for same in (7, 7 + (1 << 32)):
        assert np.array_equal(varied(source, 7, [(same, 0.5)])(), first)
    draw = varied(source, 7, [(8, 0.3), (9, 0.3)])
    assert not np.array_equal(draw(), varied(source, 7, [(9, 0.3)])()) and not np.array_equal(draw(), draw())


def test_equals_diffusers_from_that_noise(sana: Sana, tiny_folder: Path) -> None:
    a, b = (torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8))
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    latents = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
    pipeline = SanaPipeline.from_pretrained(tiny_folder)
    pipeline.set_progress_bar_config(disable=True)
    (expected,) = pipeline(
        PROMPT, latents=latents, num_inference_steps=4, width=128, height=128, use_resolution_binning=False
    ).images
    image = sana.generate(PROMPT, seed=7, steps=4, variation=[(8, 0.3)])
    assert np.asarray(expected).std() > 10
    assert np.abs(image.pixels.astype(int) - np.asarray(expected)).max() <= 1


def test_each_is_made_again_and_varied_further(sana: Sana) -> None:
    images = sana.generate(PROMPT, seed=7, variations=2, variation_strength=0.3, **SMALL)
    assert [image.metadata["variation"] for image in images] == [[[8, 0.3]], [[9, 0.3]]]
    assert [image.seed for image in images] == [7, 7]
    for image in images:
        assert sana.generate(**image.metadata).png() == image.png()
    further = sana.generate(**images[1].metadata, variations=2, variation_seed=50)
    assert [image.metadata["variation"] for image in further] == [
        [[9, 0.3], [50, 0.2]],
        [[9, 0.3], [51, 0.2]],
    ]
    assert sana.generate(**further[1].metadata).png() == further[1].png()
    pictures = [sana.generate(PROMPT, seed=7, **SMALL), *images, *further]
    assert len({picture.pixels.tobytes() for picture in pictures}) == 5
    # a whole list of one, and none without being asked for
    assert len(sana.generate(PROMPT, variations=1, **SMALL)) == 1
    assert "variation" not in pictures[0].metadata


def test_nearer_noise_gives_a_nearer_picture() -> None:
    with Sana.load("sana-tiny", threads=1) as sana:
        options: dict[str, Any] = {"steps": 4, "size": (128, 128), "exact_size": True}
        first = sana.generate(PROMPT, seed=7, **options).pixels.astype(float)
        differences = [
            np.abs(sana.generate(PROMPT, seed=7, variation=[(8, s)], **options).pixels - first).mean()
            for s in (0.02, 0.2, 1.0)
        ]
        assert 0 < differences[0] < differences[1] < differences[2]
        other = sana.generate(PROMPT, seed=8, **options).pixels
        last = sana.generate(PROMPT, seed=7, variation=[(8, 1)], **options).pixels
        assert np.abs(last.astype(int) - other).max() <= 1


def test_sprint_from_one_to_the_other(tiny_sprint_folder: Path) -> None:
    """The noise of each of its steps is mixed: at 1 the picture is the other seed's."""
    with Sana.load(tiny_sprint_folder) as sprint:
        options: dict[str, Any] = {"steps": 4, "size": (64, 96)}
        other = sprint.generate(PROMPT, seed=8, **options).pixels
        last = sprint.generate(PROMPT, seed=7, variation=[(8, 1)], **options).pixels
        assert np.abs(last.astype(int) - other).max() <= 1


def test_near_an_image(sana: Sana) -> None:
    """From itself by a small strength; the picture that a strength makes of it by its noise."""
    photo = np.asarray(PIL.Image.linear_gradient("L").resize((96, 64)).convert("RGB"))
    near = sana.generate(PROMPT, image=photo, variations=2, seed=3, steps=4)
    assert [(image.seed, image.metadata["strength"]) for image in near] == [(3, 0.3), (4, 0.3)]
    alone = sana.generate(PROMPT, image=photo, strength=0.3, seed=4, steps=4)
    assert near[1].png() == alone.png()
    again = sana.generate(PROMPT, image=photo, strength=0.6, variations=1, seed=3, steps=4)[0]
    assert again.metadata["variation"] == [[4, 0.2]] and again.metadata["strength"] == 0.6
    assert not np.array_equal(again.pixels, sana.generate(PROMPT, image=photo, seed=3, steps=4).pixels)


SLOW = [pytest.mark.slow, pytest.mark.ci]


@pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("openvino", marks=SLOW)])
def test_engines(backend: str) -> None:
    """INT8 graphs draw near what INT8 torch does, and each again byte for byte."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    small = {"steps": 2, "size": (64, 96), "exact_size": True}
    options: dict[str, Any] = {"seed": 7, "variation_strength": 0.4, **small}
    with Sana.load(BUNDLED / GRAPHS, backend=backend, threads=1) as engine:
        first, second = engine.generate(PROMPT, variations=2, **options)
        assert engine.generate(**second.metadata).png() == second.png()
    with Sana.load("sana-tiny", int8=True, device="cpu", threads=1) as torch_int8:
        expected = torch_int8.generate(PROMPT, variations=2, **options)
    for image, other in zip((first, second), expected, strict=True):
        difference = np.abs(image.pixels.astype(float) - other.pixels).mean()
        # rounding of INT8 and bf16 moves pixels by a few levels, other noise by tens
        assert difference < 8 < np.abs(first.pixels.astype(float) - second.pixels).mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"variations": value}, "variations is") for value in (0, -1, 1.5, "2", True, 10**9)),
        *(
            ({"variations": 2, "variation_strength": value}, "variation strength is")
            for value in (0, 1.1, "x")
        ),
        ({"variations": 2, "variation_strength": float("nan")}, "variation strength is nan"),
        *(({"variations": 2, "variation_seed": value}, "variation seed is") for value in (-1, 0.5, MAX_SEED)),
        ({"variations": 2, "images": 2}, "images is 2 and variations is 2"),
        ({"variation_strength": 0.2}, "a variation strength was given, but no variations"),
        ({"variation_seed": 2}, "a variation seed was given, but no variations"),
        ({"variation": "x"}, "variation is 'x'"),
        ({"variation": [8, 0.2]}, "variation is"),
        ({"variation": [[8]]}, "variation is"),
        ({"variation": [[8, 2]]}, "variation strength is 2"),
        ({"variation": [["8", 0.2]]}, "variation seed is '8'"),
        ({"variation": [[8, 0.1]] * 17}, "variation is"),
        ({"variation": [[MAX_SEED, 0.1]], "images": 2}, "variation seed is"),
        ({"variations": 1, "seed": MAX_SEED}, "variation seed is"),
        ({"variations": 1, "seed": "x"}, "seed is 'x'"),
    ],
    ids=str,
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace("[", r"\[")) as error:
        Request(PROMPT, **options)
    assert error.value.hint


def test_the_command(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(tiny_folder)]
    start = ["generate", "a house", "--seed", "7", "--steps", "1", "--size", "64x64", *model]
    assert main([*start, "--variations", "2", "--output", "{seed}.png"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7-8.png", "7-9.png"]
    assert main(["generate", "--from", "7-9.png", *model, "--output", "again.png"]) == 0
    assert Path("again.png").read_bytes() == Path("7-9.png").read_bytes()
    further = [
        "--variations",
        "2",
        "--variation-strength",
        "0.1",
        "--variation-seed",
        "3",
        "--output",
        "a.png",
    ]
    assert main(["generate", "--from", "7-9.png", *model, *further]) == 0
    assert read_metadata("a-7-9-4.png")["variation"] == [[9, 0.2], [4, 0.1]]
    capsys.readouterr()
    for wrong in (
        ["--variations", "0"],
        ["--variation-strength", "0.2"],
        ["--variations", "2", "--images", "2"],
    ):
        assert main([*start, *wrong]) == 1
    assert main([*start, "--variations", "2", "--output", "-"]) == 1
    assert "is one picture, not 2" in capsys.readouterr().err


def test_a_stranger_s_file_asks_for_no_more(tmp_path: Path, sana: Sana) -> None:
    image = sana.generate(PROMPT, seed=7, **SMALL)
    image.metadata.update(variations=9, images=9, variation_strength=0.5, variation_seed=3)
    image.save(tmp_path / "a.png")
    assert not {"variations", "images", "variation_strength"} & read_metadata(tmp_path / "a.png").keys()
