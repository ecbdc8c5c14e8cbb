"""A folder's tokenizer, read from its ``tokenizer.json``: code that the folder names is never looked at.

The library is written in Rust and called in this file only. What it does with a text is the file's to say,
and it cannot be interrupted, so that only parts are taken whose time and output are bounded: no regular
expressions of the file's own, no table that turns a letter into a page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from sana_edge.errors import CheckpointError
from sana_edge.store.folder import read_json, read_text
from sana_edge.store.identify import explain
from sana_edge.system.json_values import parse
from sana_edge.system.memory import is_memory

FILE = "tokenizer.json"
# bytes; Gemma's has 34 MB
_LARGEST = 128 << 20
# what may stand before a model; Gemma's has Replace and Split, both with a plain string
_NORMALIZERS = (
    *("Sequence", "Replace", "Prepend", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Strip", "StripAccents"),
    *("Nmt", "BertNormalizer", "ByteLevel"),
)
_SPLITS = (
    *("Sequence", "Split", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation"),
    *("Digits", "BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "FixedLength"),
)
# parts in a row, and characters that one may put in the place of another
_PARTS, _LONGEST = 8, 16
# of all parts together
_GROWTH = 64
# tokens beside a text's own
_ADDED = 16


class PromptTokenizer:
    """Turns text into token ids.

    Args:
        folder: has ``tokenizer.json``, and maybe ``tokenizer_config.json``, which says on which side to cut.
        hint: what to do where a file is missing or damaged.

    Raises:
        CheckpointError: a file is missing or damaged, or might take for ever.
    """

    def __init__(self, folder: Path, hint: str = "the model folder is incomplete; download it again") -> None:
        from tokenizers import Tokenizer

        path, config = folder / FILE, folder / "tokenizer_config.json"
        self._path, self._hint = path, hint
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", hint)
        side = read_json(config).get("truncation_side", "right") if config.is_file() else "right"
        self._side = "left" if side == "left" else "right"
        with self._foreign("cannot be read"):
            tokenizer = Tokenizer.from_str(read_text(path, _LARGEST))
            # what is stored says how training was batched
            tokenizer.no_padding()
            tokenizer.no_truncation()
            if getattr(tokenizer.model, "dropout", None):
                # a prompt has one reading
                tokenizer.model.dropout = None
            added = tokenizer.num_special_tokens_to_add(is_pair=False)
            parts = [part and part.__getstate__() for part in (tokenizer.normalizer, tokenizer.pre_tokenizer)]
        for part, known in zip(parts, (_NORMALIZERS, _SPLITS), strict=True):
            self._check(part, known)
        if added > _ADDED:
            self._refuse(f"adds {added} tokens to each text")
        self._tokenizer = tokenizer

    def encode(self, text: str, *, limit: int | None = None, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``, at most ``limit``.

        Raises:
            CheckpointError: there are none, or the tokenizer fails.
        """
        with self._foreign("fails"):
            if limit is None:
                self._tokenizer.no_truncation()
            else:
                self._tokenizer.enable_truncation(limit, direction=self._side)
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if not ids:
            raise CheckpointError("the tokenizer gives no tokens", self._hint)
        return ids

    @contextmanager
    def _foreign(self, what: str) -> Iterator[None]:
        """Turn whatever the library raises into one error."""
        try:
            yield
        except CheckpointError:
            raise
        except BaseException as error:  # plain Exception, and a panic of the library's is none
            if isinstance(error, KeyboardInterrupt | SystemExit) or is_memory(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            known, hint = explain(self._path, self._hint)
            raise CheckpointError(f"{self._path} {what}{known or f': {reason}'}", hint) from error

    def _check(self, state: bytes | None, known: tuple[str, ...]) -> None:
        """See that a part, by its JSON, is made of known ones and makes no text much longer."""
        steps = list(_steps(parse(state))) if state is not None else []
        if len(steps) > _PARTS:
            self._refuse(f"has {len(steps)} steps before its vocabulary")
        growth = 1
        for step in steps:
            if step.get("type") not in known:
                self._refuse(f"has a {json.dumps(step.get('type'))[:40]} before its vocabulary")
            pattern, content = step.get("pattern"), step.get("content", step.get("prepend", ""))
            if isinstance(pattern, dict) and "String" not in pattern:
                self._refuse("has a regular expression, which might never end")
            empty = isinstance(pattern, dict) and not pattern["String"]
            if empty or not isinstance(content, str) or len(content) > _LONGEST:
                self._refuse("replaces a text by a much longer one")
            growth *= max(len(content), 1) if step["type"] == "Replace" else 1
        if growth > _GROWTH:
            self._refuse("replaces a text by a much longer one")

    def _refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{self._path} {what}: SANA's tokenizers have no such thing", self._hint)


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A part, or the parts of a sequence one by one."""
    inner = part.get("normalizers", part.get("pretokenizers"))
    if part.get("type") != "Sequence" or not isinstance(inner, list):
        yield part
        return
    for each in inner:
        yield from _steps(each)
