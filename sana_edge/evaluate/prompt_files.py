"""Prompts of published sets as they come: JSON, JSON lines, CSV and TSV, with the category of each."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, reason
from sana_edge.evaluate.prompts import PromptSet
from sana_edge.request.bounds import MAX_PROMPT
from sana_edge.system.json_values import MOST_VALUES, parse, read_bounded, shown

# GenEval, MJHQ-30K, PartiPrompts, DrawBench and COCO name them so, in any case
PROMPT = ("prompt", "prompts", "caption", "text")
CATEGORY = ("category", "tag")
KINDS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
# bytes of a file, its lines, and the values of a JSON document: COCO's captions have a million
_MOST, _MOST_LINES, _MOST_VALUES = 64 << 20, 1_000_000, 4_000_000
_HINT = "give objects, or a header line, with a prompt, and a category where there is one"


def read(path: Path) -> PromptSet:
    """The prompts of a file of one of `KINDS`, none twice, white space made one blank.

    Categories are kept where every prompt has one.

    Raises:
        InvalidInput: it cannot be read, is of another kind, or a prompt is missing, empty or too long, which
            names the line or the place.
    """
    found: dict[str, str] = {}
    dropped = 0
    for place, entry in _entries(path):
        text, category = _prompt(entry, f"{path}, {place}")
        dropped += text in found
        found.setdefault(text, category)
    if not found:
        raise InvalidInput(f"{path} has no prompts", _HINT)
    whole = all(found.values())
    notes = (f"{path.stem}: {dropped} repeated prompts were dropped",) if dropped else ()
    return PromptSet(path.stem, tuple(found), tuple(found.values()) if whole else (), notes=notes)


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = read_bounded(path, _MOST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text: byte {error.start} does not fit", _HINT) from error
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the prompts in {path}: {reason(error)}", _HINT) from error
    if path.suffix.lower() == ".json":
        return _document(_parsed(text, str(path), _MOST_VALUES), path)
    if text.count("\n") > _MOST_LINES:
        raise InvalidInput(f"{path} has more than {_MOST_LINES} lines", "give a part of it")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _table(text, path)
    # not by splitlines: strings of JSON may have other ends of lines in them
    lines = ((f"line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip())
    return ((place, _parsed(line, f"{path}, {place}")) for place, line in lines)


def _parsed(text: str, what: str, most: int = MOST_VALUES) -> Any:
    try:
        return parse(text, most)
    except ValueError as error:
        raise InvalidInput(f"{what} is no JSON: {error}", _HINT) from error


def _document(content: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """A list of prompts or objects, or an object of them by name."""
    if isinstance(content, dict):
        return ((shown(name), entry) for name, entry in content.items())
    if isinstance(content, list):
        return ((f"entry {i}", entry) for i, entry in enumerate(content, start=1))
    raise InvalidInput(f"{path} is {shown(content)}, no list or object of prompts", _HINT)


def _table(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    # what spreadsheets write depends on their language
    tabs = path.suffix.lower() == ".tsv"
    delimiter = max("\t" if tabs else ",;\t", key=text.partition("\n")[0].count)
    # published ones with tabs have quotes as they come
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=not tabs)
    try:
        columns = [str(name).strip().lower() for name in rows.fieldnames or ()]
        if not set(PROMPT) & set(columns):
            found = f"line 1 of {path} is no header with a column {PROMPT[0]}: {shown(', '.join(columns))}"
            raise InvalidInput(found, "begin with a line such as prompt,category")
        for row in rows:
            if None in row:
                where = f"{path}, line {rows.line_num} has more cells than line 1"
                raise InvalidInput(where, f"put a prompt with {delimiter!r} in it in double quotes")
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        # that of the row before
        raise InvalidInput(f"{path}, line {rows.line_num + 1}: {error}", _HINT) from error


def _prompt(entry: Any, where: str) -> tuple[str, str]:
    """Text and category, "" where there is none."""
    if isinstance(entry, str):
        entry = {PROMPT[0]: entry}
    if not isinstance(entry, Mapping):
        raise InvalidInput(f"{where} is {shown(entry)}, no prompt", _HINT)
    values = {str(name).strip().lower(): value for name, value in entry.items()}
    text, category = _first(values, PROMPT), _first(values, CATEGORY)
    if text is None:
        raise InvalidInput(f"{where} has no prompt", _HINT)
    if not isinstance(text, str) or not text.split():
        raise InvalidInput(f"{where}: the prompt is {shown(text)}", _HINT)
    text = " ".join(text.split())
    if len(text) > MAX_PROMPT:
        raise InvalidInput(f"{where}: the prompt has {len(text)} characters", f"give at most {MAX_PROMPT}")
    return text, category.strip() if isinstance(category, str) else ""


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if values.get(name) is not None), None)
