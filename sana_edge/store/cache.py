"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "SANA_EDGE_CACHE"


def user_cache() -> Path | None:
    """The folder, which may not exist yet: $SANA_EDGE_CACHE, or sana-edge among the user's caches.

    None where the user has no home.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen)
    above = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if above and os.path.isabs(above):
        return Path(above) / "sana-edge"
    try:
        return Path.home() / ".cache" / "sana-edge"
    except RuntimeError:
        return None
