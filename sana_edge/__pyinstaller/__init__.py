"""PyInstaller's hook of this package, found through its entry point: no flags are needed.

Imports nothing of the package, and nothing imports it.
"""

from __future__ import annotations

from pathlib import Path


def get_hook_dirs() -> list[str]:
    """Where PyInstaller looks for hooks."""
    return [str(Path(__file__).parent)]
