"""The judge of `benchmarks/quality.py` on true scenes, on spoilt ones, and on what is no object."""

from __future__ import annotations

import io
import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from judge.shapes import judge
from sana_edge.evaluate.judge.prompts import Detection, relations
from sana_edge.training.layout import RADII, SLOTS, arrange, draw_scene, held_out
from sana_edge.training.scenes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    SUPERSAMPLE,
    Scene,
    Thing,
    backdrop,
    render,
    shade,
)

Pixels = NDArray[np.uint8]


def found(pixels: Pixels) -> list[tuple[str, str]]:
    return sorted((d.kind, d.colour) for d in judge(pixels).detections)


def facts(scene: Scene) -> list[tuple[str, str]]:
    return sorted((thing.kind, thing.colour) for thing in scene.things)


def right(scene: Scene, pixels: Pixels) -> bool:
    """Background, kinds, colours, counts, places and relation."""
    result = judge(pixels)
    if result.background != scene.background or len(result.detections) != len(scene.things):
        return False
    matched: list[Detection] = []
    for thing in scene.things:
        near = [d for d in result.detections if abs(d.x - thing.x) < 0.02 and abs(d.y - thing.y) < 0.02]
        if [(d.kind, d.colour) for d in near] != [(thing.kind, thing.colour)]:
            return False
        matched += near
    return scene.relation is None or scene.relation in relations(matched[0], matched[1])


def degraded(image: Image.Image, rng: random.Random) -> Pixels:
    """Soft, noisy, off in colour and badly compressed."""
    noise = np.random.default_rng(rng.randrange(2**32))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 2.0)))
    pixels = np.asarray(image) + noise.uniform(-8, 8, size=3) + 8 * noise.normal(size=(*image.size, 3))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=40)
    return np.asarray(Image.open(buffer))


def scenes(count: int, seed: int, held: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    drawn: list[Scene] = []
    while len(drawn) < count:
        scene = draw_scene(rng)
        if not held or held_out().holds(scene):
            drawn.append(scene)
    return drawn


few_and_many = pytest.mark.parametrize("count", [25, pytest.param(150, marks=pytest.mark.slow)])


@few_and_many
@pytest.mark.parametrize("held", [False, True], ids=["any", "held-out"])
def test_true_scenes(count: int, held: bool) -> None:
    verdicts = [right(scene, np.asarray(render(scene))) for scene in scenes(count, 1, held)]
    assert np.mean(verdicts) >= 0.98


@few_and_many
def test_degraded_scenes(count: int) -> None:
    rng = random.Random(3)
    verdicts = [right(scene, degraded(render(scene), rng)) for scene in scenes(count, 3)]
    assert np.mean(verdicts) >= 0.96


def test_wide_neighbours_of_one_colour() -> None:
    rng = random.Random(4)
    for kind in ("boat", "house", "fish"):
        scene = arrange([Thing(kind, "red", "medium", 0, 0, 0)] * 2, "sea", "left of", rng)
        # so close that their outlines touch
        left, other = scene.things
        gap = other.x - left.x - left.radius - other.radius
        touching = replace(scene, things=(replace(left, x=left.x + gap), other))
        assert found(np.asarray(render(touching))) == [(kind, "red")] * 2


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_background(background: str) -> None:
    result = judge(np.asarray(backdrop(background, 256)))
    assert (result.background, result.detections) == (background, ())


def test_twice_the_size() -> None:
    scene = scenes(1, 5)[0]
    assert right(scene, np.asarray(render(scene, 512)))


def test_other_object_in_one_place_is_seen() -> None:
    rng = random.Random(6)
    for scene in scenes(6, 6):
        kinds = [k for k in KINDS if k not in {t.kind for t in scene.things}]
        changed = replace(scene.things[-1], kind=rng.choice(kinds))
        other = replace(scene, things=(*scene.things[:-1], changed))
        assert found(np.asarray(render(other))) == facts(other) != facts(scene)


def test_swapped_colours_are_seen() -> None:
    rng = random.Random(7)
    cat, star = Thing("cat", "pink", "medium", 0, 0, 0), Thing("star", "purple", "medium", 0, 0, 0)
    scene = arrange([cat, star], "meadow", "above", rng)
    first, second = scene.things
    swapped = (replace(first, colour=second.colour), replace(second, colour=first.colour))
    assert found(np.asarray(render(scene))) == [("cat", "pink"), ("star", "purple")]
    assert found(np.asarray(render(replace(scene, things=swapped)))) == [("cat", "purple"), ("star", "pink")]


def blob(rng: random.Random) -> list[tuple[float, float]]:
    waves = [(rng.uniform(0, 0.3) / k, rng.uniform(0, 2 * math.pi), k) for k in range(1, 6)]
    turns = [2 * math.pi * i / 96 for i in range(96)]
    reach = [0.85 * (1 + sum(a * math.cos(k * t + p) for a, p, k in waves)) for t in turns]
    return [(r * math.cos(t), r * math.sin(t)) for r, t in zip(reach, turns, strict=True)]


def disc(rng: random.Random) -> list[tuple[float, float]]:
    stretch = rng.uniform(0.8, 1.25)
    turns = [2 * math.pi * i / 96 for i in range(96)]
    return [(0.8 * stretch * math.cos(t), 0.8 / stretch * math.sin(t)) for t in turns]


def box(rng: random.Random) -> list[tuple[float, float]]:
    stretch = rng.uniform(0.8, 1.25)
    return [(x * stretch * 0.8, y / stretch * 0.8) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_shapes_are_no_objects(count: int) -> None:
    """Patches in the colours, sizes and places of objects: hardly any may be taken for one.

    Some blobs have a balloon's outline, and its string does not show at night.
    """
    rng = random.Random(8)
    side = 256 * SUPERSAMPLE
    shapes = mistaken = 0
    for shape, outline in itertools.product((blob, disc, box), (False, True)):
        for _ in range(count):
            image = backdrop(rng.choice(BACKGROUNDS), side).copy()
            draw = ImageDraw.Draw(image)
            form = rng.choice(list(SLOTS))
            for x, y in SLOTS[form]:
                colour = COLOURS[rng.choice(list(COLOURS))]
                reach = RADII[form] * rng.uniform(0.8, 1.1)
                spots = [((x + reach * a) * side, (y + reach * b) * side) for a, b in shape(rng)]
                draw.polygon(spots, fill=colour)
                if outline:
                    draw.line([*spots, *spots[:2]], fill=shade(colour, 0.66), width=10, joint="curve")
            shapes += len(SLOTS[form])
            mistaken += len(judge(np.asarray(image.reduce(SUPERSAMPLE))).detections)
    assert mistaken <= 0.05 * shapes


def test_two_drawings_in_one_are_neither() -> None:
    scene = Scene("plain", (Thing("house", "red", "medium", 0.5, 0.5, 0.29),))
    other = replace(scene, things=(replace(scene.things[0], kind="fish"),))
    assert found(np.asarray(Image.blend(render(scene), render(other), 0.5))) == []


@pytest.mark.parametrize(
    "pixels", [np.zeros((256, 128, 3), np.uint8), np.zeros((64, 64, 3), np.uint8), np.zeros((256, 256, 3))]
)
def test_other_arrays_are_refused(pixels: Pixels) -> None:
    with pytest.raises(ValueError, match="a picture must be"):
        judge(pixels)
