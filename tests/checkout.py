"""Makes `sana_edge` that of this checkout, whatever is installed; for scripts that tests run by their path."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def use() -> None:
    """Import the package from the repository's root, which does not stay on sys.path: see CONTRIBUTING."""
    sys.path.insert(0, str(ROOT))
    import sana_edge

    sys.path.remove(str(ROOT))
    found = Path(sana_edge.__file__).resolve().parent
    if found != ROOT / "sana_edge":
        raise ImportError(f"sana_edge comes from {found}, not from {ROOT}")
