"""Files of prompts as MJHQ-30K, GenEval, PartiPrompts and DrawBench publish them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sana_edge.errors import InvalidInput
from sana_edge.evaluate.prompt_files import read

MJHQ = {
    "a1": {"category": "animals", "prompt": "a  fox\nin snow"},
    "b2": {"category": "food", "prompt": "a cake"},
}
GENEVAL = '{"tag": "counting", "include": [{"class": "bus", "count": 2}], "prompt": "two buses"}\n\n'
PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tof "love"\n'
DRAWBENCH = '\ufeffPrompts,Category\r\n"a red car, parked",Colors\r\n"a red car, parked",Colors\r\n'


@pytest.mark.parametrize(
    ("name", "content", "texts", "categories"),
    [
        ("meta_data.json", json.dumps(MJHQ), ("a fox in snow", "a cake"), ("animals", "food")),
        ("list.json", '["a fox", "a cake", "a fox"]', ("a fox", "a cake"), ()),
        ("geneval.jsonl", GENEVAL, ("two buses",), ("counting",)),
        ("half.jsonl", GENEVAL + '{"caption": "a bus"}', ("two buses", "a bus"), ()),
        ("PartiPrompts.TSV", PARTI, ("bond",), ("Abstract",)),
        ("drawbench.csv", DRAWBENCH, ("a red car, parked",), ("Colors",)),
        ("semicolons.csv", "prompt;category\na, b;x\n", ("a, b",), ("x",)),
    ],
)
def test_published_files(
    tmp_path: Path, name: str, content: str, texts: tuple[str, ...], categories: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(content, newline="")
    found = read(tmp_path / name)
    assert (found.name, found.texts, found.categories) == (Path(name).stem, texts, categories)
    # two files have one twice
    assert bool(found.notes) == (name in ("list.json", "drawbench.csv"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b"{", "a.json is no JSON"),
        ("a.json", b"3", "no list or object of prompts"),
        ("a.json", b"[]", "has no prompts"),
        ("a.json", b'["x", 5]', "entry 2 is 5, no prompt"),
        ("a.json", b'{"k": {"prompt": " "}}', "the prompt is ' '"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": 3}', "line 2: the prompt is 3"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "line 2 is no JSON"),
        ("a.jsonl", b'{"prompt": null}', "line 1 has no prompt"),
        ("a.jsonl", b"\xff", "is not UTF-8"),
        (
            "a.csv",
            b"name,category\nx,y\n",
            "line 1 of .* is no header with a column prompt: 'name, category'",
        ),
        ("a.csv", b"prompt,category\nx\n,y\n", "line 3: the prompt is ''"),
        ("a.csv", b"prompt\na red, old house\n", "line 2 has more cells than line 1"),
        ("a.csv", b'prompt\n"a house\na boat\n', "line 2: unexpected end of data"),
        ("a.csv", b'prompt\n"' + b"x" * 200_000, "line 2: field larger than"),
        ("a.json", json.dumps(["x" * 100_001]).encode(), "has 100001 characters"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=says.replace("(", r"\(")):
        read(tmp_path / name)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(InvalidInput, match="cannot read the prompts"):
            read(path)


def test_a_file_of_too_many_lines(tmp_path: Path) -> None:
    for name in ("p.jsonl", "p.csv"):
        (tmp_path / name).write_text("\n" * 1_000_001)
        with pytest.raises(InvalidInput, match="more than 1000000 lines"):
            read(tmp_path / name)
