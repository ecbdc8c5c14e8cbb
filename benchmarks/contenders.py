"""What is compared: implementations of the same work, each a set of stages that are calls without arguments.

To add an implementation, give it an entry in the ``loaders`` of the works that it can do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from sana_edge.sampler import guide

OURS = "sana-edge"
INT8 = "sana-edge int8"
BASELINE = "diffusers"
# its network under torch.compile, on a GPU
COMPILED = "diffusers compiled"
CONTENDERS = (OURS, INT8, BASELINE, COMPILED)

Output = Tensor | NDArray[np.uint8] | None
"""What a stage returns, to be compared: pictures are (H, W, 3) uint8, None is not compared."""


@dataclass(frozen=True)
class Stage:
    """A call without arguments, and the bytes of the weights that it uses where they were counted."""

    call: Callable[[], Output]
    weights: int | None = None

    def __call__(self) -> Output:
        return self.call()


Loader = Callable[[], dict[str, Stage]]
"""Loads an implementation and returns its stages by name."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What all implementations do, in plain values: processes of their own get a copy.

    dtype: "fp32", "bf16" or "fp16"; device: "cpu" or "cuda"; threads: of torch.
    """

    dtype: str
    device: str
    threads: int

    @property
    def title(self) -> str:
        raise NotImplementedError

    @property
    def facts(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return dataclasses.asdict(self)

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages, in the order of their measurement; an implementation may lack some."""
        raise NotImplementedError

    @property
    def unequal(self) -> tuple[str, ...]:
        """Stages whose outputs may differ by more than rounding, and in INT8 by more than quantization."""
        return ()

    @property
    def loose(self) -> Mapping[str, float]:
        """Stages that magnify rounding: how far any output may be, relative L2."""
        return {}

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        """How far quantization may move the outputs of stages, relative L2; others are not limited."""
        return {}

    def loaders(self) -> dict[str, Loader]:
        """The implementations by name; calling this makes the weights that they share."""
        raise NotImplementedError


def weight_bytes(*modules: nn.Module) -> int:
    """Of their parameters and buffers, each counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def guided(predicted: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of a prediction for the negative and the positive prompt, (2, C, h, w)."""
    return guide(predicted.float().chunk(2), guidance)
