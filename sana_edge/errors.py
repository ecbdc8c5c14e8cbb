"""Errors that users see: what went wrong, with which value, and what to do about it."""

from __future__ import annotations


class SanaError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: what went wrong and the value that caused it, one line, lower case.
        hint: the next thing to try, one line; empty where nothing can be done.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InvalidInput(SanaError):
    """An argument is outside of what can be generated."""


class ModelNotFound(SanaError):
    """No bundled model, folder or repository has this name."""


class CheckpointError(SanaError):
    """A model folder is incomplete, damaged or of another shape than its config says."""


class MissingDependency(SanaError):
    """An optional package is needed; the hint names the extra that brings it."""


class UnsupportedDevice(SanaError):
    """The device or backend asked for cannot run here; the message says why."""


class OutOfMemory(SanaError):
    """A stage needs more memory than is free."""


class Cancelled(SanaError):
    """The caller cancelled between two steps."""
