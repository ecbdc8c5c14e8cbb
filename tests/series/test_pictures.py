"""From lines to pictures: seeds, names, options, and what is refused before anything is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sana_edge.errors import InvalidInput
from sana_edge.series.entries import read_prompts
from sana_edge.series.pictures import Picture, Settings, plan_pictures


def plan(*lines: Any, **settings: Any) -> list[Picture]:
    pictures, bad = plan_pictures(read_prompts(lines), Settings(**settings))
    assert not bad
    return pictures


def problem(*lines: Any, **settings: Any) -> str:
    _, bad = plan_pictures(read_prompts(lines), Settings(**settings))
    assert len(bad) == 1 and bad[0].line == len(lines)
    return bad[0].problem


def test_seeds_count_up_where_a_line_has_none() -> None:
    lines = ["a", {"prompt": "b", "seed": 90, "images": 2}, {"prompt": "c", "seeds": [4, 4000]}, "d"]
    pictures = plan(*lines, seed=7, name="{index:02}-{seed}-{line}")
    assert [picture.options["seed"] for picture in pictures] == [7, 90, 91, 4, 4000, 12]
    assert [picture.name for picture in pictures] == [
        "01-7-1.png",
        "02-90-2.png",
        "03-91-2.png",
        "04-4-3.png",
        "05-4000-3.png",
        "06-12-4.png",
    ]


def test_combinations_and_random_texts() -> None:
    every = plan("{a|b} {1|2}", images=2, combinations=True, seed=5)
    assert [picture.options["prompt"] for picture in every] == ["a 1"] * 2 + ["a 2"] * 2 + ["b 1"] * 2 + [
        "b 2"
    ] * 2
    some = plan("{a|b|c|d|e|f|g|h}", images=30, seed=5)
    assert len({picture.options["prompt"] for picture in some}) > 4
    # by the picture's seed, wherever it stands
    again = plan({"prompt": "{a|b|c|d|e|f|g|h}", "seed": 20})
    assert again[0].options == some[15].options
    assert plan("{a|b", literal=True)[0].options["prompt"] == "{a|b"


def test_a_line_s_options_go_before_the_command_s() -> None:
    shared = {
        "steps": 20,
        "guidance": 0.0,
        "negative_prompt": "",
        "size": (64, 32),
        "tile": 0,
        "exact_size": False,
    }
    first, second = plan("a", {"prompt": "b", "steps": 5, "width": 96, "height": 64}, options=shared)
    assert first.options == {
        "steps": 20,
        "guidance": 0.0,
        "size": [64, 32],
        "tile": 0,
        "prompt": "a",
        "seed": 0,
    }
    assert (second.options["steps"], second.options["size"]) == (5, [96, 64])
    assert first.request().size == (64, 32)
    near = plan({"prompt": "a", "variation": [[8, 0.2]]}, "b", options={"variation": ()})
    assert near[0].request().variation == ((8, 0.2),) and "variation" not in near[1].options


@pytest.mark.parametrize(
    ("output", "images", "names"),
    [
        ("house", 1, ["house.png"]),
        ("houses/red.webp", 2, ["houses/red-7.webp", "houses/red-8.webp"]),
        ("{prompt}/{index:03}.jpg", 2, ["a-red-house-ü/001.jpg", "a-red-house-ü/002.jpg"]),
        ("a b.png", 1, ["a b.png"]),
    ],
)
def test_names_of_lines(output: str, images: int, names: list[str]) -> None:
    line = {"prompt": "a red house, ü!", "output": output, "seed": 7, "images": images}
    assert [picture.name for picture in plan(line)] == names


@pytest.mark.parametrize(
    "output",
    [
        *("../a.png", "/etc/a.png", "a/../../b.png", ".hidden.png", "a:b.png", "con.png", "a\\b.png"),
        *("x" * 300 + ".png", "a.gif", "a\nb.png", "\ud800.png", "a/ .png", ".", "{sede}.png"),
        *("com\u00b9.png", "CONIN$.png", "con .png", "a/" * 600 + "b.png", "manifest.jsonl/a.png"),
    ],
)
def test_names_that_are_refused(output: str) -> None:
    try:
        assert problem({"prompt": "a", "output": output})
    except InvalidInput as error:
        assert "{sede}" in error.message


@pytest.mark.parametrize(
    ("lines", "settings", "said"),
    [
        (
            [{"prompt": "a", "output": "A.png"}, {"prompt": "b", "output": "a.png"}],
            {},
            "is that of line 1, too",
        ),
        (
            [{"prompt": "a", "output": "A.png/b.png"}, {"prompt": "b", "output": "a.png"}],
            {},
            "a file's and a folder's",
        ),
        (
            [{"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": "A.png/b.png"}],
            {},
            "a file's and a folder's",
        ),
        ([{"prompt": "a", "seeds": [1, -1, 2]}], {}, "one of the seeds is -1"),
        (
            [{"prompt": "a", "seeds": [1, 10**4000, 2], "output": "{index}.png"}],
            {},
            "one of the seeds is a huge",
        ),
        ([{"prompt": "a", "seeds": [1, 1]}], {"name": "{seed}"}, "another of its pictures"),
        ([{"prompt": "a", "steps": 5000}], {}, "steps is 5000 (choose a whole number from 1 to 1000"),
        ([{"prompt": "a", "size": "5x"}], {}, "size is '5x'"),
        ([{"prompt": "a", "size": "64x64", "width": 5}], {}, "a size, and a width"),
        ([{"prompt": "a", "height": 5}], {}, "alone"),
        ([{"prompt": "a", "seed": -1}], {}, "seed is -1"),
        ([{"prompt": "a", "images": 0}], {}, "images is 0"),
        ([{"prompt": "a", "seed": 1, "seeds": [1]}], {}, "beside a seed"),
        ([{"prompt": "a", "seeds": []}], {}, "empty list"),
        ([{"prompt": " "}], {}, "the prompt is empty"),
        ([{"prompt": "x" * 200_000}], {}, "200000 characters"),
        ([{"prompt": "{a"}], {}, "not closed"),
        ([{"prompt": "a", "image": "missing.png"}], {}, "missing.png"),
        ([{"prompt": "a", "strength": 0.5}], {}, "no image"),
        ([{"prompt": "a", "sampler": "x"}], {}, "unknown sampler"),
    ],
)
def test_lines_that_no_model_can_serve(lines: list[Any], settings: dict[str, Any], said: str) -> None:
    assert said in problem(*lines, **settings)


def test_too_many_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match=r"up to line 2 there are more than 10\^18 pictures"):
        plan("a", "{a|b}" * 200, combinations=True)
    monkeypatch.setattr("sana_edge.series.pictures.MOST_PICTURES", 10)
    with pytest.raises(InvalidInput, match="up to line 3 there are 11 pictures"):
        plan({"prompt": "a", "images": 9}, "b", "c", "d")
    with pytest.raises(InvalidInput, match="no prompts"):
        plan()
    with pytest.raises(InvalidInput, match=r"unknown \{sede\} in the name"):
        plan("a", name="{sede}")


def test_too_many_bad_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_edge.series.pictures.MOST_BAD", 10)
    with pytest.raises(InvalidInput, match="more than 10 lines are bad, such as line 1: "):
        plan(*[5] * 11)


def test_an_image_lies_beside_the_prompts(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    picture = plan({"prompt": "a", "image": "a.png", "strength": 0.5}, folder=tmp_path)[0]
    assert picture.options["image"] == str(tmp_path / "a.png")
    assert picture.request().strength == 0.5
