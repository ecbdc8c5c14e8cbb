"""What text encoders made of prompts, in memory and in the user's cache, so that each is read once.

An entry is a safetensors file of one tensor, ``features`` (1, L, channels), in the folder ``prompts``. It is
named after a hash of the prompt and of all that features depend on, and only its user may read it. What could
not be written, or was damaged, is read anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sana_edge import __version__
from sana_edge.errors import SanaError
from sana_edge.prompt import MAX_TOKENS, Text, tokenized_text
from sana_edge.store.cache import user_cache
from sana_edge.store.headers import safetensors_header
from sana_edge.system import atomic
from sana_edge.system.json_values import read_bounded

logger = logging.getLogger("sana_edge")

FOLDER = "prompts"
# to be raised whenever the same text encoder gives other features
_FORMAT = 1
# of all entries on the disk: bytes and files; and bytes in memory
MOST, MOST_FILES, _IN_MEMORY = 64 << 20, 1000, 8 << 20
_END = ".safetensors"
# bits of a value, and those that are all ones in NaN and infinity
_EXPONENTS: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class Entry:
    """A prompt's features.

    Attributes:
        dtype: as safetensors names it, "F32", "F16" or "BF16".
        shape: (1, L, channels).
        content: the values, row by row.
        excess: tokens of the prompt that were cut off.
    """

    dtype: str
    shape: tuple[int, int, int]
    content: bytes
    excess: int


class PromptCache:
    """The prompts that one text encoder has read.

    Args:
        identity: says, as JSON values, all that features depend on besides the prompt: checksums of the
            encoder, and what computes. Asked each time; None where files were changed since they were
            checked, and nothing is kept.
        dtype: of the features, as `Entry` has it.
        channels: of the features.
    """

    def __init__(self, identity: Callable[[], Any], dtype: str, channels: int) -> None:
        self._identity, self._dtype, self._channels = identity, dtype, channels
        # of a file, with its header
        self._largest = MAX_TOKENS * channels * np.dtype(_EXPONENTS[dtype][0]).itemsize + 4096
        self._kept: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, text: Text) -> Entry | None:
        """The entry of a prompt behind its instruction, in memory from now on; None where there is none."""
        key = self._key(text)
        if key is None:
            return None
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        found = self._read(key)
        if found is not None:
            self._keep(key, found)
        return found

    def get(self, text: Text, encode: Callable[[], Entry]) -> Entry:
        """`find`, or what ``encode`` gives, which is kept."""
        found = self.find(text)
        if found is None:
            key, found = self._key(text), encode()
            # the files may have been replaced before the encoder was loaded
            if key is not None and key == self._key(text):
                self._keep(key, found)
                self._write(key, found)
        return found

    def _key(self, text: Text) -> str | None:
        identity = self._identity()
        if identity is None:
            return None
        prompt, instruction = text
        read = ["\n".join(instruction or ()), tokenized_text(prompt, instruction), MAX_TOKENS]
        whole = [_FORMAT, __version__, identity, self._dtype, self._channels, read]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def _keep(self, key: str, entry: Entry) -> None:
        with self._lock:
            self._kept[key] = entry
            size = sum(len(kept.content) for kept in self._kept.values())
            while size > _IN_MEMORY and len(self._kept) > 1:
                size -= len(self._kept.popitem(last=False)[1].content)

    def _read(self, key: str) -> Entry | None:
        path = _path(key)
        if path is None:
            return None
        try:
            entry = _parsed(read_bounded(path, self._largest), key, self._dtype, self._channels)
        except OSError:
            return None
        except ValueError as error:
            logger.info("%s is damaged: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        # the last to be removed
        with contextlib.suppress(OSError):
            os.utime(path)
        return entry

    def _write(self, key: str, entry: Entry) -> None:
        path = _path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic.write_bytes(path, _file(key, entry), private=True)
            _evict(path.parent)
        except (OSError, SanaError) as error:
            logger.info("a prompt's features are not kept on the disk: %s", error)


class LastTexts(Generic[Made]):
    """What was made of the texts of the last plan, for a next one that has the same."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[str, ...]], Made] = {}

    def keep(self, texts: Sequence[Text] = ()) -> None:
        """Let go of all others."""
        self._made = {key: self._made[key] for key in map(_hashable, texts) if key in self._made}

    def missing(self, texts: Sequence[Text]) -> list[int]:
        """The numbers of those that would have to be made, each once."""
        keys = [*map(_hashable, texts)]
        return [i for i, key in enumerate(keys) if key not in self._made and keys.index(key) == i]

    def get(self, texts: Sequence[Text], make: Callable[[int], Made]) -> list[Made]:
        """Of each text; ``make`` gets the number of one that is not there."""
        self.keep(texts)
        for number, key in enumerate(map(_hashable, texts)):
            if key not in self._made:
                self._made[key] = make(number)
        return [self._made[key] for key in map(_hashable, texts)]


def _hashable(text: Text) -> tuple[str, tuple[str, ...]]:
    prompt, instruction = text
    return prompt, tuple(instruction or ())


def _path(key: str) -> Path | None:
    cache = user_cache()
    return None if cache is None else cache / FOLDER / f"{key}{_END}"


def _file(key: str, entry: Entry) -> bytes:
    """An entry as safetensors: the same bytes each time."""
    tensor = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [0, len(entry.content)]}
    described = {"format": "sana-edge-prompt", "key": key, "excess": str(entry.excess)}
    whole = json.dumps([described, tensor]).encode() + entry.content
    described["sha256"] = hashlib.sha256(whole).hexdigest()
    header = json.dumps({"__metadata__": described, "features": tensor}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + entry.content


def _parsed(content: bytes, key: str, dtype: str, channels: int) -> Entry:
    """The entry in a file's content.

    Raises:
        ValueError: it is not what `_file` writes for this key, of these features.
    """
    unsigned, exponent = _EXPONENTS[dtype]
    try:
        header: Any = safetensors_header(io.BytesIO(content), len(content)) or {}
        length, excess = header["features"]["shape"][1], int(header["__metadata__"]["excess"])
    except (KeyError, TypeError, IndexError, OverflowError):
        raise ValueError("it is no entry") from None
    if type(length) is not int or not 1 <= length <= MAX_TOKENS or excess < 0:
        raise ValueError(f"it has {length} tokens")
    values = content[-length * channels * np.dtype(unsigned).itemsize :]
    entry = Entry(dtype, (1, length, channels), values, excess)
    # key, dtype, shape and checksum are in it
    if _file(key, entry) != content:
        raise ValueError("it is of another prompt, or was changed")
    if bool(((np.frombuffer(values, unsigned) & exponent) == exponent).any()):
        raise ValueError("it has NaN or infinite values")
    return entry


def _evict(folder: Path) -> None:
    """Remove the entries that were not used for longest, until the others are few and small enough."""
    found = []
    with os.scandir(folder) as files:
        for file in files:
            if file.name.endswith(_END):
                with contextlib.suppress(OSError):
                    now = file.stat(follow_symlinks=False)
                    found.append((now.st_mtime_ns, file.path, now.st_size))
    size, count = sum(entry[2] for entry in found), len(found)
    for _, path, bytes_ in sorted(found):
        if size <= MOST and count <= MOST_FILES:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
        size, count = size - bytes_, count - 1
