"""Scales of layers' inputs from one run: what calibration finds with many, where only speed is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.int8.quant import QMAX

# of a layer that saw nothing but zeros
_LEAST = 1e-6


@torch.no_grad()
def static_scales(model: nn.Module, targets: Iterable[str], run: Callable[[], Any]) -> dict[str, float]:
    """One step of INT8 for each target, by its largest input.

    Args:
        targets: names of layers that have an ``observer``.
        run: calls the model.
    """
    largest: dict[str, float] = {}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    for name, layer in layers.items():

        def listen(x: Tensor, name: str = name) -> None:
            largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))

        layer.observer = listen
    try:
        run()
    finally:
        for layer in layers.values():
            layer.observer = None
    return {name: max(value, _LEAST) / QMAX for name, value in largest.items()}
