"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sana_edge.errors import extra

from . import recipe
from .muon import Muon


def make_optimizers(model: nn.Module, settings: recipe.Optimizer, rate: float) -> list[torch.optim.Optimizer]:
    """What trains all parameters of a denoiser, at the learning rate ``rate``.

    Raises:
        MissingDependency: came is not installed.
    """
    options: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if settings.betas:
        options["betas"] = settings.betas
    if settings.name == "came":
        with extra("train", "came_pytorch"):
            from came_pytorch import CAME
        return [CAME(model.parameters(), rate, **options, **({"eps": settings.eps} if settings.eps else {}))]
    if settings.eps:
        options["eps"] = settings.eps[0]
    if settings.name == "adamw":
        return [torch.optim.AdamW(model.parameters(), rate, **options)]
    return _muon(model, settings, rate, options)


def _muon(
    model: nn.Module, settings: recipe.Optimizer, rate: float, options: dict[str, Any]
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW without decay for all else."""
    named = [
        (p, p.ndim == 2 and ".blocks." in f".{name}" and not name.endswith("table"))
        for name, p in model.named_parameters()
    ]
    matrices, rest = [p for p, matrix in named if matrix], [p for p, matrix in named if not matrix]
    muon = Muon(matrices, rate, weight_decay=settings.weight_decay)
    return [muon, torch.optim.AdamW(rest, rate / 2, **{**options, "weight_decay": 0.0})]
