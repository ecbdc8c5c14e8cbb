"""Scenes composed from art: names, colours, split, captions and pictures, with a stand-in for the art."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sana_edge import SanaError
from sana_edge.store.domain import words_of
from sana_edge.training.art import __main__ as command
from sana_edge.training.art import backdrops, captions, catalogue, colours, folder, layout, source
from sana_edge.training.art.scenes import Scene, Thing, render

KINDS = catalogue.kinds()
SAMPLE = 1500


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the art: a disc in a hue of its own for each kind."""
    root = tmp_path_factory.mktemp("art")
    assets = root / source.FOLDERS[0] / "package" / "assets"
    labels = root / source.FOLDERS[1] / "package" / "en"
    assets.mkdir(parents=True)
    labels.mkdir(parents=True)
    for i, kind in enumerate(KINDS.values()):
        image = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(image).ellipse((32, 32, 223, 223), fill=(40 + i, 250 - i, 60, 255))
        image.save(assets / f"{kind.code}.webp", lossless=True)
    rows = [{"hexcode": k.code.upper(), "label": k.name, "tags": list(k.others)} for k in KINDS.values()]
    (labels / "data.json").write_text(json.dumps(rows))
    return root


@pytest.fixture
def drawn(art: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SANA_EDGE_ART", str(art))
    return art


def scenes(count: int = SAMPLE) -> list[Scene]:
    rng = random.Random("test")
    return [layout.draw_scene(rng) for _ in range(count)]


def test_there_are_kinds_and_names_enough() -> None:
    assert len(KINDS) >= 120 and sum(kind.coloured for kind in KINDS.values()) >= 30
    assert len({kind.code for kind in KINDS.values()}) == len(KINDS)
    names = [name for kind in KINDS.values() for name in (kind.name, *kind.others)]
    assert len(set(names)) == len(names), "a name has two meanings"
    assert not set(names) & set(colours.COLOURS)
    assert all(len(kind.emoji) == 1 and words_of(kind.emoji) == [kind.emoji] for kind in KINDS.values())


@pytest.mark.parametrize(
    ("one", "many"),
    [("bus", "buses"), ("puppy", "puppies"), ("toy", "toys"), ("fox", "foxes"), ("car", "cars")],
)
def test_plurals(one: str, many: str) -> None:
    assert catalogue.plural_of(one) == many


def test_every_sort_of_combination_is_held_out_in_its_share() -> None:
    names = list(KINDS)
    pairs = [layout.pair_is_held_out(a, b) for a, b in itertools.combinations(names, 2)]
    # 8778 draws at 0.08: five standard deviations are 0.0145
    assert abs(np.mean(pairs) - layout.SHARES["pairs"]) < 0.0145
    for a, b in itertools.islice(itertools.combinations(names, 2), 200):
        assert layout.pair_is_held_out(a, b) == layout.pair_is_held_out(b, a)
        for relation in layout.RELATIONS:
            told = layout.relation_is_held_out(a, relation, b)
            assert told == layout.relation_is_held_out(b, layout.MIRRORED[relation], a)


def test_training_never_shows_what_is_held_out() -> None:
    found = [layout.holds(scene) for scene in scenes()]
    assert 0.05 < np.mean(found) < 0.6
    assert not any(layout.holds(layout.numbered_scene(i)) for i in range(200))
    assert all(layout.holds(layout.held_out_scene(i)) for i in range(20))
    assert layout.numbered_scene(7) == layout.numbered_scene(7) != layout.numbered_scene(8)


def test_objects_stand_where_the_relation_says_and_inside() -> None:
    for scene in scenes():
        for thing in scene.things:
            assert thing.radius <= thing.x <= 1 - thing.radius or thing.radius > 0.45
            assert thing.radius <= thing.y <= 1 - thing.radius or thing.radius > 0.45
        for a, b in itertools.combinations(scene.things, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.25
        if scene.relation is not None:
            a, b = scene.things
            signs = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
            assert signs[scene.relation] > 0.3


def test_captions_tell_all_that_is_not_a_default() -> None:
    rng = random.Random(1)
    for scene in scenes():
        text = captions.caption(scene, rng)
        words = text.replace(",", " ").split()
        for thing in scene.things:
            kind = KINDS[thing.kind]
            names = (kind.name, kind.plural, kind.emoji, *kind.others, *map(catalogue.plural_of, kind.others))
            heads = [name.split(" of ")[-1] for name in names]
            assert any(name in text for name in heads), (text, kind.name)
            assert not thing.colour or thing.colour in words, text
        assert text == text.lower() and "  " not in text and text == text.strip()


@pytest.mark.parametrize("style", captions.STYLES)
def test_every_style_has_many_wordings(style: str) -> None:
    scene, rng = layout.numbered_scene(3), random.Random(2)
    assert len({captions.caption(scene, rng, style) for _ in range(200)}) >= 5


def test_emoji_are_words() -> None:
    scene, rng = Scene("snow", (Thing("fox", "", "medium", 0.5, 0.5, 0.3),)), random.Random(3)
    assert {text.split()[0] for text in (captions.caption(scene, rng, "emoji") for _ in range(20))} == {"🦊"}


@pytest.mark.parametrize("name", backdrops.BACKGROUNDS)
def test_backgrounds_have_forms_and_sizes(name: str) -> None:
    first, other = (backdrops.backdrop(name, 64, variant) for variant in (0, 1))
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    assert (first != other).any() or name in backdrops.PLAINS
    large = backdrops.backdrop(name, 256, 0).reshape(64, 4, 64, 4, 3).mean((1, 3))
    # the same place at another size; stars and hairlines fall between pixels
    assert np.abs(large - first).mean() < 6


def test_hue_saturation_value_and_back() -> None:
    rgb = np.random.default_rng(0).random((9, 7, 3), dtype=np.float32)
    # fp32: six roundings of numbers up to 6
    assert np.abs(colours.join(*colours.split(rgb)) - rgb).max() < 36 * 2**-24


@pytest.mark.parametrize("colour", colours.COLOURS)
def test_recolouring_changes_the_leading_hue_alone(colour: str) -> None:
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :6] = (220, 40, 50, 255)
    pixels[:, 6:] = (40, 90, 220, 128)
    out = np.asarray(colours.recolour(Image.fromarray(pixels, "RGBA"), colour))
    assert (out[..., 3] == pixels[..., 3]).all() and np.abs(out[:, 6:].astype(int) - pixels[:, 6:]).max() <= 1
    hue, saturation, value = (float(v[0, 0]) for v in colours.split(out[..., :3].astype(np.float32) / 255))
    if colour in ("black", "white"):
        assert saturation < 0.3 and (value < 0.4) == (colour == "black")
    else:
        distance = abs((hue - colours.COLOURS[colour][0] + 0.5) % 1 - 0.5)
        assert distance < 0.02 and saturation > 0.35


@pytest.mark.usefixtures("drawn")
def test_a_scene_is_drawn_where_its_objects_are() -> None:
    thing = Thing("fox", "", "medium", 0.3, 0.6, 0.2)
    with_fox = np.asarray(render(Scene("sky", (thing,)), 64)).astype(int)
    without = np.asarray(render(Scene("sky", ()), 64)).astype(int)
    rows, columns = (np.abs(with_fox - without).sum(2) > 30).nonzero()
    assert abs(columns.mean() / 64 - 0.3) < 0.02 and abs(rows.mean() / 64 - 0.6) < 0.02
    assert abs((columns.max() - columns.min()) / 64 - 0.4) < 0.06


def test_missing_art_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SANA_EDGE_ART", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["art"])
    assert command.main() == 1
    said = capsys.readouterr().err
    assert "npm pack @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0" in said


def test_what_was_drawn_before_is_not_another_folders(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene("sky", (Thing("fox", "", "medium", 0.3, 0.6, 0.2),))
    render(scene, 64)
    with pytest.raises(SanaError, match=r"no picture 1ffff.webp"):
        source.picture(source.assets(), "1ffff")
    monkeypatch.setenv("SANA_EDGE_ART", str(tmp_path / "none"))
    with pytest.raises(SanaError, match=r"the art is not in"):
        render(scene, 64)
    with pytest.raises(SanaError, match=r"the labels of the art are not in"):
        source.labels()


@pytest.mark.usefixtures("drawn")
def test_art_that_is_not_whole_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["art"])
    assert command.main() == 1
    assert f"{len(KINDS)} pictures, not {source.PICTURES}" in capsys.readouterr().err
    monkeypatch.setattr(source, "PICTURES", len(KINDS))
    assert command.main() == 0


@pytest.mark.usefixtures("drawn")
def test_scenes_become_an_imagefolder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--output", str(tmp_path), "--count", "6", "--side", "32", "--wrong", "0.5"]
    monkeypatch.setattr(sys, "argv", ["folder", *options])
    folder.main()
    rows = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all(len(row["captions"]) == len(row["wrong"]) == 5 for row in rows)
    assert 5 < sum(sum(row["wrong"]) for row in rows) < 25
    assert Image.open(tmp_path / rows[0]["file_name"]).size == (32, 32)
