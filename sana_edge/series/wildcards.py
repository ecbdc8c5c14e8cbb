"""Templates of prompts: ``{red|blue} house`` and ``__animal__``, counted before any is expanded.

Alternatives nest, and may have weights, ``{3::red|blue}``, which random choices obey. ``__animal__`` is any
line of ``animal.txt`` in a folder; lines may be templates themselves. A backslash makes braces, bars,
underlines, hashes and backslashes plain.
"""

from __future__ import annotations

import itertools
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sana_edge.errors import InvalidInput, reason
from sana_edge.request.bounds import MAX_PROMPT
from sana_edge.system.json_values import read_bounded, shown

MOST_NESTED = 32
# of all files together: lines and alternatives in them
MOST_OPTIONS = 250_000
# characters and choices of the longest text of a template, and texts that are counted
MOST_TEXT, MOST_COUNT = 2 * MAX_PROMPT, 1 << 4096
_TOKEN = re.compile(r"\\[{}|_#\\]|[{}|]|__[^\s_](?:[^_]|_(?!_))*?__")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)::")
_PLAIN = "write \\{ \\| \\} and \\_ where they are meant as they are, or give --literal"


@dataclass(frozen=True)
class Choice:
    """One of several templates; ``count`` and ``size`` are as of `Template`."""

    options: tuple[Template, ...]
    weights: tuple[float, ...]
    count: int
    size: int

    @classmethod
    def of(cls, options: Sequence[Template], weights: Sequence[float] = ()) -> Choice:
        count = min(sum(option.count for option in options), MOST_COUNT)
        size = 1 + max(option.size for option in options)
        return cls(tuple(options), tuple(weights or [1.0] * len(options)), count, size)

    def at(self, number: int) -> str:
        for option in self.options:
            if number < option.count:
                return option.at(number)
            number -= option.count
        raise IndexError(number)

    def draw(self, source: random.Random) -> str:
        levels = list(itertools.accumulate(self.weights))
        chosen = bisect_right(levels, source.random() * levels[-1])
        return self.options[min(chosen, len(levels) - 1)].draw(source)


@dataclass(frozen=True)
class Template:
    """Text with choices in it.

    Attributes:
        count: how many texts it stands for, at most `MOST_COUNT`.
        size: characters of the longest one, and choices on the way to it.
    """

    parts: tuple[str | Choice, ...]
    count: int
    size: int

    @classmethod
    def of(cls, parts: Sequence[str | Choice]) -> Template:
        count, size = 1, 0
        for part in parts:
            size += part.size if isinstance(part, Choice) else len(part)
            if isinstance(part, Choice):
                count = min(count * part.count, MOST_COUNT)
        return cls(tuple(parts), count, size)

    def at(self, number: int) -> str:
        """One of all texts, 0 to count - 1; the last choice changes first."""
        texts = []
        for part in reversed(self.parts):
            if isinstance(part, Choice):
                number, rest = divmod(number, part.count)
                texts.append(part.at(rest))
            else:
                texts.append(part)
        return "".join(reversed(texts))

    def draw(self, source: random.Random) -> str:
        """A random text, by the weights."""
        return "".join(part.draw(source) if isinstance(part, Choice) else part for part in self.parts)


class Wildcards:
    """Parses templates, and reads the files of one folder that they name, each once.

    Raises:
        InvalidInput: the folder is none.
    """

    def __init__(self, folder: Path | None = None) -> None:
        if folder is not None and not folder.is_dir():
            raise InvalidInput(f"{folder} is no folder of wildcards", "give a folder of .txt files")
        self._folder = folder
        self._files: dict[str, Choice] = {}
        self._open: list[str] = []
        self._options = 0

    def template(self, text: str) -> Template:
        """Parse a prompt.

        Raises:
            InvalidInput: a brace is not closed or not opened, alternatives nest too deeply, or a file is
                missing, empty, or names itself.
        """
        # each level's options, their weights, and the parts of the one that is being read
        levels: list[tuple[list[Template], list[float], list[str | Choice]]] = [([], [], [])]
        for token in self._tokens(text):
            options, weights, parts = levels[-1]
            if token == "{":
                if len(levels) > MOST_NESTED:
                    raise InvalidInput(f"alternatives nest more than {MOST_NESTED} deep", _PLAIN)
                levels.append(([], [], []))
            elif token in ("|", "}") and len(levels) > 1:
                weights.append(_take_weight(parts))
                options.append(Template.of(parts))
                parts.clear()
                if token == "}":
                    levels.pop()
                    levels[-1][2].append(_choice(options, weights))
            elif token == "}":
                raise InvalidInput("a } closes nothing", _PLAIN)
            elif len(token) > 4 and token.startswith("__"):
                parts.append(self._file(token[2:-2]))
            else:
                parts.append(token[1:] if len(token) == 2 and token[0] == "\\" else token)
        if len(levels) > 1:
            raise InvalidInput("a { is not closed", _PLAIN)
        made = Template.of(levels[0][2])
        if made.size > MOST_TEXT:
            found = f"a text of the template may have {made.size} characters and choices"
            raise InvalidInput(found, f"give at most {MOST_TEXT}")
        return made

    @staticmethod
    def _tokens(text: str) -> list[str]:
        tokens, end = [], 0
        for match in _TOKEN.finditer(text):
            tokens += [text[end : match.start()], match[0]]
            end = match.end()
        return [token for token in (*tokens, text[end:]) if token]

    def _file(self, name: str) -> Choice:
        if name in self._files:
            return self._files[name]
        if self._folder is None:
            raise InvalidInput(f"__{name}__ asks for a file, but there is no folder", "give --wildcards DIR")
        path = self._folder / f"{name}.txt"
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name or ":" in name:
            raise InvalidInput(f"__{name}__ leads out of {self._folder}", "name a file in it")
        if name in self._open or len(self._open) > MOST_NESTED:
            raise InvalidInput(f"wildcards lead to themselves: {' > '.join([*self._open, name])}", "break it")
        try:
            content = read_bounded(path)
            text = content.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"cannot read {path}: {reason(error)}", "give a UTF-8 file of lines"
            ) from error
        self._options += sum(map(content.count, (b"\n", b"\r", b"|", b"__")))
        if self._options > MOST_OPTIONS:
            found = f"the wildcards up to {path} have more than {MOST_OPTIONS} lines and alternatives"
            raise InvalidInput(found, "name fewer or smaller files")
        lines = (line.strip() for line in re.split(r"\r\n|\r|\n", text))
        texts = [line for line in lines if line and not line.startswith("#")]
        if not texts:
            raise InvalidInput(f"{path} has no lines", "write one alternative into each line")
        self._open.append(name)
        try:
            self._files[name] = Choice.of([self.template(text) for text in texts])
        finally:
            self._open.pop()
        return self._files[name]


def _take_weight(parts: list[str | Choice]) -> float:
    """The weight before an option, which is taken away; 1 without."""
    match = _WEIGHT.match(parts[0]) if parts and isinstance(parts[0], str) else None
    if match is None:
        return 1.0
    parts[0] = str(parts[0])[match.end() :]
    return float(match[1])


def _choice(options: list[Template], weights: list[float]) -> Choice:
    if not sum(weights) > 0:
        raise InvalidInput(f"the weights {shown(weights)} of alternatives are all 0", "make one larger")
    return Choice.of(options, weights)
