"""What the layers read of the text as the fused operations take it: of one shape for all prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.denoiser import TextContext

# slots for keys: 300 tokens, and a multiple of 16
CAPACITY = 304
_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class LayerText:
    """One layer of a `FusedText`."""

    keys: Tensor | None
    values_transposed: Tensor | None
    lengths: Tensor | None
    constant: Tensor | None
    readers: slice

    def as_keys_values(self) -> KeysValues:
        """For a layer that is not fused."""
        assert self.keys is not None and self.values_transposed is not None and self.lengths is not None
        slots = torch.arange(self.keys.shape[2], device=self.keys.device)
        mask = (slots < self.lengths[:, None])[:, None, None]
        return KeysValues(self.keys, self.values_transposed.transpose(2, 3), mask)


@dataclass(frozen=True, eq=False)
class FusedText:
    """Keys and values of R prompts with each row's valid tokens first, and constants of the others.

    Attributes:
        keys: (layers, R, heads, capacity, d), zeros beyond the length.
        values_transposed: (layers, R, heads, d, capacity), also.
        lengths: (R,) int32.
        constants: (layers, B, 1, dim) fp32, zeros of images that read keys.
        readers: the images among B that read keys; None instead of tensors where there are none.
    """

    keys: Tensor | None
    values_transposed: Tensor | None
    lengths: Tensor | None
    constants: Tensor | None
    readers: tuple[int, int]

    def __getitem__(self, layer: int) -> LayerText:
        keys, values, constants = (
            None if stack is None else stack[layer]
            for stack in (self.keys, self.values_transposed, self.constants)
        )
        return LayerText(keys, values, self.lengths, constants, slice(*self.readers))

    def pack(self) -> tuple[tuple[bool, bool, int, int], list[Tensor]]:
        """Its structure and its tensors; `unpack` is the inverse."""
        tensors = (self.keys, self.values_transposed, self.lengths, self.constants)
        structure = (self.keys is not None, self.constants is not None, *self.readers)
        return structure, [tensor for tensor in tensors if tensor is not None]

    @classmethod
    def unpack(cls, structure: tuple[bool, bool, int, int], tensors: Sequence[Tensor]) -> FusedText:
        """The text whose `pack` gave these."""
        keyed, constant, first, last = structure
        remaining = iter(tensors)
        keys, values, lengths = (next(remaining) if keyed else None for _ in range(3))
        return cls(keys, values, lengths, next(remaining) if constant else None, (first, last))


def fuse_text(context: TextContext, images: int, device: torch.device) -> FusedText:
    """Digest a context for a batch of latents, once per prompt.

    Raises:
        InvalidInput: groups with keys have others between them, or the batch cannot be split over the groups.
    """
    groups = context.layers[0]
    share, rest = divmod(images, len(groups))
    rows = [len(group.output if isinstance(group, Constant) else group.keys) for group in groups]
    if rest or any(share % count for count in rows):
        raise InvalidInput(
            f"{images} latents cannot be split evenly over text groups of {rows} rows",
            "give every group as many latents as the largest has rows, or a multiple of it",
        )
    keyed = [i for i, group in enumerate(groups) if isinstance(group, KeysValues)]
    if not keyed:
        return FusedText(None, None, None, _constants(context, share, device), (0, 0))
    first, last = keyed[0], keyed[-1] + 1
    if len(keyed) < last - first:
        raise InvalidInput("groups with keys have others between them", "put them next to each other")
    # as many rows in all groups, so that each serves the same number of images
    count = math.lcm(*(rows[i] for i in keyed))
    layers = [_stacked(cast("Sequence[KeysValues]", layer[first:last]), count) for layer in context.layers]
    keys, values = (torch.stack([layer[i] for layer in layers]) for i in range(2))
    constants = _constants(context, share, device) if len(keyed) < len(groups) else None
    return FusedText(keys, values, layers[0][2], constants, (first * share, last * share))


def _constants(context: TextContext, share: int, device: torch.device) -> Tensor:
    """(layers, B, 1, dim) fp32, zeros where a group has keys."""

    def images(group: KeysValues | Constant, dim: int) -> Tensor:
        if isinstance(group, Constant):
            return group.output.float().repeat_interleave(share // len(group.output), dim=0)
        return torch.zeros(share, 1, dim, device=device)

    groups = context.layers[0]
    dim = next(group.output.shape[-1] for group in groups if isinstance(group, Constant))
    return torch.stack([torch.cat([images(group, dim) for group in layer]) for layer in context.layers])


def _stacked(groups: Sequence[KeysValues], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """One layer's keys (R, heads, capacity, d), values (R, heads, d, capacity) and lengths (R,) int32."""
    longest = max(group.keys.shape[2] for group in groups)
    capacity = max(CAPACITY, -(-longest // _MULTIPLE) * _MULTIPLE)
    parts = [_compacted(group, rows, capacity) for group in groups]
    keys, values, lengths = (torch.cat([part[i] for part in parts]) for i in range(3))
    return keys, values.transpose(2, 3).contiguous(), lengths


def _compacted(group: KeysValues, rows: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (rows, heads, capacity, d), valid tokens first, and how many are valid."""
    keys, values = group.keys, group.values
    lengths = keys.new_full((len(keys),), keys.shape[2], dtype=torch.int32)
    if group.mask is not None:
        mask = group.mask.flatten(1)
        lengths = mask.sum(1, dtype=torch.int32)
        order = mask.int().argsort(dim=1, descending=True, stable=True)[:, None, :, None]
        keys, values = (torch.where(group.mask.transpose(2, 3), t, 0) for t in (keys, values))
        keys, values = (t.gather(2, order.expand_as(t)) for t in (keys, values))
    missing = capacity - keys.shape[2]
    keys, values = (F.pad(t, (0, 0, 0, missing)) for t in (keys, values))
    repeats = rows // len(keys)
    return (
        keys.repeat_interleave(repeats, dim=0),
        values.repeat_interleave(repeats, dim=0),
        lengths.repeat_interleave(repeats),
    )
