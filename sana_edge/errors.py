"""Errors that users see: what went wrong, with which value, what to do; and extras that are missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

_TORCH = ("torch", "transformers")
# characters of a message; a path may have 4096
_LONGEST = 1500
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
_EXPORT = (*_TORCH, "onnx", "onnxruntime")


class SanaError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: what went wrong and the value that caused it, one line, lower case.
        hint: the next thing to try, one line; empty where nothing can be done.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        message = one_line(message)
        super().__init__(message)
        self.message = message
        self.hint = one_line(hint)


class InvalidInput(SanaError):
    """An argument is outside of what can be generated."""


class ModelNotFound(SanaError):
    """No bundled model, folder or repository has this name."""


class CheckpointError(SanaError):
    """A model folder is incomplete, damaged or of another shape than its config says."""

    def __init__(
        self, message: str, hint: str = "the files are damaged or of another model; download them again"
    ) -> None:
        super().__init__(message, hint)


class DamagedWeights(CheckpointError):
    """A weight is NaN or infinite, or a scale is not above 0; `weights.values_named` names its file."""


class MissingDependency(SanaError):
    """An optional package is needed; the hint names the extra that brings it."""


class UnsupportedDevice(SanaError):
    """The device or backend asked for cannot run here; the message says why."""


class OutOfMemory(SanaError):
    """A stage needs more memory than is free; ``needed`` and ``free`` are bytes, None where unknown."""

    def __init__(
        self, message: str, hint: str = "", *, needed: int | None = None, free: int | None = None
    ) -> None:
        super().__init__(message, hint)
        self.needed = needed
        self.free = free


class Cancelled(SanaError):
    """The caller cancelled: between two steps, parts of a decode, or parts of a model being loaded."""


def reason(error: BaseException) -> str:
    """Why something failed, for a message that names the file: an OSError's words alone."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def one_line(text: str) -> str:
    """A text of strangers for a terminal: without line ends, escapes and marks of direction, not too long."""
    text = _FORBIDDEN.sub(" ", text[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


@contextmanager
def extra(name: str, *modules: str) -> Iterator[None]:
    """Mark imports of ``modules``, which the extra called ``name`` brings.

    Raises:
        MissingDependency: one of them is not installed; the hint has the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in modules:
            raise
        raise MissingDependency(
            f"this needs {error.name}, which is not installed", f"pip install 'sana-edge[{name}]'"
        ) from error


def torch_extra() -> AbstractContextManager[None]:
    """`extra` for what runs and changes models."""
    return extra("torch", *_TORCH)


def export_extra() -> AbstractContextManager[None]:
    """`extra` for what makes and checks ONNX graphs."""
    return extra("export", *_EXPORT)
