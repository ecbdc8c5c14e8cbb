"""What a model's folder says of its training, and the notes that come of it, with torch and exported."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sana_edge import CheckpointError, Sana
from sana_edge.store.domain import FILE, SHOWN, Domain, read_domain
from sana_edge.store.known_models import BUNDLED
from sana_edge.training.art.catalogue import kinds

DOMAIN = Domain(("a", "black", "cat", "close", "house", "red", "t-shirt", "🦊"), ((64, 64),))
CONTENT = {"words": list(DOMAIN.words), "sizes": [[64, 64]]}


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, which knows a few words."""
    copy = tmp_path_factory.mktemp("domain") / "few"
    shutil.copytree(tiny_folder, copy)
    (copy / FILE).write_text(json.dumps(CONTENT))
    return copy


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("a red house", []),
        ("A RED Cat, 3d, 8k!", []),
        ("a t-shirt, a close-black cat", []),
        ("an astronaut, an Astronaut and a cat", ["an", "astronaut", "and"]),
        ("a 🦊 and a 🐙🐙", ["and", "🐙"]),
        ("❤️ cat", ["❤"]),
        ("一只狐狸", ["一只狐狸"]),
        ("the cat's house", ["the"]),
        ("... --- 1234", []),
        ("", []),
    ],
)
def test_unknown_words_are_found(text: str, unknown: list[str]) -> None:
    assert DOMAIN.unknown(text) == unknown


def test_many_unknown_words_are_counted() -> None:
    words = [chr(ord("f") + i) * 3 for i in range(SHOWN + 2)]
    (note,) = DOMAIN.notes("few", (" ".join(words),), (64, 64))
    assert note == f"few does not know: {', '.join(words[:SHOWN])} and 2 more"


def test_a_folder_without_the_file_knows_everything(tiny_folder: Path) -> None:
    assert read_domain(tiny_folder) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"words": "a"', "cannot read"),
        ("[]", "not a JSON object"),
        ('{"words": "a", "sizes": []}', "words is 'a', expected a list"),
        ('{"words": [1], "sizes": []}', "words is 1, expected a string"),
        ('{"words": [], "sizes": [[1]]}', "sizes is [1], expected a list of 2"),
        ('{"words": []}', "lacks sizes"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError) as error:
        read_domain(tmp_path)
    assert said in str(error.value) and "domain.json" in str(error.value)


DEBRIS = "not at 96x64: expect debris"
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "known": ({"prompt": "a red house"}, ()),
    "unknown": ({"prompt": "a red fox"}, ("few does not know: fox",)),
    "negative": ({"prompt": "a cat", "negative_prompt": "blurry"}, ("few does not know: blurry",)),
    "size": (
        {"prompt": "a cat", "size": (96, 64)},
        (f"few was trained at 64x64, {DEBRIS}",),
    ),
}


@pytest.mark.parametrize(("options", "notes"), CASES.values(), ids=CASES)
def test_torch_says_it(folder: Path, options: dict[str, Any], notes: tuple[str, ...]) -> None:
    with Sana.load(str(folder)) as sana:
        assert sana.generate(**{"seed": 1, "steps": 1, "size": (64, 64), **options}).notes == notes


def test_an_exported_folder_says_the_same(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")
    settings = pytest.importorskip("sana_edge.export.settings")
    onnx_export.export(str(folder), tmp_path / "onnx", settings.Settings(verify=False))
    assert json.loads((tmp_path / "onnx" / FILE).read_text()) == CONTENT
    with Sana.load(str(tmp_path / "onnx"), backend="onnxruntime") as sana:
        for options, notes in CASES.values():
            made = sana.generate(**{"seed": 1, "steps": 1, "size": (64, 64), **options})
            assert [note.split(" ", 1)[1] for note in made.notes] == [n.split(" ", 1)[1] for n in notes]


def test_the_card_names_what_sana_tiny_draws() -> None:
    card = (BUNDLED / "sana-tiny" / "README.md").read_text(encoding="utf-8")
    named = {name.strip().rstrip("*") for name in re.split(r"[,:\n]", card)}
    assert set(kinds()) <= named


def test_the_bundled_models_know_their_words() -> None:
    for name in ("sana-tiny", "sana-tiny-int8"):
        domain = read_domain(BUNDLED / name)
        assert domain is not None and domain.sizes == ((256, 256),)
        assert domain.unknown("Two red foxes at the sea, 🦊.") == []
        assert domain.unknown("an astronaut in the snow") == ["astronaut"]
