"""The bundled prompt sets, and files of prompts as people write them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana_edge.calib.prompts import (
    BUNDLED,
    MAX_CHARACTERS,
    OWN_SET,
    PromptSet,
    bundled_sets,
    default_set,
    load_prompts,
)
from sana_edge.errors import InvalidInput
from sana_edge.evaluate.judge import scene_prompts as evaluation
from sana_edge.training.art.captions import caption
from sana_edge.training.art.layout import holds, training_scene

SEED = 20261130


def scenes() -> list[str]:
    """How the captions of scenes-v2.txt were made."""
    rng = random.Random(SEED)
    asked = {prompt.text for prompt in evaluation.prompts()}
    made: list[str] = []
    while len(made) < 32:
        scene = training_scene(rng)
        assert not holds(scene)
        text = caption(scene, rng)
        if text not in asked and text not in made:
            made.append(text)
    return made


def test_the_bundled_sets_are_whole() -> None:
    assert bundled_sets() == ["general-v1", "scenes-v2"]
    for name in bundled_sets():
        found = load_prompts(name)
        assert found.name == name and len(found.prompts) == 32 and not found.notes


def test_versions_do_not_change() -> None:
    # calibrated packages name these: changed prompts need a new file
    checksums = {name: load_prompts(name).checksum[:16] for name in bundled_sets()}
    assert checksums == {"general-v1": "173fc3ec73a4cccd", "scenes-v2": "dbfa20750f37d5d7"}


def test_scenes_are_training_scenes_and_none_is_evaluated() -> None:
    found = load_prompts("scenes-v2").prompts
    assert list(found) == scenes()
    assert not {prompt.lower() for prompt in found} & {p.text.lower() for p in evaluation.prompts()}


def test_general_prompts_are_short_and_long() -> None:
    lengths = sorted(len(prompt.split()) for prompt in load_prompts("general-v1").prompts)
    assert lengths[0] == 1 and lengths[-1] > 80


def test_a_model_folder_may_bring_its_own(tmp_path: Path) -> None:
    assert default_set("sana-tiny").name == "scenes-v2"
    assert default_set("sana-tiny", tmp_path).name == "scenes-v2"
    assert default_set("sana-0.6b-1024", tmp_path).name == "general-v1"
    (tmp_path / OWN_SET).write_text("a tram\n")
    assert default_set("sana-tiny", tmp_path).prompts == ("a tram",)


def test_a_file_as_an_editor_may_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.v2.txt"
    # byte order mark, Windows line ends, tabs, a composed and a decomposed é, no end of the last line
    path.write_bytes(
        "\ufeff# comment\r\n\r\n  caf\u00e9\tat  night \r\ncafe\u0301 at night\r\nA tram".encode()
    )
    found = load_prompts(path)
    assert found.name == "mine.v2" and found.prompts == ("caf\u00e9 at night", "A tram")
    assert found.notes == ("mine.v2: 1 repeated prompts were dropped",)


def test_the_first_of_repeated_prompts_stays() -> None:
    found = PromptSet.of(["A Tram", "a cat", "a  tram", "a cat", "a tram"])
    assert found.prompts == ("A Tram", "a cat") and "3 repeated" in found.notes[0]


def test_checksum_is_of_the_normalised_prompts_in_order() -> None:
    expected = PromptSet.of(["a cat", "a tram"]).checksum
    assert PromptSet.of([" a  cat", "", "a tram", "A cat"], "other name").checksum == expected
    assert PromptSet.of(["a tram", "a cat"]).checksum != expected
    assert PromptSet.of(["a cat a", "tram"]).checksum != expected


def picture(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(path, format="PNG")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no prompt file"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.touch(), "has no prompts"),
    "comments": (lambda path: path.write_text("# a\n\n  # b\n \t\n"), "only comments"),
    "invisible": (lambda path: path.write_text("\ufeff\n"), "has no prompts"),
    "nul": (lambda path: path.write_bytes(b"a cat\0\n"), "NUL"),
    "utf-16": (lambda path: path.write_bytes("a cat".encode("utf-16")), "NUL"),
    "latin-1": (lambda path: path.write_bytes("a cat\ncaf\u00e9".encode("latin-1")), "byte 9"),
    "image": (picture, "not"),
    "long": (lambda path: path.write_text("a cat\n" + "x" * (MAX_CHARACTERS + 1)), "line 2 of .*prompts"),
    "huge": (lambda path: path.write_bytes(b"a\n" * (8 << 20) + b"b"), "more than"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_what_is_no_file_of_prompts(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "prompts.txt"
    make(path)
    with pytest.raises(InvalidInput, match=message) as error:
        load_prompts(path)
    assert "prompts" in error.value.message and error.value.hint


def test_names_that_no_file_has() -> None:
    for name in ("general-v0", "", "a\0b", "x" * 5000, "~nobody-here/p.txt"):
        with pytest.raises(InvalidInput) as error:
            load_prompts(name)
        assert error.value.hint
    assert BUNDLED.is_dir()


def test_a_missing_set_tells_which_there_are() -> None:
    with pytest.raises(InvalidInput) as error:
        load_prompts("general-v9")
    assert "general-v1, scenes-v2" in error.value.hint


def test_a_file_of_too_many_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"\n" * 600_001)
    with pytest.raises(InvalidInput, match="more than 300000 lines"):
        load_prompts(tmp_path / "p.txt")
