"""One step of `gpu_check.py`: `python -m gpu operations SETTING`, the second as JSON values.

A step is the function ``check`` of a module here, of a `Setting` and the file for what it finds.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from gpu.steps import Setting
from harness.results import ended
from sana_edge.bench.machine import gpu_facts
from sana_edge.bench.results import header, write_json


def main() -> int:
    name, given = sys.argv[1], json.loads(sys.argv[2])
    output = Path(given.pop("output"))
    if name == "machine":
        return ended(lambda: write_json(output, _circumstances(given["arguments"])))
    setting = Setting.from_json(given.pop("setting"))
    check = importlib.import_module(f"gpu.{name}").check
    return ended(lambda: check(setting, output, **given))


def _circumstances(arguments: list[str]) -> dict[str, Any]:
    # loads torch, which the machine's record asks for the GPU
    found = gpu_facts()
    return {**header("benchmarks/gpu_check.py", arguments), **found}


if __name__ == "__main__":
    sys.exit(main())
