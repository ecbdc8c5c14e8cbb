"""What the layers read of the text as the fused operations take it: of one shape for all prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.nets.block import Constant, KeysValues
from sana_edge.nets.text_context import TextContext, stacked

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
    keys, values, lengths = _packed([_keys_values(context, i) for i in keyed], count)
    constants = _constants(context, share, device) if len(keyed) < len(groups) else None
    return FusedText(keys, values, lengths, constants, (first * share, last * share))


def _constants(context: TextContext, share: int, device: torch.device) -> Tensor:
    """(layers, B, 1, dim) fp32, zeros where a group has keys."""
    groups = context.layers[0]
    dim = next(group.output.shape[-1] for group in groups if isinstance(group, Constant))
    constants = torch.zeros(len(context.layers), share * len(groups), 1, dim, device=device)
    for images, group in zip(
        constants.chunk(len(groups), dim=1), zip(*context.layers, strict=True), strict=True
    ):
        if isinstance(group[0], Constant):
            # (layers, rows, 1, dim)
            outputs = stacked([cast("Constant", layer).output for layer in group])
            torch.unflatten(images, 1, (outputs.shape[1], -1)).copy_(outputs.unsqueeze(2))
    return constants


def _keys_values(context: TextContext, group: int) -> KeysValues:
    """A group's keys and values (layers, rows, heads, L, d), and the mask of each layer."""
    layers = [cast("KeysValues", layer[group]) for layer in context.layers]
    keys, values = stacked([layer.keys for layer in layers]), stacked([layer.values for layer in layers])
    return KeysValues(keys, values, layers[0].mask)


def _packed(groups: Sequence[KeysValues], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (layers, R, heads, capacity, d), values (layers, R, heads, d, capacity), lengths (R,) int32.

    Args:
        groups: of all layers, each of which gets as many rows.
    """
    layers, _, heads, _, d = groups[0].keys.shape
    longest = max(group.keys.shape[3] for group in groups)
    capacity = max(CAPACITY, -(-longest // _MULTIPLE) * _MULTIPLE)
    keys = groups[0].keys.new_zeros(layers, len(groups) * rows, heads, capacity, d)
    values = groups[0].keys.new_zeros(layers, len(groups) * rows, heads, d, capacity)
    lengths = torch.empty(len(groups) * rows, dtype=torch.int32, device=keys.device)
    for number, group in enumerate(groups):
        own, length = (len(group.keys[0]), -1), group.keys.shape[3]
        place = slice(number * rows, (number + 1) * rows)
        found_keys, found_values, counts = _compacted(group)
        # each of its rows as often as it must be there
        torch.unflatten(keys[:, place, :, :length], 1, own).copy_(found_keys.unsqueeze(2))
        torch.unflatten(values[:, place, :, :, :length], 1, own).copy_(found_values.unsqueeze(2).mT)
        if counts is None:
            lengths[place].fill_(length)
        else:
            torch.unflatten(lengths[place], 0, own).copy_(counts[:, None])
    return keys, values, lengths


def _compacted(group: KeysValues) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values (layers, rows, heads, L, d), valid tokens first, and how many, None where all are."""
    if group.mask is None:
        return group.keys, group.values, None
    mask = group.mask.mT
    order = mask.int().argsort(dim=2, descending=True, stable=True)
    keys, values = (torch.where(mask, t, 0) for t in (group.keys, group.values))
    keys, values = (t.gather(3, order.expand_as(t)) for t in (keys, values))
    return keys, values, group.mask.sum((1, 2, 3), dtype=torch.int32)
