"""The command line in a process that cannot import what an engine is to do without.

python benchmarks/without_torch.py generate --model onnx --prompt "a red house" --backend openvino
"""

from __future__ import annotations

import sys
from types import ModuleType

BLOCKED = ("torch", "transformers", "diffusers", "onnx")


class _Blocked:
    """A finder that refuses `BLOCKED`, before all others."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def block() -> None:
    """Let every later import of `BLOCKED` fail."""
    sys.meta_path.insert(0, _Blocked())


if __name__ == "__main__":
    block()
    from sana_edge.cli.main import main

    sys.exit(main(sys.argv[1:]))
