"""Mutations of real files, from a source of random numbers: Python's, or one of hypothesis' that it shrinks.

What a kind of file is made of is changed (values, keys, lengths, tensors), and bytes of any.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import random
import re
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DEEP = 100_000


@dataclass(frozen=True)
class Parser:
    """What reads one file of a folder that ``prepare`` made.

    ``share`` is of the inputs in the long run: what loads networks is slow.
    """

    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    prepare: Callable[[Path], object]
    read: Callable[[Path], object]
    share: float = 1.0


class Raw(str):
    """JSON as it is written, valid or not."""


# what no reader expects, in place of any value
ODD: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 5, 2**31, 2**63, 2_000_000_000, 10**400, -(10**400), 0.5, -0.0, 1e308),
    *("", "x", "\0", "\ud800", "../../etc/passwd", "/dev/zero", "a" * 70_000, "NaN", "é😀", "2.5", "--help"),
    *([], [[]], {}, {"": {}}, [None], [1] * 1000, ["x", 1, None], {"a": 1}, [[1, 2], [3, 4]]),
    *(Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw('"\\ud800"')),
    *(Raw("[" * DEEP), Raw("[" * DEEP + "]" * DEEP), Raw('{"a":' * DEEP + "1" + "}" * DEEP), Raw("")),
)  # fmt: skip
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "latin-1", "utf-7")
_NUMBERS = (b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", struct.pack("<Q", 1 << 40), b"\x80")


def json_file(content: bytes, draw: random.Random) -> bytes:
    """A JSON file with one to three values changed, removed or repeated, now and then in another encoding."""
    value = json.loads(content)
    if draw.random() < 0.05:
        value = _odd(draw)
    for _ in range(draw.randint(1, 3)):
        _change(value, draw)
    text = _written(value)
    if draw.random() < 0.1:
        return text.encode(draw.choice(_ENCODINGS), "replace")
    return text.encode("utf-8", "surrogatepass")


def _odd(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(ODD))


def _change(value: object, draw: random.Random) -> None:
    """Change something below a value, in place."""
    while isinstance(value, dict | list) and value:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        inner = value[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.75:
            value = inner
            continue
        action = draw.random()
        if action < 0.15:
            del value[key]
        elif action < 0.25 and isinstance(value, dict):
            value[Raw(f"{json.dumps(key)}")] = _odd(draw)
        elif action < 0.35 and isinstance(value, dict):
            value[draw.choice(("", "\0", "../x", "__class__", "auto_map", "kind", "x" * 300))] = inner
        elif action < 0.4 and isinstance(inner, int | float):
            # whole numbers may have become too large for a float
            factor = draw.choice((-1, 0, 1000, 10**6, 0.5))
            value[key] = inner // 2 if factor == 0.5 and isinstance(inner, int) else inner * factor
        else:
            value[key] = _odd(draw)
        return


def _written(value: object) -> str:
    """JSON, with `Raw` as it is; keys that are `Raw` repeat those that are not."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        inner = (
            f"{key if isinstance(key, Raw) else json.dumps(key)}:{_written(v)}" for key, v in value.items()
        )
        return "{" + ",".join(inner) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=isinstance(value, str) and "\ud800" in value)


def header(value: object) -> str:
    """A value as HTTP can send it in a header."""
    text = value if isinstance(value, str) else _written(value)
    return re.sub(r"[^ -~]", "?", text[:4096])


def any_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file with one to four stretches of bytes flipped, removed, repeated, overwritten or put in."""
    if draw.random() < 0.03:
        return draw.choice((b"", b"\0" * 4096, b"<html><body>login</body></html>", b"\xef\xbb\xbf", b"{"))
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        if not data:
            break
        # headers stand at the beginning
        end = len(data) if draw.random() < 0.5 else min(len(data), 256)
        start = draw.randrange(end)
        stop = min(len(data), start + draw.choice((1, 1, 2, 4, 8, 64, 4096)))
        action = draw.randrange(7)
        if action == 0:
            data[start] ^= 1 << draw.randrange(8)
        elif action == 1:
            del data[start:stop]
        elif action == 2:
            data[start:start] = data[start:stop]
        elif action == 3:
            number = draw.choice(_NUMBERS)
            data[start : start + len(number)] = number
        elif action == 4:
            del data[start:]
        elif action == 5:
            data[start:stop] = bytes(draw.randrange(256) for _ in range(min(stop - start, 16)))
        else:
            data[start:start] = _written(draw.choice(ODD[:-5])).encode("utf-8", "replace")
    return bytes(data)


def safetensors_file(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, and now and then a length that lies."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json_file(content[8 : 8 + length], draw)
    size = len(header) if draw.random() < 0.8 else draw.choice((0, 1, len(header) - 1, 1 << 30, 1 << 63))
    return struct.pack("<Q", max(size, 0)) + header + content[8 + length :]


def statistics_file(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose metadata hold JSON, of which a value is changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    if draw.random() < 0.5:
        return safetensors_file(content, draw)
    for key, text in header.get("__metadata__", {}).items():
        with contextlib.suppress(ValueError):
            header["__metadata__"][key] = json_file(text.encode(), draw).decode("utf-8", "replace")
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


def png_file(content: bytes, draw: random.Random) -> bytes:
    """A PNG with other metadata, or chunks that are repeated, removed or of lengths that lie."""
    position, chunks = 8, []
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        kind = content[position + 4 : position + 8]
        chunks.append((kind, content[position + 8 : position + 8 + length]))
        position += 12 + length
    if draw.random() < 0.7:
        chunks = [
            (kind, b"sana_edge\0" + _inner(data[10:], draw))
            if data.startswith(b"sana_edge\0")
            else (kind, data)
            for kind, data in chunks
        ]
    else:
        index = draw.randrange(len(chunks))
        kind, data = chunks[index]
        others = [
            (b"zTXt", b"sana_edge\0\0" + zlib.compress(b"a" * 10**6)),
            (b"iTXt", b"sana_edge\0\1\0\0\0x"),
        ]
        others += [(b"IHDR", struct.pack(">IIBBBBB", *(draw.choice((0, 1, 2**31 - 1)),) * 2, 8, 2, 0, 0, 0))]
        chunks[index : index + draw.randrange(2)] = [
            draw.choice(others),
            (kind, any_bytes(data or b"x", draw)),
        ]
    return content[:8] + b"".join(_chunk(kind, data) for kind, data in chunks)


def _inner(text: bytes, draw: random.Random) -> bytes:
    return json_file(text, draw) if draw.random() < 0.8 else _written(_odd(draw)).encode("utf-8", "replace")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def checkpoint_file(content: bytes, draw: random.Random) -> bytes:
    """A file of torch.save with other keys and tensors, or a zip archive of other entries."""
    if draw.random() < 0.4:
        return _other_zip(content, draw)
    state = torch.load(io.BytesIO(content), weights_only=True)
    odd: tuple[Callable[[], object], ...] = (
        lambda: torch.empty(2, 3, device="meta"),
        lambda: torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (2, 3)),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.zeros(0, 5),
        lambda: torch.tensor(1.0),
        lambda: torch.full((4, 4), torch.nan),
        lambda: torch.zeros(4, dtype=torch.complex64),
        lambda: torch.nn.Parameter(torch.ones(2)),
        lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        lambda: torch.zeros(4, dtype=torch.int64),
        lambda: draw.choice(ODD[:28]),
        lambda: {1: torch.ones(2), None: torch.ones(2), ("a",): 3},
        lambda: OrderedDict(weight=torch.ones(1)),
        lambda: [torch.ones(1)],
        lambda: _nested(draw.choice((5, 20, 200))),
    )
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(state))
        made = draw.choice(odd)()
        action = draw.random()
        if action < 0.2:
            del state[key]
        elif action < 0.4:
            state[draw.choice((1, None, 2.5, ("a", 1), True, "", "x" * 1000, "\0", "."))] = made
        else:
            state[key] = made
        if not state:
            break
    whole = draw.choice(
        (state, state, {"state_dict": state}, {"ema": state, "model": state}, [state], 5, None)
    )
    made_file = io.BytesIO()
    with _silence():
        torch.save(whole, made_file, _use_new_zipfile_serialization=draw.random() < 0.8)
    return made_file.getvalue()


def _nested(depth: int) -> object:
    value: object = torch.ones(1)
    for _ in range(depth):
        value = {"a": value}
    return value


def _other_zip(content: bytes, draw: random.Random) -> bytes:
    """The same archive with an entry compressed, repeated, emptied, renamed or overwritten."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new, _silence():
        names = old.namelist()
        chosen = draw.choice(names)
        for name in names:
            data = old.read(name)
            if name != chosen:
                new.writestr(name, data)
                continue
            action = draw.randrange(6)
            if action == 0:
                new.writestr(name, b"\0" * (4 << 20), zipfile.ZIP_DEFLATED)
            elif action == 1:
                new.writestr(name, data)
                new.writestr(name, any_bytes(data or b"x", draw))
            elif action == 2:
                new.writestr(draw.choice(("../x", "x/data.pkl", "x", "/etc/x")), data)
            elif action == 3:
                new.writestr(name, pickle.dumps(_nested(3)))
            else:
                new.writestr(name, any_bytes(data or b"x", draw))
    return made.getvalue()


def lines_file(content: bytes, draw: random.Random) -> bytes:
    """A file of JSON lines, one of which is changed."""
    lines = content.splitlines()
    index = draw.randrange(len(lines))
    lines[index] = json_file(lines[index], draw)
    return b"\n".join(lines)


_VALUE = re.compile(rb"(?<== )[^\n]+|^\[+[^\n]*\]+$", re.MULTILINE)
_TOML = (
    *(b"1e400", b"nan", b"inf", b"-1", b"0", b"99999999999999999999", b"''", b"'x'", b"[]", b"[[1]]", b"{}"),
    *(b"1979-05-27", b"true", b"'''", b"[" * 20_000, b"9" * 5000, b"{a = 1}", b"", b"x", b"[stage]"),
    *(b"0x" + b"f" * 4000, b"a." * 5000 + b"a = 1", b"\0", b"\xff"),
)  # fmt: skip


def toml_file(content: bytes, draw: random.Random) -> bytes:
    """A TOML file with one to three values or table names changed."""
    for _ in range(draw.randint(1, 3)):
        places = list(_VALUE.finditer(content))
        if places:
            place = draw.choice(places)
            content = content[: place.start()] + draw.choice(_TOML) + content[place.end() :]
    return content


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peak_reset() -> int:
    """Begin to measure the most memory of this process; returns what it has now, in bytes, 0 if unknown."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return 0
    return _status("VmRSS")


def peak() -> int:
    """The most memory since `peak_reset`, in bytes."""
    return _status("VmHWM")


class OwnPeak:
    """The most memory of this process that no file backs, above what it had; seen every half millisecond."""

    def __enter__(self) -> OwnPeak:
        self.before = self.most = _status("RssAnon")
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.done.set()
        self.watcher.join()

    @property
    def grown(self) -> int:
        return self.most - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.0005):
            self.most = max(self.most, _status("RssAnon"))


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
    return int(found[1]) << 10 if found else 0
