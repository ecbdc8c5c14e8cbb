"""Parsed JSON into frozen dataclasses, by their annotations, with errors that name file and key."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from sana_edge.errors import CheckpointError

_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


class Reader:
    """Reads the content of one file.

    Args:
        where: the file, for messages.
        hint: what to do about one that is wrong.
    """

    def __init__(self, where: str, hint: str) -> None:
        self._where = where
        self._hint = hint

    def require(self, condition: bool, key: str, value: object, expected: str) -> None:
        """Raise `CheckpointError` unless ``condition`` holds."""
        if not condition:
            raise CheckpointError(f"{self._where}: {key} is {_shown(value)}, expected {expected}", self._hint)

    def convert(self, value: Any, kind: Any, key: str = "") -> Any:
        """``value`` as ``kind``: a dataclass, a dict, a tuple, a union, a literal or a plain type.

        Lists become tuples, integers may become floats, keys that a dataclass does not have are ignored.

        Args:
            key: leads to the value from the top of the file, such as "graphs.decoder.file".

        Raises:
            CheckpointError: the value does not fit; the message has the key.
        """
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return value
        if dataclasses.is_dataclass(kind):
            return self._dataclass(value, kind, key)
        if origin in (types.UnionType, Union):
            if type(value) in arguments:
                return value
            return self.convert(value, arguments[0], key)
        if origin is Literal:
            self.require(value in arguments, key, value, f"one of {', '.join(map(str, arguments))}")
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

    def _dataclass(self, value: Any, kind: Any, key: str) -> Any:
        self.require(isinstance(value, Mapping), key or "the content", value, "an object")
        kinds = typing.get_type_hints(kind)
        for name in kinds:
            if name not in value:
                raise CheckpointError(f"{self._where} lacks {_below(key, name)}", self._hint)
        return kind(**{name: self.convert(value[name], kinds[name], _below(key, name)) for name in kinds})

    def _tuple(self, value: Any, kinds: tuple[Any, ...], key: str) -> tuple[Any, ...]:
        several = kinds[1:] == (...,)
        self.require(isinstance(value, list), key, value, "a list" if several else f"a list of {len(kinds)}")
        if several:
            kinds = kinds[:1] * len(value)
        self.require(len(value) == len(kinds), key, value, f"a list of {len(kinds)}")
        return tuple(self.convert(entry, kind, key) for entry, kind in zip(value, kinds, strict=True))


def _below(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(value: object) -> str:
    # Python refuses to write integers of thousands of digits
    text = "a huge number" if isinstance(value, int) and abs(value) >= 10**30 else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
