"""The numbers in an exported graph, wherever they lie: found by the protobuf's own fields, without a library.

Field numbers are those of onnx.proto. What is not read to its end here is refused: engines know more of the
format than exports use, and would run what nobody has looked at.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from sana_edge.errors import CheckpointError
from sana_edge.system.regular import open_regular

# of TensorProto: FLOAT, FLOAT16, DOUBLE, BFLOAT16, whose exponent is all ones in NaN and infinity
_EXPONENTS: dict[int, tuple[type[np.unsignedinteger[Any]], int]] = {
    1: (np.uint32, 0x7F80_0000),
    10: (np.uint16, 0x7C00),
    11: (np.uint64, 0x7FF0_0000_0000_0000),
    16: (np.uint16, 0x7F80),
}
# bytes that are looked at together, which fit into a core's cache
_BLOCK = 1 << 18
# bytes of values of fixed lengths, by their wire type
_FIXED = {1: 8, 5: 4}


class _Branches(Exception):
    """What a node is called that holds graphs."""


@dataclass(frozen=True)
class _Tensor:
    """Its bytes, or where they lie: a file, an offset and a length, None for all."""

    name: str
    kind: int
    content: memoryview
    location: str = ""
    offset: int = 0
    length: int | None = None


def check_values(folder: Path, graphs: Iterable[str], files: Iterable[str], hint: str) -> None:
    """See that all floating-point constants of graphs are finite; reads each once.

    Args:
        graphs: names of ONNX files in the folder.
        files: that may hold their weights, by their paths from the folder.

    Raises:
        CheckpointError: they are not, or lie elsewhere, which names the first; or a graph has a loop, which
            might never end, or is none.
    """
    known, seen = set(files), set[tuple[str, int, int | None]]()
    for graph in graphs:
        path = folder / graph
        try:
            with open_regular(path) as file:
                tensors = list(_tensors(memoryview(file.read())))
        except _Branches as error:
            what = f"{path} has a loop, a branch or a function ({error}), as no exported graph has"
            raise CheckpointError(what, hint) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is no ONNX graph, or is damaged", hint) from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}", hint) from error
        for tensor in tensors:
            if tensor.location and tensor.location not in known:
                where = tensor.location[:100]
                raise CheckpointError(f"{path}: {tensor.name} lies in {where!r}, no file of the folder", hint)
            place = (tensor.location, tensor.offset, tensor.length)
            if tensor.kind not in _EXPONENTS or (tensor.location and place in seen):
                continue
            try:
                finite = _is_finite(path.parent, tensor)
            except (OSError, OverflowError) as error:
                raise CheckpointError(f"cannot read {tensor.name} of {path}: {error}", hint) from error
            if not finite:
                raise CheckpointError(f"{path}: {tensor.name} has NaN or infinite values", hint)
            seen.add(place)


def _is_finite(folder: Path, tensor: _Tensor) -> bool:
    kind, exponent = _EXPONENTS[tensor.kind]
    if not tensor.location:
        return _all_finite(io.BytesIO(tensor.content), tensor.content.nbytes, kind, exponent)
    with open_regular(folder / tensor.location) as file:
        file.seek(tensor.offset)
        return _all_finite(file, tensor.length, kind, exponent)


def _all_finite(
    file: IO[bytes], left: int | None, kind: type[np.unsignedinteger[Any]], exponent: int
) -> bool:
    while block := file.read(_BLOCK if left is None else min(_BLOCK, left)):
        left = None if left is None else left - len(block)
        values = np.frombuffer(block[: len(block) - len(block) % kind().itemsize], kind)
        if ((values & kind(exponent)) == exponent).any():
            return False
    return True


def _tensors(model: memoryview) -> Iterator[_Tensor]:
    """The tensors of a model: ModelProto.graph is field 7, and functions are field 25."""
    for graph in _inside(model, 7):
        yield from _of_graph(graph)
    if any(_inside(model, 25)):
        raise _Branches("a function")


def _of_graph(graph: memoryview) -> Iterator[_Tensor]:
    """GraphProto has nodes (1) and initialisers (5), NodeProto a name (3) and attributes (5).

    AttributeProto has tensors (5 and 10) and graphs (6 and 11).

    Raises:
        _Branches: there is a loop or a branch.
        ValueError: this is no protobuf.
    """
    for number, value in _fields(graph):
        if number == 5 and not isinstance(value, int):
            yield _tensor(value)
        if number != 1 or isinstance(value, int):
            continue
        name = "a constant"
        for part, inner in _fields(value):
            if part == 3 and not isinstance(inner, int):
                name = bytes(inner).decode(errors="replace")
            if part != 5 or isinstance(inner, int):
                continue
            for kind, held in _fields(inner):
                if kind in (5, 10) and not isinstance(held, int):
                    yield _tensor(held, name)
                elif kind in (6, 11):
                    # a loop might never end
                    raise _Branches(name)


def _tensor(data: memoryview, owner: str = "a weight") -> _Tensor:
    """Of TensorProto the type (2), the name (8), values (4, 9 and 10) and external_data (13)."""
    kind, name, place, content = 0, "", dict[str, str](), memoryview(b"")
    for number, value in _fields(data):
        if number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and not isinstance(value, int):
            name = bytes(value).decode(errors="replace")
        elif number in (4, 9, 10) and not isinstance(value, int):
            content = value
        elif number == 13 and not isinstance(value, int):
            key, text = (b"".join(map(bytes, _inside(value, part))).decode() for part in (1, 2))
            place[key] = text
    length = int(place["length"]) if "length" in place else None
    if place and (int(place.get("offset", 0)) < 0 or (length or 0) < 0):
        raise ValueError
    return _Tensor(
        name or owner, kind, content, place.get("location", ""), int(place.get("offset", 0)), length
    )


def _inside(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """The messages and texts of one field."""
    for number, value in _fields(data):
        if number == wanted and not isinstance(value, int):
            yield value


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Numbers of fields and their values: whole numbers, or the bytes of all others.

    Raises:
        ValueError: this is no protobuf.
    """
    position, end = 0, len(data)
    while position < end:
        key = data[position]
        position += 1
        if key > 127:
            key, position = _varint(data, position - 1)
        if key & 7 == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        length = _FIXED.get(key & 7, 0)
        if key & 7 == 2:
            length, position = _varint(data, position)
        elif not length:
            raise ValueError("no protobuf")
        if position + length > end:
            raise ValueError("no protobuf")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """A number, seven bits of which are in each byte, and where it ends."""
    value = 0
    for shift, byte in zip(range(0, 70, 7), data[position : position + 10], strict=False):
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position + shift // 7 + 1
    raise ValueError("no protobuf")
