"""The command line's arguments: a parser whose errors name what was meant, and what several commands take."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from sana_edge.errors import InvalidInput
from sana_edge.request.loading import BACKENDS, DEVICES
from sana_edge.system.budget import parse_memory

_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")
SIZE = re.compile(r"(-?\d{1,9})(?:[xX\u00d7*](-?\d{1,9}))?")
# what is read of stdin, in bytes: far more than the 300 tokens that a model reads
_MOST_PROMPT = 1 << 20


class UsageError(Exception):
    """A command line that is none; ``parser`` is the one whose usage helps."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(message)
        self.parser, self.message = parser, message


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` where argparse would end the program."""

    def error(self, message: str) -> NoReturn:
        choice = _CHOICE.search(message)
        if choice is not None:
            message += _meant(choice[1], re.split(r"[', ]+", choice[2]))
        raise UsageError(self, message)

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Say that there are no such arguments, and which option was meant."""
        message = f"unrecognized arguments: {' '.join(unknown)}"
        options = [word for word in unknown if word.startswith("-")]
        if options:
            message += _meant(options[0].partition("=")[0], self._option_string_actions)
        elif unknown:
            message += " (a prompt of several words stands in quotes)"
        self.error(message)


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels, or the side of a square."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 512x512, nor a side")
    return int(match[1]), int(match[2] or match[1])


def new_file(text: str) -> Path:
    """Read the name of a file that is written beside what stdout has."""
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(f"{text!r} is no file's name, and stdout has the tables")
    return Path(text)


def tile(text: str) -> int:
    """Read the side of a tile in pixels, or off, which is 0."""
    if text != "off" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pixels, nor off")
    return 0 if text == "off" else int(text)


def memory(text: str) -> int:
    """Read a budget of memory, such as 8GB, as bytes."""
    try:
        return parse_memory(text)
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(f"{error.message}: {error.hint}") from None


def add_revision(parser: argparse.ArgumentParser, of: str = "a repository") -> None:
    """Add ``--revision``."""
    text = f"of {of}: a branch, a tag or a commit (default: main, or the only one that is cached)"
    parser.add_argument("--revision", metavar="NAME", help=text)


_INT8 = "INT8 layers: the bundled package, or quantized while loading; packages are INT8 without it"


def add_load_options(parser: argparse.ArgumentParser, *, int8: str = _INT8) -> None:
    """Add how a model is loaded: fields of `sana_edge.request.loading.LoadOptions`, None where not given.

    Args:
        int8: the help of ``--int8``.
    """
    add = parser.add_argument
    dtypes = "of the denoiser (default: auto, the checkpoint's own; fp32 in place of what a CPU lacks;"
    dtypes += " what suits an engine)"
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), help=dtypes)
    add("--int8", action="store_true", default=None, help=int8)
    backend = "of the denoiser: triton and cuda need --int8 and a GPU; of exported folders: tensorrt, which"
    backend += " runs what `build` made, onnxruntime or openvino (default: auto, the best that works)"
    add("--backend", choices=BACKENDS, help=backend)
    devices = "for exported folders also gpu and npu, which are Intel's, and tensorrt, onnxruntime's own"
    devices += " TensorRT (default: %(default)s, cuda where it can be used)"
    add("--device", choices=DEVICES, default="auto", help=devices)
    engines = "of --backend tensorrt: what `build --output` wrote (default: your own engine folder)"
    add("--engines", type=Path, metavar="DIR", help=engines)
    trust = "load engines also from elsewhere than your own engine folder, which runs the code in them"
    add("--trust-engine", action="store_true", help=trust)
    counted = "that compute on a CPU (default: OMP_NUM_THREADS or the cores, within a container's quota)"
    add("--threads", type=int, metavar="N", help=counted)
    budget = "what may be taken, such as 8GB or 7500MB: networks are then loaded one after the other, and"
    budget += " pictures decoded in pieces, where it is too little for more (default: what is free)"
    add("--memory", type=memory, metavar="SIZE", help=budget)


def add_prompt_cache(parser: argparse.ArgumentParser) -> None:
    """Add ``--no-prompt-cache``."""
    text = "read every prompt anew, and keep nothing; what the text encoder makes of one is else kept in the"
    text += " user's cache, and the encoder loaded for new prompts alone"
    parser.add_argument("--no-prompt-cache", dest="prompt_cache", action="store_false", help=text)


def prompt_from_stdin() -> str:
    """All of stdin without white space around it.

    Raises:
        InvalidInput: it is longer than 1 MiB, or not UTF-8.
    """
    data = sys.stdin.buffer.read(_MOST_PROMPT + 1)
    if len(data) > _MOST_PROMPT:
        raise InvalidInput(
            f"stdin has more than {_MOST_PROMPT} bytes", "a model reads 300 tokens of a prompt"
        )
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"the prompt on stdin is not UTF-8: {error}", "convert it to UTF-8") from error
