"""What is optional to install, and the error where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sana_edge.errors import MissingDependency

_TORCH_EXTRA = ("torch", "transformers")


@contextmanager
def torch_extra() -> Iterator[None]:
    """Mark imports that the ``[torch]`` extra brings.

    Raises:
        MissingDependency: one of them is not installed; the hint has the command.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _TORCH_EXTRA:
            raise
        raise MissingDependency(
            f"this needs {error.name}, which is not installed", "pip install 'sana-edge[torch]'"
        ) from error
