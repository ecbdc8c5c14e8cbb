"""What the networks of a model compute in: as asked, or what device and memory let be the fastest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sana_edge.plan.memory import fitting_dtypes
from sana_edge.plan.model import Facts
from sana_edge.system.budget import within
from sana_edge.system.memory import available_memory
from sana_edge.torch_runtime.device import DTYPES, without_fp16
from sana_edge.torch_runtime.load import load_dtype


@dataclass(frozen=True)
class Precision:
    """The dtypes of a model's networks.

    Attributes:
        denoiser: short name of its dtype.
        text: short name of the text encoder's, where it was chosen apart.
        others: of the decoder, and of what is not chosen apart.
        notes: what memory had a part in.
    """

    denoiser: str
    text: str | None
    others: torch.dtype
    notes: tuple[str, ...] = ()

    @property
    def texts(self) -> torch.dtype:
        """Of the text encoder and its features."""
        return self.others if self.text is None else DTYPES[self.text]


def choose_precision(
    facts: Facts, dtype: str, device: torch.device, *, int8: bool, fused: bool, memory: int | None
) -> Precision:
    """The dtypes for "auto" or a name of `DTYPES`, which is the denoiser's.

    Args:
        int8: float weights are made INT8 while they are loaded.
        fused: the steps run on the fused operations.
        memory: bytes that may be taken; None: what is free.
    """
    notes: tuple[str, ...] = ()
    text_dtype = None
    if dtype == "auto":
        dtype = load_dtype(facts.stored["denoiser"].dtype, device, fused=fused)
        if device.type == "cpu":
            free = within(available_memory(device), memory, device)
            fast = dtype
            dtype, text_dtype = fitting_dtypes(facts, dtype, int8=int8, free=free)
            if text_dtype != fast:
                part = "the text encoder" if dtype == fast else "all"
                notes = (f"memory is short: {part} is in bf16, which this CPU has no instructions for",)
    others = DTYPES[dtype] if dtype != "fp16" else without_fp16(device)
    return Precision(dtype, text_dtype, others, notes)
