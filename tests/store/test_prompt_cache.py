"""Prompts that were read: entries on the disk and in memory, damage, other encoders, limits, processes."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from sana_edge.prompt import CHI, Text
from sana_edge.store import cache as user
from sana_edge.store import prompt_cache
from sana_edge.store.prompt_cache import Entry, LastTexts, PromptCache

PROMPT: Text = ("a red house", CHI)
VALUES = np.arange(20, dtype=np.float32).reshape(1, 5, 4)
ENTRY = Entry("F32", (1, 5, 4), VALUES.tobytes(), 3)


def made(identity: Any = "an encoder", dtype: str = "F32", channels: int = 4) -> PromptCache:
    """As another process has it: nothing is in memory."""
    return PromptCache(lambda: identity, dtype, channels)


def never() -> Entry:
    raise AssertionError("the prompt was read again")


def same(found: Entry | None) -> bool:
    fields = ("dtype", "shape", "content", "excess")
    return found is not None and all(getattr(found, name) == getattr(ENTRY, name) for name in fields)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "prompts").glob("*"))


def test_a_prompt_is_read_once(cache: Path) -> None:
    first = made()
    assert first.find(PROMPT) is None
    assert first.get(PROMPT, lambda: ENTRY) is ENTRY and first.get(PROMPT, never) is ENTRY
    again = made()
    assert same(again.get(PROMPT, never)) and again.find(PROMPT) is again.find(PROMPT)
    # as the tokenizer gets it
    assert same(made().find((" A red HOUSE ", CHI)))
    others: list[Text] = [("a red house", None), ("a red house", ("Draw ",)), ("a red mouse", CHI)]
    assert not any(made().find(text) for text in others)


def test_an_entry_is_private_and_says_no_prompt(cache: Path) -> None:
    made().get(PROMPT, lambda: ENTRY)
    (path,) = files(cache)
    assert np.array_equal(load_file(path)["features"], VALUES)
    assert b"house" not in path.read_bytes() and "house" not in path.name
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "other",
    [made(["an encoder", 2]), made(dtype="BF16"), made(channels=2)],
    ids=["identity", "dtype", "channels"],
)
def test_of_another_encoder(cache: Path, other: PromptCache) -> None:
    made().get(PROMPT, lambda: ENTRY)
    assert other.find(PROMPT) is None


def test_files_that_change_while_a_prompt_is_read(cache: Path) -> None:
    identities = iter(["before", "before", "after", "after"])
    changing = PromptCache(lambda: next(identities), "F32", 4)
    assert changing.get(PROMPT, lambda: ENTRY) is ENTRY
    assert not files(cache) and changing.find(PROMPT) is None
    unknown = made(None)
    assert unknown.get(PROMPT, lambda: ENTRY) is ENTRY and unknown.find(PROMPT) is None


def test_every_changed_byte_is_found(cache: Path) -> None:
    made().get(PROMPT, lambda: ENTRY)
    (path,) = files(cache)
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert made().find(PROMPT) is None, position
        assert not path.exists()
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        assert made().find(PROMPT) is None and not path.exists()
    # read anew
    assert made().get(PROMPT, lambda: ENTRY) is ENTRY
    assert path.read_bytes() == content and same(made().find(PROMPT))


def _huge(content: bytes) -> bytes:
    return content + bytes(1 << 20)


def _nan(content: bytes) -> bytes:
    """With a checksum that fits."""
    values = VALUES.copy()
    values[0, 2, 1] = np.nan
    length = struct.unpack("<Q", content[:8])[0]
    key = content[8 : 8 + length].partition(b'"key": "')[2][:64].decode()
    return prompt_cache._file(key, Entry("F32", (1, 5, 4), values.tobytes(), 3))


def _long(content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    key = content[8 : 8 + length].partition(b'"key": "')[2][:64].decode()
    return prompt_cache._file(key, Entry("F32", (1, 301, 4), bytes(301 * 16), 3))


@pytest.mark.parametrize("damage", [_huge, _nan, _long])
def test_what_is_no_entry(cache: Path, damage: Callable[[bytes], bytes]) -> None:
    made().get(PROMPT, lambda: ENTRY)
    (path,) = files(cache)
    path.write_bytes(damage(path.read_bytes()))
    assert made().find(PROMPT) is None and not path.exists()


def test_an_entry_under_another_name(cache: Path) -> None:
    made().get(PROMPT, lambda: ENTRY)
    (path,) = files(cache)
    content = path.read_bytes()
    made().get(("a fish", CHI), lambda: ENTRY)
    (other,) = set(files(cache)) - {path}
    other.write_bytes(content)
    assert made().find(("a fish", CHI)) is None and same(made().find(PROMPT))


def test_the_least_used_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Text] = [(f"prompt {number}", CHI) for number in range(5)]

    def write(text: Text, at: int) -> None:
        before = set(files(cache))
        made().get(text, lambda: ENTRY)
        for path in set(files(cache)) - before:
            os.utime(path, (at, at))

    for number, text in enumerate(texts[:3]):
        write(text, number)
    size = files(cache)[0].stat().st_size
    assert same(made().find(texts[0]))
    # which was used now
    monkeypatch.setattr(prompt_cache, "MOST", 3 * size)
    write(texts[3], 3)
    assert [made().find(text) is not None for text in texts] == [True, False, True, True, False]
    monkeypatch.setattr(prompt_cache, "MOST_FILES", 1)
    write(texts[4], 4)
    assert len(files(cache)) == 1 and same(made().find(texts[4]))


def test_memory_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = made()
    monkeypatch.setattr(prompt_cache, "_IN_MEMORY", 2 * len(ENTRY.content))
    for number in range(5):
        kept.get((f"prompt {number}", CHI), lambda: ENTRY)
    assert len(kept._kept) == 2
    # the newest stays, however large
    monkeypatch.setattr(prompt_cache, "_IN_MEMORY", 1)
    kept.get(PROMPT, lambda: ENTRY)
    assert len(kept._kept) == 1 and kept.find(PROMPT) is ENTRY


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prompt_cache.atomic.os, "replace", full)
        kept = made()
        assert kept.get(PROMPT, lambda: ENTRY) is ENTRY and kept.get(PROMPT, never) is ENTRY
    assert not files(cache)
    # a file in its place
    cache.rmdir() if not (cache / "prompts").exists() else (cache / "prompts").rmdir()
    (cache / "prompts").write_text("mine")
    assert made().get(PROMPT, lambda: ENTRY) is ENTRY
    monkeypatch.setattr(prompt_cache, "user_cache", lambda: None)
    kept = made()
    assert kept.get(PROMPT, lambda: ENTRY) is ENTRY and kept.get(PROMPT, never) is ENTRY


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_cache(cache: Path) -> None:
    made().get(PROMPT, lambda: ENTRY)
    (cache / "prompts").chmod(0o500)
    try:
        assert same(made().get(PROMPT, never))
        assert made().get(("a fish", CHI), lambda: ENTRY) is ENTRY
        assert len(files(cache)) == 1
    finally:
        (cache / "prompts").chmod(0o700)


def test_two_processes_at_once(cache: Path) -> None:
    code = """
from sana_edge.store import prompt_cache
from sana_edge.store.prompt_cache import Entry, PromptCache
prompt_cache.MOST_FILES = 8
for turn in range(40):
    one = PromptCache(lambda: "an encoder", "F32", 4)
    values = bytes([turn % 12] * 80)
    found = one.get((f"prompt {turn % 12}", None), lambda: Entry("F32", (1, 5, 4), values, 0))
    assert found.content == values, turn
"""
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    left = files(cache)
    assert 0 < len(left) <= 9 and all(path.suffix == ".safetensors" for path in left)


def test_what_the_last_plan_read() -> None:
    last, made_ = LastTexts[str](), []

    def make(number: int) -> str:
        made_.append(number)
        return f"{number}"

    negative: Text = ("", None)
    assert last.missing([negative, PROMPT, negative]) == [0, 1]
    assert last.get([negative, PROMPT], make) == ["0", "1"]
    assert last.missing([negative, ("a fish", CHI), PROMPT]) == [1]
    assert last.get([negative, ("a fish", CHI)], make) == ["0", "1"] and made_ == [0, 1, 1]
    assert last.get([negative, ("a fish", list(CHI))], make) == ["0", "1"] and len(made_) == 3
    last.keep()
    assert last.get([negative], make) == ["0"] and len(made_) == 4


def test_a_checksum_is_noted(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, digests = tmp_path / "weights", []
    path.write_bytes(b"abc")
    digest = user.digest
    monkeypatch.setattr(user, "digest", lambda paths: digests.append(1) or digest(paths))
    expected = digest([path])
    assert user.known_digest(path) == expected and user.known_digest(path) == expected
    user._digest.cache_clear()
    # as another process has it
    assert user.known_digest(path) == expected and len(digests) == 1
    path.write_bytes(b"abd")
    assert user.known_digest(path) == digest([path]) != expected and len(digests) == 2
    for note in (cache / "digests").iterdir():
        note.write_text("no checksum")
    user._digest.cache_clear()
    assert user.known_digest(path) == digest([path]) and len(digests) == 3
