"""SANA text-to-image on laptops: `Sana.load`, `Sana.generate`, `Sana.stream`.

The names below are loaded when they are first used, so that ``import sana_edge`` needs no torch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sana_edge.errors import (
        Cancelled,
        CheckpointError,
        InvalidInput,
        MissingDependency,
        ModelNotFound,
        OutOfMemory,
        SanaError,
        UnsupportedDevice,
    )
    from sana_edge.generation import Step
    from sana_edge.image import Image, read_metadata
    from sana_edge.pipeline import Sana
    from sana_edge.series.many import generate_many

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "CheckpointError",
    "Image",
    "InvalidInput",
    "MissingDependency",
    "ModelNotFound",
    "OutOfMemory",
    "Sana",
    "SanaError",
    "Step",
    "UnsupportedDevice",
    "__version__",
    "generate_many",
    "read_metadata",
]

# a library says nothing unless the application listens
logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "Image": "image",
    "Sana": "pipeline",
    "Step": "generation",
    "generate_many": "series.many",
    "read_metadata": "image",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sana_edge.errors import torch_extra

    with torch_extra():
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, 'errors')}")
    return getattr(home, name)


def __dir__() -> list[str]:
    return __all__
