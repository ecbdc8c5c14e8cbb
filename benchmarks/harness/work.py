"""What is compared: implementations of the same work, each a set of stages, calls without arguments."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.results import INT8
from sana_edge.bench.shapes import weights
from sana_edge.sampler import guide
from sana_edge.torch_runtime.device import DTYPES

# relative L2; in 16 bits two right orders of summation drift this far apart over many layers
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}

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
    def int8_tolerance(self) -> Mapping[str, float]:
        """How far quantization may move the outputs of stages, relative L2; others are not limited."""
        return {}

    def limit(self, stage: str, name: str) -> float | None:
        """How far an output may be from the reference's, relative L2; None where it may be anything."""
        own = self.int8_tolerance.get(stage, math.inf) if name == INT8 else 0
        return TOLERANCE[self.dtype] + own

    def loaders(self) -> dict[str, Loader]:
        """The implementations by name; calling this makes the weights that they share."""
        raise NotImplementedError


def random_weights(shapes: Mapping[str, Tensor], work: Work) -> dict[str, Tensor]:
    """`sana_edge.bench.shapes.weights` for a work, where it runs."""
    return {name: t.to(work.device) for name, t in weights(shapes, DTYPES[work.dtype])}


def weight_bytes(*modules: nn.Module) -> int:
    """Of their parameters and buffers, each counted once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def guided(predicted: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance of a prediction for the negative and the positive prompt, (2, C, h, w)."""
    return guide(predicted.float().chunk(2), guidance)
