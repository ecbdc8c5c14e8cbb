"""The scenes, their held-out split and their captions."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from sana_edge.training.captions import NUMBERS, STYLES, caption, plural
from sana_edge.training.layout import RELATIONS, arrange, draw_scene, held_out, mirrored, training_scene
from sana_edge.training.scenes import BACKGROUNDS, COLOURS, KINDS, Scene, Thing, backdrop, render


def one(kind: str, colour: str, background: str = "plain", x: float = 0.5) -> Scene:
    return Scene(background, (Thing(kind, colour, "medium", x, 0.5, 0.2),))


def test_the_domain_is_as_rich_as_promised() -> None:
    assert len(KINDS) >= 12
    assert len(COLOURS) >= 10
    assert len(BACKGROUNDS) >= 5
    assert len(STYLES) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_shows_most_of_its_colour_and_stays_in_its_box(kind: str) -> None:
    scene = one(kind, "blue")
    pixels = np.asarray(render(scene, 128)).astype(int)
    empty = np.asarray(backdrop("plain", 128 * 3).reduce(3)).astype(int)
    drawn = np.abs(pixels - empty).sum(-1) > 60
    rows, columns = np.nonzero(drawn)
    # half box 0.2 of 128 px, and half an outline of 0.0125
    reach = 0.2 * 128 + 0.0125 * 128 + 1
    assert np.abs(rows - 63.5).max() <= reach
    assert np.abs(columns - 63.5).max() <= reach
    blue = np.abs(pixels - np.array(COLOURS["blue"])).sum(-1) < 90
    assert (blue & drawn).sum() > 0.12 * drawn.sum()


def test_objects_and_backgrounds_all_look_different() -> None:
    pictures = [np.asarray(render(one(kind, "red"), 64)).astype(int) for kind in KINDS]
    pictures += [np.asarray(render(Scene(name, ()), 64)).astype(int) for name in BACKGROUNDS]
    for a, b in itertools.combinations(pictures, 2):
        assert np.abs(a - b).mean() > 1


def test_edges_are_anti_aliased() -> None:
    pixels = np.asarray(render(one("heart", "black"), 128))
    # four colours are drawn: background, fill, outline and highlight
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 12


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_relation_is_what_the_picture_shows(relation: str) -> None:
    things = [Thing(kind, "red", "medium", 0, 0, 0) for kind in ("house", "star")]
    first, second = arrange(things, "plain", relation, random.Random(0)).things
    assert first.kind == "house"
    shown = {
        "left of": first.x < second.x,
        "right of": first.x > second.x,
        "above": first.y < second.y,
        "below": first.y > second.y,
    }
    assert shown[relation]
    assert not shown[mirrored(relation)]


def test_training_never_shows_what_is_held_out() -> None:
    held, rng = held_out(), random.Random(1)
    seen_colours, seen_counts, seen_relations = set(), set(), set()
    for _ in range(3000):
        scene = training_scene(rng)
        kinds = [t.kind for t in scene.things]
        seen_colours |= {(t.kind, t.colour) for t in scene.things}
        assert not any(frozenset(p) in held.pairs for p in itertools.combinations(kinds, 2))
        if len(kinds) > 1 and len(set(kinds)) == 1:
            seen_counts.add((kinds[0], len(kinds)))
        if scene.relation is not None:
            seen_relations.add((kinds[0], scene.relation, kinds[1]))
            seen_relations.add((kinds[1], mirrored(scene.relation), kinds[0]))
    assert not seen_colours & held.colours
    assert not seen_counts & held.counts
    assert not seen_relations & held.relations
    # the split is no excuse: everything else does occur
    assert len(seen_colours) == len(KINDS) * len(COLOURS) - len(held.colours)
    assert len(seen_counts) == 3 * len(KINDS) - len(held.counts)


def test_each_kind_and_colour_is_learnt_in_other_company() -> None:
    for kind in KINDS:
        assert sum(k == kind for k, _ in held_out().colours) <= 2
    for colour in COLOURS:
        assert sum(c == colour for _, c in held_out().colours) <= 4


@pytest.mark.parametrize("style", STYLES)
def test_captions_tell_the_facts(style: str) -> None:
    rng = random.Random(style)
    for _ in range(200):
        scene = draw_scene(rng)
        text = caption(scene, rng, style)
        assert text == text.lower().strip()
        kinds = {t.kind for t in scene.things}
        for kind in kinds:
            assert kind in text
        if len(scene.things) > 1 and len(kinds) == 1:
            assert NUMBERS[len(scene.things)] in text
            assert plural(scene.things[0].kind) in text
        if style != "plain":
            assert all(t.colour in text for t in scene.things)
        if len(kinds) == len(scene.things) and scene.relation is None:
            # order of telling is order of place
            positions = [text.index(t.kind) for t in scene.things]
            assert positions == sorted(positions)


def test_scenes_are_reproducible() -> None:
    a, b = (draw_scene(random.Random("same")) for _ in range(2))
    assert a == b
    assert np.array_equal(np.asarray(render(a)), np.asarray(render(b)))
