"""JSON of strangers: read within bounds, then frozen dataclasses by their annotations, or an error."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from sana_edge.errors import CheckpointError, SanaError

from .regular import open_regular

# bytes of a file, and values in it, of which Python makes objects of up to a hundred bytes
MOST, MOST_VALUES = 8 << 20, 1 << 18
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class Between:
    """Bounds of an annotated number or of a string's or list's length, both included."""

    low: float
    high: float


def read_bounded(path: Path, most: int = MOST) -> bytes:
    """A file's content.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it has more than ``most`` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it has more than {most} bytes")
        return file.read(size)


def parse(content: bytes | str, most: int = MOST_VALUES) -> Any:
    """Parsed JSON in UTF-8, 16 or 32, with or without a byte order mark.

    Args:
        most: of its values, counted by what separates them, wherever it stands.

    Raises:
        ValueError: it is no JSON, has more values, or is nested too deeply.
    """
    if len(content) > most and _marks(content) > most:
        raise ValueError(f"it has more than {most} values")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        # Python's own limit, and its advice
        raise ValueError("it has a number of thousands of digits") from None


def _marks(content: bytes | str) -> int:
    """Commas and opening brackets."""
    if isinstance(content, str):
        return content.count(",") + content.count("[") + content.count("{")
    return content.count(b",") + content.count(b"[") + content.count(b"{")


def read_json(path: Path, most: int = MOST) -> Any:
    """Parsed JSON of a file; errors are those of `read_bounded` and `parse`."""
    return parse(read_bounded(path, most))


class Reader:
    """Reads the content of one file.

    Args:
        where: the file, for messages.
        hint: what to do about one that is wrong; left out, what the error says of itself.
        defaults: whether keys may be missing that have a default.
        error: what is raised.
    """

    def __init__(
        self, where: str, hint: str = "", *, defaults: bool = False, error: type[SanaError] = CheckpointError
    ) -> None:
        self._where = where
        self._hint = (hint,) if hint else ()
        self._defaults = defaults
        self._error = error

    def require(self, condition: bool, key: str, value: object, expected: str) -> None:
        """Raise the error unless ``condition`` holds."""
        if not condition:
            raise self._error(f"{self._where}: {key} is {shown(value)}, expected {expected}", *self._hint)

    def convert(self, value: Any, kind: Any, key: str = "") -> Any:
        """``value`` as ``kind``: a dataclass, a dict, a tuple, a union, a literal or a plain type.

        Lists become tuples, integers may become floats, keys that a dataclass does not have are ignored.
        ``Annotated`` numbers, strings and lists are within `Between`.

        Args:
            key: leads to the value from the top of the file, such as "graphs.decoder.file".

        Raises:
            CheckpointError, or another that was asked for: the value does not fit; the message has the key.
        """
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(value, kind, key)
        if origin is Annotated:
            return self._bounded(value, arguments[0], arguments[1], key)
        if origin in (types.UnionType, Union):
            if type(value) in arguments:
                return value
            return self.convert(value, arguments[0], key)
        if origin is Literal:
            fits = any(type(value) is type(known) and value == known for known in arguments)
            self.require(fits, key, value, f"one of {', '.join(map(str, arguments))}")
            return value
        if origin is dict:
            self.require(isinstance(value, Mapping), key, value, "an object")
            return {
                name: self.convert(entry, arguments[1], _below(key, name)) for name, entry in value.items()
            }
        if origin is tuple:
            return self._tuple(value, arguments, key)
        if kind is float and type(value) is int and abs(value) < 1 << 53:
            return float(value)
        self.require(type(value) is kind, key, value, _NAMES[kind])
        return value

    def _bounded(self, value: Any, kind: Any, bounds: Between, key: str) -> Any:
        found = self.convert(value, kind, key)
        numeric = isinstance(found, int | float)
        size = found if numeric else len(found)
        name = _NAMES[kind] if numeric else f"{_NAMES[str] if kind is str else 'a list'} of a length"
        expected = f"{name} from {bounds.low:g} to {bounds.high:g}"
        self.require(bounds.low <= size <= bounds.high, key, value, expected)
        return found

    def _dataclass(self, value: Any, kind: Any, key: str) -> Any:
        self.require(isinstance(value, Mapping), key or "the content", value, "an object")
        kinds = _hints(kind)
        for field in dataclasses.fields(kind):
            if field.name not in value and not (self._defaults and _has_default(field)):
                raise self._error(f"{self._where} lacks {_below(key, field.name)}", *self._hint)
        names = [name for name in kinds if name in value]
        return kind(**{name: self.convert(value[name], kinds[name], _below(key, name)) for name in names})

    def _tuple(self, value: Any, kinds: tuple[Any, ...], key: str) -> tuple[Any, ...]:
        several = kinds[1:] == (...,)
        fits = isinstance(value, list | tuple)
        self.require(fits, key, value, "a list" if several else f"a list of {len(kinds)}")
        if several:
            kinds = kinds[:1] * len(value)
        self.require(len(value) == len(kinds), key, value, f"a list of {len(kinds)}")
        return tuple(self.convert(entry, kind, key) for entry, kind in zip(value, kinds, strict=True))


def shown(value: object) -> str:
    """A value for messages, at most 80 characters."""
    # Python refuses to write integers of thousands of digits, and takes long for nested and long lists
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a huge number"
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return "a huge value"
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass, which Python compiles anew each time."""
    return typing.get_type_hints(kind, include_extras=True)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
