"""Operations of csrc/ that end in INT8 rows, by the names of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.kernels import cuda_library
from sana_edge.kernels.cuda_library import TYPES


def quantize_rows(x: Tensor, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`reference_fused.quantize_rows` of contiguous x (..., C), C a multiple of 16."""
    values, scales = _rows_like(x)
    cuda_library.load().call(
        "quantize_rows",
        x.device,
        x=x,
        static_scale=static_scale,
        values=values,
        scales=scales,
        rows=scales.numel(),
        columns=x.shape[-1],
        type=TYPES[x.dtype],
    )
    return values, scales


def _rows_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )
