"""Templates: what they stand for, how much, and what is refused before it is expanded."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from sana_edge.errors import InvalidInput
from sana_edge.series.wildcards import MOST_OPTIONS, Wildcards


def texts(template: str, folder: Path | None = None) -> list[str]:
    parsed = Wildcards(folder).template(template)
    return [parsed.at(number) for number in range(parsed.count)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a house", ["a house"]),
        ("a {red|blue} house", ["a red house", "a blue house"]),
        ("{a|b}{1|2}", ["a1", "a2", "b1", "b2"]),
        ("{{a|b}c|d}", ["ac", "bc", "d"]),
        ("a{|b}", ["a", "ab"]),
        ("{2::a|b}", ["a", "b"]),
        (r"\{a\|b\} c|d \_\_e\_\_ \x \# \\", [r"{a|b} c|d __e__ \x # " + "\\"]),
        ("snake_case __ a", ["snake_case __ a"]),
    ],
)
def test_all_texts(template: str, expected: list[str]) -> None:
    assert texts(template) == expected


def test_files(tmp_path: Path) -> None:
    (tmp_path / "animals").mkdir()
    (tmp_path / "animals" / "pets.txt").write_bytes("\ufeffcat\r\n# none\r\n\r\n{big|small} dog\r\n".encode())
    (tmp_path / "all.txt").write_text("horse\n__animals/pets__")
    assert texts("a __all__!", tmp_path) == ["a horse!", "a cat!", "a big dog!", "a small dog!"]
    # each text of two choices of one file
    assert len(texts("__animals/pets__ and __animals/pets__", tmp_path)) == 9


def test_random_choices_obey_weights_and_the_seed() -> None:
    template = Wildcards().template("{9::a|1::b|0::c}")
    source = random.Random(3)
    counts = Counter(template.draw(source) for _ in range(2000))
    # a binomial's spread is 13: six of them
    assert abs(counts["a"] - 1800) < 80 and counts["c"] == 0
    # what Python promises of its generator: a seed means the same text in all versions
    assert [template.draw(random.Random(seed)) for seed in (1, 2)] == ["a", "b"]


def test_a_bomb_is_counted_not_expanded(tmp_path: Path) -> None:
    assert Wildcards().template("{a|b}" * 300).count == 2**300
    for number in range(20):
        (tmp_path / f"w{number}.txt").write_text("\n".join(["x", *[f"__w{number + 1}__"] * 50]))
    (tmp_path / "w20.txt").write_text("x")
    assert Wildcards(tmp_path).template("__w0__").count > 50**19


@pytest.mark.parametrize("last", ["x", "{|}", "{a|b}"])
def test_a_bomb_of_texts(tmp_path: Path, last: str) -> None:
    """Each text of which would be longer than memory, or take years to find."""
    for number in range(8):
        (tmp_path / f"w{number}.txt").write_text(f"__w{number + 1}__" * 1000)
    (tmp_path / "w8.txt").write_text(last)
    with pytest.raises(InvalidInput, match="characters and choices"):
        Wildcards(tmp_path).template("__w0__")


def test_a_file_of_too_many_lines(tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("a\n" * (MOST_OPTIONS + 1))
    with pytest.raises(InvalidInput, match="lines and alternatives"):
        Wildcards(tmp_path).template("__many__")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("a {red", "a { is not closed"),
        ("a red} house", "a } closes nothing"),
        ("{" * 40 + "}" * 40, "nest more than 32 deep"),
        ("{0::a|0::b}", "are all 0"),
        ("__missing__", "cannot read"),
        ("__empty__", "has no lines"),
        ("__loop__", "lead to themselves: loop > back > loop"),
        ("__../secret__", "leads out of"),
        ("__/etc/passwd__", "leads out of"),
        ("__latin__", "cannot read"),
    ],
)
def test_templates_that_are_none(tmp_path: Path, template: str, problem: str) -> None:
    folder = tmp_path / "wildcards"
    folder.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "empty.txt").write_text("# nothing\n")
    (folder / "loop.txt").write_text("__back__")
    (folder / "back.txt").write_text("a\n__loop__")
    (folder / "latin.txt").write_bytes(b"\xff")
    with pytest.raises(InvalidInput) as caught:
        Wildcards(folder).template(template)
    assert problem in caught.value.message


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is no folder"):
        Wildcards().template("__animal__")
    with pytest.raises(InvalidInput, match="no folder of wildcards"):
        Wildcards(tmp_path / "missing")
