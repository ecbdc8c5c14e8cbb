"""Engines' libraries without their telemetry: no look-up, no upload, no identifier in the user's home."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def silence_onnxruntime() -> None:
    """Call before its first import; from 1.29 on it otherwise uploads events and stores a device ID."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@contextmanager
def silent_openvino() -> Iterator[None]:
    """Import openvino inside: it then does without its telemetry package, which looks up a host on import."""
    name = "openvino_telemetry"
    if name in sys.modules:
        yield
        return
    absent: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    absent[name] = None
    try:
        yield
    finally:
        sys.modules.pop(name, None)
