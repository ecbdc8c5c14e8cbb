"""What a small model was trained on, if its folder says so: its words and the sizes of its pictures.

`tokenizer/domain.json` is ``{"words": ["a", "above", ...], "sizes": [[256, 256]]}``, words in lower case and
sorted, emoji among them, sizes as width and height. It goes where the tokenizer goes: into INT8 packages and
exported folders. The public models have none: they know any word.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from sana_edge.store.folder import read_json
from sana_edge.system.json_values import Reader

FILE = "tokenizer/domain.json"
SHOWN = 6
"""Unknown words that a note names; the others are counted."""
_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Domain:
    """Words in lower case, and sizes (width, height) in pixels, of a model's training."""

    words: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]

    def unknown(self, text: str) -> list[str]:
        """The words and pictographs of ``text`` that were not in training, in their order, each once.

        Words with digits in them and punctuation are passed over. Of compounds each part may be known
        instead, as in "red-black" and "the cat's".
        """
        known = frozenset((*self.words, "s"))
        found = (word for word in words_of(text) if word not in known)
        return list(dict.fromkeys(w for w in found if not set(re.split(r"['\u2019-]", w)) <= known))

    def notes(self, model: str, texts: tuple[str, ...], size: tuple[int, int]) -> tuple[str, ...]:
        """Sentences about what of the prompts and the size (width, height) is foreign to ``model``."""
        notes = []
        if unknown := self.unknown(" ".join(texts)):
            more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
            notes.append(f"{model} does not know: {', '.join(unknown[:SHOWN])}{more}")
        if self.sizes and size not in self.sizes:
            trained = ", ".join(f"{width}x{height}" for width, height in self.sizes)
            notes.append(f"{model} was trained at {trained}, not at {size[0]}x{size[1]}: expect debris")
        return tuple(notes)


def words_of(text: str) -> list[str]:
    """The words and pictographs of a text, in lower case."""
    return [word for word in _WORD.findall(text.lower()) if _counts(word)]


def read_domain(folder: Path) -> Domain | None:
    """The domain of a model folder or an exported one; None where it says nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    domain: Domain = Reader(str(path), "download the model again").convert(read_json(path), Domain)
    return domain


def _counts(word: str) -> bool:
    """Whether it is a word of letters alone, or a pictograph."""
    if len(word) == 1 and not word.isalnum():
        return unicodedata.category(word) == "So"
    return not any(c.isdigit() for c in word)
