"""Files of prompts: three kinds, odd bytes, and problems with the numbers of their lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sana_edge.errors import InvalidInput
from sana_edge.series.entries import MOST_LINE, Bad, Entry, read_content, read_file, read_prompts


def read(content: str | bytes, kind: str | None = None) -> list[Any]:
    return list(read_content(content.encode() if isinstance(content, str) else content, kind))


def prompts(content: str | bytes, kind: str | None = None) -> list[tuple[int, str]]:
    return [(line, entry.prompt) for line, entry in read(content, kind)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "bom"])
def test_text(end: str, mark: str) -> None:
    """Empty lines and comments count as lines; what Unicode takes for a line end is part of a prompt."""
    content = mark + end.join(["a house", "", "  # a comment", "  ein Häuschen\u2028🏠  "])
    assert prompts(content) == [(1, "a house"), (4, "ein Häuschen\u2028🏠")]


def test_json_lines() -> None:
    content = """
        {"prompt": "a house", "size": "512x256", "steps": 20, "guidance": 5, "seeds": [1, 2], "tile": null}
        # a comment
        {"prompt": "a boat", "size": [64, 32], "count": 2, "num_inference_steps": 4, "cfg_scale": 1.5}
        "a star"
        {"prompt": "a cat", "width": 96, "height": 64, "name": "cats/{seed}"}
        {"prompt": "made", "version": "0.1.0", "model": "sana-tiny", "backend": "torch", "seed": 7}
    """
    entries = [entry for _, entry in read(content)]
    assert entries[0] == Entry("a house", size="512x256", steps=20, guidance=5.0, seeds=(1, 2))
    assert entries[1] == Entry("a boat", size=(64, 32), images=2, steps=4, guidance=1.5)
    assert entries[2:] == [
        Entry("a star"),
        Entry("a cat", width=96, height=64, output="cats/{seed}"),
        Entry("made", seed=7),
    ]
    assert [entry.pixels for entry in entries[:4]] == [(512, 256), (64, 32), None, (96, 64)]
    assert read(content) == read(content, "jsonl")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("prompt,seed\na house,3\n", [(2, Entry("a house", seed=3))]),
        ("Prompt\tn\na house\t2\n", [(2, Entry("a house", images=2))]),
        ("prompt, a good one\n", [(1, Entry("prompt, a good one"))]),
        ("prompt\n", [(1, Entry("prompt"))]),
        ('["a house"]\n', [Bad(1, "is ['a house'], expected an object")]),
        ("[a house\n", [(1, Entry("[a house"))]),
    ],
)
def test_what_stdin_is(content: str, found: list[Any]) -> None:
    assert read(content) == found


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table(delimiter: str) -> None:
    rows = [
        ["prompt", "seed", "seeds", "guidance", "exact_size", "negative_prompt"],
        ["a house", "7", "", "4.5", "TRUE", "12"],
        ['"two\nlines"', "", "1 2 3", "", "", ""],
        [],
        ["a star", "", "4", "3", "false", ""],
    ]
    content = "\r\n".join(delimiter.join(row) for row in rows)
    assert read(content, "csv") == [
        (2, Entry("a house", seed=7, guidance=4.5, exact_size=True, negative_prompt="12")),
        (3, Entry("two\nlines", seeds=(1, 2, 3))),
        (6, Entry("a star", seeds=(4,), guidance=3.0, exact_size=False)),
    ]


@pytest.mark.parametrize(
    ("content", "kind", "line", "problem"),
    [
        ("a\nb" + "x" * MOST_LINE + "\nc", "text", 2, "at most 1048576 are read"),
        (b"a\nb\xff\nc", "text", 2, "is not UTF-8: byte 1 does not fit"),
        ('{"prompt": "a"}\n{"prompt": }', "jsonl", 2, "is no JSON"),
        ('{"prompt": "a"}\n[1]', "jsonl", 2, "is [1], expected an object"),
        ('{"promt": "a"}', "jsonl", 1, "unknown option 'promt' (did you mean prompt?)"),
        ('{"seed": 1}', "jsonl", 1, "there is no prompt"),
        ('{"prompt": 5}', "jsonl", 1, "prompt is 5, expected a string"),
        ('{"prompt": "a", "steps": "x"}', "jsonl", 1, "steps is 'x', expected a whole number"),
        ('{"prompt": "a", "steps": true}', "jsonl", 1, "steps is True"),
        ('{"prompt": "a", "n": 1, "count": 2}', "jsonl", 1, "two values of images"),
        ("[" * 100_000, "jsonl", 1, "is no JSON: it is nested too deeply"),
        ("prompt,seed\na,1\nb,x\n", "csv", 3, "seed is 'x', expected a whole number"),
        ("prompt,seed\na\n", "csv", 2, "has 1 cells, the header 2"),
        ("prompt,seed,\na,1,x\n", "csv", 2, "unknown option ''"),
        ("prompt,seed\na,1.5\n", "csv", 2, "seed is 1.5, expected a whole number"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "jsonl", 1, "a number of thousands of digits"),
        (f"prompt,seeds\na,{'9' * 5000} 2\n", "csv", 2, "seeds is "),
        ('prompt,seed\na,1\n"b,2\n', "csv", 3, "is no CSV: unexpected end of data"),
        (b"prompt\na\n\xff\n", "csv", 3, "is not UTF-8"),
    ],
)
def test_a_bad_line_has_its_number(content: str | bytes, kind: str, line: int, problem: str) -> None:
    bad = [found for found in read(content, kind) if isinstance(found, Bad)]
    assert len(bad) == 1 and bad[0].line == line and problem in bad[0].problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("a red house,1\nb,2", "no header with a column prompt: 'a red house,1'"),
        ("prompt,sede\na,1", "unknown column 'sede' (did you mean seed?)"),
        ("prompt,seed,Seed\na,1,2", "has two columns seed"),
        ("prompt,n,count\na,1,2", "has two columns images"),
        ("", "no header"),
        ('""prompt,seed\na,1', "no header"),
        ("a\0b", "NUL bytes"),
        ("\ufeffa".encode("utf-16"), "NUL bytes"),
    ],
    ids=["header", "column", "twice", "alias", "empty", "quotes", "nul", "utf-16"],
)
def test_a_table_that_is_none(content: str | bytes, problem: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read(content, "csv")
    assert problem in caught.value.message


def test_a_table_of_a_spreadsheet(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("Prompt\tSEED\t\t\na red, old house\t3.0\t\t\n")
    assert list(read_file(tmp_path / "a.tsv")) == [(2, Entry("a red, old house", seed=3))]


@pytest.mark.parametrize("name", ["missing.txt", "folder.txt", "pipe.txt", "prompts.md", "endless.txt"])
def test_files_that_are_none(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    with pytest.raises(InvalidInput, match=name):
        list(read_file(tmp_path / name))


def test_prompts_of_a_program() -> None:
    found = list(
        read_prompts(["a house", {"prompt": "a boat", "size": (64, 32), "seeds": (1,)}, {"seed": 1}])
    )
    assert found == [
        (1, Entry("a house")),
        (2, Entry("a boat", size=(64, 32), seeds=(1,))),
        Bad(3, "there is no prompt"),
    ]


def test_a_file_of_lines_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_edge.series.entries.MOST_LINES", 10)
    assert len(prompts("a\r\n" * 10)) == 10
    with pytest.raises(InvalidInput, match="more than 10 lines"):
        read("a\n" * 21)
