"""A word embedding that stays in its file: only the rows of a prompt's tokens are read."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MappedEmbedding(nn.Module):
    """Gemma-2's embedding, row · √channels, gathered from a table (vocabulary, channels) on the CPU.

    The table is no parameter: it keeps its dtype and place in `Module.to`. Mapped from a file as `load_state`
    gives it, it takes no more memory than the pages of the rows that were used.

    Args:
        dtype: of the output; rows are converted before they are scaled, as a table in memory would be.
        rounded: a 16-bit dtype to which rows of an fp32 table are rounded first.
    """

    def __init__(self, table: Tensor, *, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
        super().__init__()
        self._table = table
        self._dtype = dtype
        self._rounded = rounded or table.dtype
        # the product of 16-bit tensors: its factor is rounded too
        self._scale = torch.tensor(table.shape[1] ** 0.5, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 to (..., channels) on the device of ``ids``."""
        rows = self._table[ids.cpu()].to(self._rounded).to(self._dtype)
        return (rows * self._scale).to(ids.device)
