"""Tokenizers of strangers: what may never end, grow without bound, or panic, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_edge.errors import CheckpointError
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.tokenizer import PromptTokenizer

REGEX = {"Regex": "(a+)+$"}


def replace(content: str, pattern: object = None) -> dict[str, object]:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


def split(pattern: object) -> dict[str, object]:
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def sequence(*parts: object) -> dict[str, object]:
    return {"type": "Sequence", "normalizers": list(parts)}


CASES: dict[str, tuple[str, object, str]] = {
    "a regex before": ("normalizer", replace("x", REGEX), "regular expression"),
    "a regex inside": ("normalizer", sequence(sequence(replace("x", REGEX))), "regular expression"),
    "a regex that splits": ("pre_tokenizer", split(REGEX), "regular expression"),
    "a page for a letter": ("normalizer", replace("a" * 100), "much longer"),
    "doubling": ("normalizer", sequence(*[replace("aa")] * 7), "much longer"),
    "many parts": ("normalizer", sequence(*[replace("a")] * 9), "9 steps"),
    "an empty pattern": ("normalizer", replace("a", {"String": ""}), "much longer"),
    "a table": ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}, "tokenizer"),
}


def write(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((BUNDLED / "sana-tiny/tokenizer/tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("key", "value", "message"), CASES.values(), ids=CASES)
def test_parts_that_may_take_for_ever(tmp_path: Path, key: str, value: object, message: str) -> None:
    folder = write(tmp_path, lambda content: content.update({key: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        PromptTokenizer(folder)
    assert caught.value.hint


def test_gemmas_parts(tmp_path: Path) -> None:
    own = {
        "normalizer": replace("\u2581", {"String": " "}),
        "pre_tokenizer": {**split({"String": " "}), "behavior": "MergedWithPrevious"},
    }
    folder = write(tmp_path, lambda content: content.update(own))
    PromptTokenizer(folder)


def test_tokens_beside_a_text(tmp_path: Path) -> None:
    special = {"SpecialToken": {"id": "x", "type_id": 0}}
    own = [{"Sequence": {"id": "A", "type_id": 0}}]
    template = {
        "type": "TemplateProcessing",
        "single": [special] * 100 + own,
        "pair": [*own, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"x": {"id": "x", "ids": [1] * 100, "tokens": ["x"] * 100}},
    }
    folder = write(tmp_path, lambda content: content.update(post_processor=template))
    with pytest.raises(CheckpointError, match="adds 10000 tokens to each text"):
        PromptTokenizer(folder)


def test_a_panic_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PromptTokenizer(write(tmp_path, lambda content: None))

    class Panic(BaseException):
        pass

    class Panicking:
        def no_truncation(self) -> None:
            raise Panic("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(tokenizer, "_tokenizer", Panicking())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json fails: called `Option"):
        tokenizer.encode("a")


def test_dropout_is_left_out(tmp_path: Path) -> None:
    """A prompt has one reading."""
    tokenizer = PromptTokenizer(write(tmp_path, lambda content: content["model"].update(dropout=0.5)))
    assert len({tuple(tokenizer.encode("a red house left of a star")) for _ in range(8)}) == 1
