"""Files of prompts: text, JSON lines or CSV, read line by line; what is wrong with a line has its number."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana_edge.errors import InvalidInput, SanaError, reason
from sana_edge.system.json_values import Reader, parse, read_bounded, shown

# bytes of a file, its lines, and bytes of a line, of whose prompt 300 tokens are read
MOST, MOST_LINES = 256 << 20, 1_000_000
MOST_LINE = 1 << 20
_FORMATS = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "csv"}
_HINT = "give a .txt file of prompts, .jsonl of objects or .csv with a header line, in UTF-8"
# the server's names for the same
_ALIASES = {
    "count": "images",
    "n": "images",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "name": "output",
}
_SIZE = re.compile(r"(\d{1,9})\s*[xX*]\s*(\d{1,9})")
_SEVERAL = re.compile(r"\d{1,19}(?:[\s,;]+\d{1,19})+")

Line = tuple[int, "Entry"]


@dataclass(frozen=True)
class Entry:
    """One line: a prompt and its options, None where the command's own hold.

    ``seeds`` has one picture each; ``images`` counts up from ``seed``. Bounds are those of `Request`.
    """

    prompt: str
    negative_prompt: str | None = None
    size: tuple[int, int] | str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    images: int | None = None
    sampler: str | None = None
    exact_size: bool | None = None
    flow_shift: float | None = None
    instruction: str | None = None
    tile: int | None = None
    image: str | None = None
    strength: float | None = None
    mask: str | None = None
    variation: tuple[tuple[int, float], ...] | None = None
    output: str | None = None

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height.

        Raises:
            InvalidInput: there are two sizes, one side, or something else.
        """
        if self.width is None and self.height is None:
            match = _SIZE.fullmatch(self.size.strip()) if isinstance(self.size, str) else None
            if isinstance(self.size, str) and match is None and self.size != "auto":
                raise InvalidInput(f"size is {shown(self.size)}", 'give "WIDTHxHEIGHT" in pixels')
            return (int(match[1]), int(match[2])) if match else None if self.size == "auto" else self._pair
        if self.size is not None:
            raise InvalidInput("there is a size, and a width or a height", "give either")
        if self.width is None or self.height is None:
            raise InvalidInput("there is a width or a height alone", "give both, or a size")
        return self.width, self.height

    @property
    def _pair(self) -> tuple[int, int] | None:
        return None if isinstance(self.size, str) else self.size


NAMES = tuple(field.name for field in dataclasses.fields(Entry))
_KINDS = typing.get_type_hints(Entry)


@dataclass(frozen=True)
class Bad:
    """A line that is none; ``problem`` is for people."""

    line: int
    problem: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.problem}"


def read_file(path: Path) -> Iterator[Line | Bad]:
    """The lines of a file, by the end of its name.

    Raises:
        InvalidInput: it cannot be read, is no text or of another kind, or is a table without its header.
    """
    kind = _FORMATS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder, not a file of prompts", _HINT)
        if kind is None:
            raise InvalidInput(f"{path} does not end in .txt, .jsonl or .csv", _HINT)
        content = read_bounded(path, MOST)
    except (OSError, ValueError) as error:
        hint = "of a pipe: --prompts -" if "regular" in str(error) else _HINT
        raise InvalidInput(f"cannot read the prompts in {path}: {reason(error)}", hint) from error
    yield from read_content(content, kind, str(path))


def read_content(content: bytes, kind: str | None = None, name: str = "stdin") -> Iterator[Line | Bad]:
    """The lines of "text", "jsonl" or "csv"; left out, what the first is: an object, a header, or text."""
    if b"\0" in content:
        raise InvalidInput(f"{name} is not UTF-8 text: it has NUL bytes", _HINT)
    if content.count(b"\n") + content.count(b"\r") > 2 * MOST_LINES:
        raise InvalidInput(f"{name} has more than {MOST_LINES} lines", "give its parts one after another")
    lines = re.split(rb"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf"))
    if kind is None:
        kind = _kind_of(next((line for line in lines if line.strip()), b""))
    if kind == "csv":
        yield from _table(lines, name)
        return
    for number, raw in enumerate(lines, start=1):
        text = _decoded(raw, number)
        if isinstance(text, Bad):
            yield text
        elif text.strip() and not text.lstrip().startswith("#"):
            yield _object(text, number) if kind == "jsonl" else read_values({"prompt": text.strip()}, number)


def read_prompts(prompts: Iterable[str | Mapping[str, Any]]) -> Iterator[Line | Bad]:
    """Prompts and objects as a program has them, counted from 1."""
    for number, prompt in enumerate(prompts, start=1):
        values = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        # what was read of JSON has lists
        yield read_values({k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}, number)


def read_values(values: Mapping[str, Any], number: int) -> Line | Bad:
    """One entry; of a picture's metadata, which has a "version", what is no option is left out."""
    found: dict[str, Any] = {}
    for given, value in values.items():
        name = _ALIASES.get(given, given)
        if name in NAMES and name not in found:
            found[name] = value
        elif name in NAMES:
            return Bad(number, f"there are two values of {name}")
        elif "version" not in values:
            return Bad(number, f"unknown option {shown(given)}{_meant(given)}")
    try:
        entry = Reader("the line", defaults=True, error=InvalidInput).convert(found, Entry)
    except SanaError as error:
        return Bad(number, error.message.removeprefix("the line: ").replace("the line lacks", "there is no"))
    return number, entry


def _decoded(raw: bytes, number: int) -> str | Bad:
    if len(raw) > MOST_LINE:
        return Bad(number, f"has {len(raw)} bytes, at most {MOST_LINE} are read")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return Bad(number, f"is not UTF-8: byte {error.start} does not fit")


def _kind_of(line: bytes) -> str:
    """What a file is that begins so: a header names columns that there are, two at least."""
    try:
        if isinstance(parse(line[:MOST_LINE]), dict | list):
            return "jsonl"
    except ValueError:
        pass
    cells = {cell.strip().lower() for cell in re.split("[,;\t]", line[:MOST_LINE].decode(errors="replace"))}
    return "csv" if "prompt" in cells and len(cells) > 1 and cells <= {*NAMES, *_ALIASES} else "text"


def _object(text: str, number: int) -> Line | Bad:
    try:
        values = parse(text)
    except ValueError as error:
        return Bad(number, f"is no JSON: {error}")
    if isinstance(values, str):
        values = {"prompt": values}
    if not isinstance(values, dict):
        return Bad(number, f"is {shown(values)}, expected an object")
    return read_values({name: value for name, value in values.items() if value is not None}, number)


def _table(raw: list[bytes], name: str) -> Iterator[Line | Bad]:
    """Rows of a CSV whose first line names the columns; an empty cell is left out."""
    decoded = [_decoded(line, number) for number, line in enumerate(raw, start=1)]
    bad = {part.line: part for part in decoded if isinstance(part, Bad)}
    # a line that is none must not end a quoted cell
    lines = [f"{part}\n" if isinstance(part, str) else "\n" for part in decoded]
    header = lines[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    first = next(_rows(rows))[1] if header.strip() else []
    columns = [] if isinstance(first, Bad) else [cell.strip().lower() for cell in first]
    if "prompt" not in columns:
        found = f"line 1 of {name} is no header with a column prompt: {shown(header.strip())}"
        raise InvalidInput(found, "begin with a line such as prompt,seed,size")
    named = [_ALIASES.get(column, column) for column in columns if column]
    if twice := next((name for name in named if named.count(name) > 1), None):
        raise InvalidInput(f"line 1 of {name} has two columns {twice}", "leave one of them out")
    # what spreadsheets leave at the end has no name
    for column in filter(None, columns):
        if _ALIASES.get(column, column) not in NAMES:
            found = f"line 1 of {name} has an unknown column {shown(column)}{_meant(column)}"
            raise InvalidInput(found, f"known are {', '.join(NAMES)}")
    yield from bad.values()
    for number, cells in _rows(rows):
        if isinstance(cells, Bad):
            yield cells
        elif cells and number not in bad:
            if len(cells) != len(columns):
                yield Bad(number, f"has {len(cells)} cells, the header {len(columns)}")
                continue
            values = {column: cell for column, cell in zip(columns, cells, strict=True) if cell.strip()}
            yield read_values({column: _plain(column, cell) for column, cell in values.items()}, number)


def _rows(rows: Any) -> Iterator[tuple[int, Any]]:
    """Each row with the number of its first line, or what is wrong with it."""
    while True:
        number = rows.line_num + 1
        try:
            yield number, next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, Bad(number, f"is no CSV: {error}")


def _plain(column: str, cell: str) -> Any:
    """A cell as the number or list that its column has."""
    kind = _KINDS.get(_ALIASES.get(column, column), str)
    if str in typing.get_args(kind) or kind is str:
        return cell
    if column == "seeds" and _SEVERAL.fullmatch(cell.strip()):
        return [int(part) for part in re.findall(r"\d+", cell)]
    try:
        value = parse(cell.lower() if bool in typing.get_args(kind) else cell)
    except ValueError:
        return cell
    if isinstance(value, float) and value.is_integer() and int in typing.get_args(kind):
        # as tables with empty cells have whole numbers
        value = int(value)
    return [value] if column == "seeds" and not isinstance(value, list) else value


def _meant(word: Any) -> str:
    close = difflib.get_close_matches(str(word)[:40], [*NAMES, *_ALIASES], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
