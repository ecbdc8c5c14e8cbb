"""The known name that was meant by one that is unknown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from sana_edge.store.known_models import KNOWN

# as people write the sizes of models and pictures: in millions or billions, in pixels or thousands of them
_WRITTEN = (
    (r"_diffusers$|^efficient-large-model/|px\b", ""),
    (r"\b600m\b", "0.6b"),
    (r"\b1600m\b", "1.6b"),
    (r"\b4800m\b", "4.8b"),
    (r"\b1k\b", "1024"),
    (r"\b2k\b", "2048"),
    (r"\b4k\b", "4096"),
    (r"sana(?=\d)", "sana-"),
)
_CUTOFF = 0.6


def close_model(asked: str, bundled: Iterable[str]) -> str | None:
    """The name of a bundled or public model that is meant by ``asked``, a name or a repository; None: none.

    Names are compared as words in any order: "Sana_600M_512px" is sana-0.6b-512.
    """
    if len(asked) > 200:
        return None
    names = {_words(name): name for name in bundled}
    names |= {_words(model.repository): model.name for model in KNOWN.values()}
    names |= {_words(name): name for name in KNOWN}
    words = _words(asked)

    def likeness(other: str) -> tuple[int, float]:
        common = set(words.split()) & set(other.split())
        return len(common), difflib.SequenceMatcher(None, words, other).ratio()

    best = max(names, key=likeness)
    telling = set(words.split()) & set(best.split()) - {"sana"}
    return names[best] if telling or likeness(best)[1] >= _CUTOFF else None


def _words(name: str) -> str:
    """The words of a name in alphabetical order, sizes written as in `KNOWN`."""
    text = re.sub(r"[_\s]+", "-", name.lower().replace("_diffusers", ""))
    for pattern, written in _WRITTEN:
        text = re.sub(pattern, written, text)
    words = text.strip("-").split("-")
    return " ".join(sorted(words))
