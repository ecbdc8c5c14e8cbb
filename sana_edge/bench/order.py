"""What a process of its own is asked to do, how it is started, and why it failed."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass

from sana_edge.errors import SanaError
from sana_edge.request.request import Request

SEED = 7


@dataclass(frozen=True)
class Order:
    """What a process does.

    by: "torch", an engine or "diffusers", which draw; "random", "package" or "graphs", which make ``output``;
    model: a folder, of "random" a name of `sana_edge.bench.models.RANDOM`; started: seconds of `time.time`;
    dtype: of the denoiser, "half" for 16 bit where the machine multiplies that in hardware; output: the first
    picture's file, or the folder.
    """

    by: str
    model: str
    output: str
    started: float
    size: tuple[int, int] = (0, 0)
    steps: int = 0
    threads: int | None = None
    dtype: str = "fp32"
    device: str = "auto"

    @classmethod
    def read(cls, text: str) -> Order:
        values = json.loads(text)
        return cls(**{**values, "size": tuple(values["size"])})

    def text(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    def request(self, prompt: str) -> Request:
        return Request(prompt, size=self.size, exact_size=True, steps=self.steps, seed=SEED)


def command(order: Order) -> list[str]:
    """What runs an order in a process of its own, also where this program is frozen."""
    program = [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "sana_edge"]
    return [*program, "bench", "--worker", order.text()]


def failure(error: SanaError) -> str:
    """Why a process failed, for people: without the words that all failures share."""
    text = error.message.partition(" failed: ")[2] or error.message
    return text.removeprefix("error: ").replace(" hint:  ", "; ").strip()
