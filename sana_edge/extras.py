"""What is optional to install, and the error where it is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from sana_edge.errors import MissingDependency

_TORCH = ("torch", "transformers")
_EXPORT = (*_TORCH, "onnx", "onnxruntime")


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
