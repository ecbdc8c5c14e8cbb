"""What runs in a process of its own, and where engines do it cannot import torch.

    python benchmarks/works/picture_process.py cli generate --model onnx --prompt "a red house"

is the command line without torch. With a model folder and an output it draws two pictures, of different
prompts, with a whole Sprint model, and prints one JSON object. The first is what a user waits for after the
start, the second what each later one takes: nothing of it is known from the first but what does not depend on
the prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

BLOCKED = ("torch", "transformers", "diffusers", "onnx")


class _Blocked:
    """A finder that refuses `BLOCKED`, before all others."""

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


def block() -> None:
    """Let every later import of `BLOCKED` fail."""
    sys.meta_path.insert(0, _Blocked())


def main() -> int:
    if sys.argv[1:2] == ["cli"]:
        block()
        from sana_edge.cli.main import main as cli

        return cli(sys.argv[2:])
    options = _options()
    if options.by not in ("diffusers", "torch"):
        block()
    from sana_edge.bench.drawers import loaded
    from sana_edge.bench.order import Order
    from sana_edge.bench.worker import FIRST, LATER

    size = (options.size, options.size)
    order = Order(
        *(options.by, options.model, str(options.output), options.started, size, options.steps),
        dtype=options.dtype,
        device="cpu",
    )
    drawer = loaded(order)
    # the first picture's time begins with the process
    before = options.started
    found: dict[str, Any] = {"load": time.time() - before}
    for name, prompt in (("first", FIRST), ("second", LATER.format("green"))):
        picture, seconds = drawer.draw(order.request(prompt), lambda at: None)
        picture.save(options.output / f"{name}.png")
        seconds["denoise"] = seconds.pop("loop")
        found |= {f"{name} {part}": spent for part, spent in seconds.items()}
        found[name], before = time.time() - before, time.time()
    from sana_edge.system.memory import peak_memory

    print(json.dumps({**found, "peak": peak_memory()}))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="draw two pictures and say how long they took")
    add = parser.add_argument
    add("model", help="a model folder, or an exported one for an engine")
    add("output", type=Path, help="a folder for the pictures")
    add("--by", required=True, help="diffusers, torch, or an engine")
    add("--dtype", required=True)
    add("--size", type=int, required=True)
    add("--steps", type=int, required=True)
    add("--started", type=float, required=True, help="when this process was started, seconds of time.time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
