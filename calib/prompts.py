"""What calibration asks for: versioned sets of prompts, one prompt per line, bundled or from a file."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sana_edge.errors import InvalidInput, reason
from sana_edge.system.json_values import read_bounded

BUNDLED = Path(__file__).parent / "prompts"
OWN_SET = "calibration_prompts.txt"
"""The file by which a model folder brings prompts of its own."""

# about 1000 tokens, of which the text encoder reads 300
MAX_CHARACTERS = 4000
_MAX_BYTES, _MAX_LINES = 16 << 20, 300_000

_FORMAT = "give a UTF-8 text file with one prompt per line; lines that begin with # are comments"


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order in which they are observed.

    Attributes:
        name: of a bundled set or a file, without its ending.
        prompts: normalised, none twice, at least one.
        checksum: sha256 of the prompts, in hexadecimal.
        notes: what was dropped, for the user.
    """

    name: str
    prompts: tuple[str, ...]
    checksum: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, prompts: Iterable[str], name: str = "own") -> PromptSet:
        """Normalise prompts (Unicode NFC, runs of white space to one blank) and drop repeated ones.

        Raises:
            InvalidInput: no prompt is left, or one has more than `MAX_CHARACTERS` characters.
        """
        lines = [" ".join(unicodedata.normalize("NFC", prompt).split()) for prompt in prompts]
        lines = [line for line in lines if line]
        # the text encoder reads lower case
        first = {line.lower(): line for line in reversed(lines)}
        unique = tuple(line for line in dict.fromkeys(lines) if first[line.lower()] == line)
        if not unique:
            raise InvalidInput(f"the prompt set {name} has no prompts", _FORMAT)
        for number, prompt in enumerate(unique, start=1):
            _check_length(prompt, f"prompt {number} of {name}")
        dropped = len(lines) - len(unique)
        notes = (f"{name}: {dropped} repeated prompts were dropped",) if dropped else ()
        text = "\n".join(unique).encode(errors="surrogatepass")
        return cls(name, unique, hashlib.sha256(text).hexdigest(), notes)


def bundled_sets() -> list[str]:
    """The names of the sets that come with this package."""
    return sorted(path.stem for path in BUNDLED.glob("*.txt"))


def load_prompts(source: str | Path) -> PromptSet:
    """Read a bundled set by its name, or a file.

    Raises:
        InvalidInput: nothing has this name, it cannot be read or is no text, has no prompt, or one that is
            too long.
    """
    if source in bundled_sets():
        path, name = BUNDLED / f"{source}.txt", str(source)
    else:
        path, name = Path(os.path.expanduser(source)), Path(source).stem
    prompts = []
    for number, line in enumerate(re.split("\r\n|\r|\n", _text(path)), start=1):
        if (prompt := " ".join(line.split())) and not prompt.startswith("#"):
            _check_length(prompt, f"line {number} of {path}")
            prompts.append(prompt)
    if not prompts:
        raise InvalidInput(f"{path} has no prompts: it is empty or has only comments", _FORMAT)
    return PromptSet.of(prompts, name)


def default_set(model: str, folder: Path | None = None) -> PromptSet:
    """The set for a model: its folder's own, the scenes that sana-tiny was trained on, or general-v1."""
    if folder is not None and (folder / OWN_SET).is_file():
        return load_prompts(folder / OWN_SET)
    return load_prompts("scenes-v2" if model in ("sana-tiny", "sana-tiny-int8") else "general-v1")


def _check_length(prompt: str, where: str) -> None:
    if len(prompt) > MAX_CHARACTERS:
        raise InvalidInput(
            f"{where} has {len(prompt)} characters ({prompt[:40]}...)",
            f"choose prompts of at most {MAX_CHARACTERS}, one per line; 300 tokens of each are read",
        )


def _text(path: Path) -> str:
    try:
        if path.is_dir():
            raise InvalidInput(f"{path} is a folder, not a file of prompts", _FORMAT)
        if not path.exists():
            raise InvalidInput(
                f"no prompt file {path}", f"give a file, or a bundled set: {', '.join(bundled_sets())}"
            )
        content = read_bounded(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the name
        raise InvalidInput(f"cannot read the prompts in {path}: {reason(error)}", _FORMAT) from error
    if b"\0" in content:
        raise InvalidInput(f"{path} is not a text file: it has NUL bytes", _FORMAT)
    if content.count(b"\n") + content.count(b"\r") > 2 * _MAX_LINES:
        raise InvalidInput(f"{path} has more than {_MAX_LINES} lines", _FORMAT)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not UTF-8 text: byte {error.start} does not fit", _FORMAT) from error
