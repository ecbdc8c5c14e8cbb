"""What all commands share: processes, times, tables, the record of the machine and the results file.

Nothing here knows a model or an engine; `works`, `judge` and `gpu` import from here, never the other way.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# the checkout where sana-edge is not installed, and only there: its kernels/ is another package's name
if importlib.util.find_spec("sana_edge") is None:
    sys.path.append(str(ROOT))


def needs(*modules: str) -> None:
    """End the command with a hint where one of its modules is not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        hint = "pip install -e '.[bench]', in the checkout"
        raise SystemExit(f"error: this needs {', '.join(missing)}, which is not installed\nhint:  {hint}")
