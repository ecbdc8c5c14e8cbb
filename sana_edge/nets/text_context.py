"""What the layers of a denoiser read of texts: keys and values, or constants, made once for a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.int8 import ops
from sana_edge.int8.linear import Linear
from sana_edge.nets.block import Constant, KeysValues


@dataclass(frozen=True)
class TextContext:
    """What the layers read of the text: per layer, one entry for each group of prompts."""

    layers: tuple[tuple[KeysValues | Constant, ...], ...]


def join_texts(contexts: Sequence[TextContext]) -> TextContext:
    """One context of several: each group's rows one below the other, or a single one where all are equal.

    Raises:
        InvalidInput: in a group, some have one token and others several.
    """
    layers = zip(*(context.layers for context in contexts), strict=True)
    return TextContext(tuple(tuple(map(_joined, zip(*layer, strict=True))) for layer in layers))


def beside(contexts: Sequence[TextContext]) -> TextContext:
    """One context with the groups of several, in their order: what `Denoiser.text_context` makes of all."""
    layers = zip(*(context.layers for context in contexts), strict=True)
    return TextContext(tuple(tuple(group for layer in each for group in layer) for each in layers))


def _joined(parts: Sequence[KeysValues | Constant]) -> KeysValues | Constant:
    constants = [part for part in parts if isinstance(part, Constant)]
    keyed = [part for part in parts if isinstance(part, KeysValues)]
    # the negative prompt of all
    tensors = [p.output if isinstance(p, Constant) else torch.stack([p.keys, p.values]) for p in parts]
    if all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        return parts[0]
    if not keyed:
        return Constant(torch.cat([part.output for part in constants]))
    if constants:
        raise InvalidInput("texts of one token and of several are no batch", "draw them one by one")
    longest = max(part.keys.shape[2] for part in keyed)
    keys, values = (
        torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[2])) for t in tensors])
        for tensors in ([part.keys for part in keyed], [part.values for part in keyed])
    )
    masks = [
        torch.ones(len(p.keys), 1, 1, p.keys.shape[2], dtype=torch.bool, device=keys.device)
        if p.mask is None
        else p.mask
        for p in keyed
    ]
    mask = torch.cat([F.pad(mask, (0, longest - mask.shape[3])) for mask in masks])
    return KeysValues(keys, values, None if mask.all() else mask)


def projected(layers: Sequence[Linear], x: Tensor) -> Sequence[Tensor]:
    """What each of some layers of one shape makes of x (B, L, in): (B, L, out) each.

    One product, where their weights are in one memory (`lay_together`) and in x's dtype.
    """
    weights, biases = (_as_one([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    if weights is None or biases is None or not weights.dtype == biases.dtype == x.dtype:
        return [layer(x) for layer in layers]
    for layer in layers:
        # who observes it sees x
        layer.prepare(x)
    made = ops.linear(x, weights.flatten(0, 1), biases.flatten())
    return torch.unflatten(made, -1, (len(layers), -1)).unbind(-2)


def lay_together(layers: Sequence[Linear], device: torch.device | str, dtype: torch.dtype) -> None:
    """Move layers of one shape to a device, in a dtype, with their weights one behind the other in memory.

    It costs no more memory than they take apart.
    """
    for name in ("weight", "bias"):
        parameters = [getattr(layer, name) for layer in layers]
        shape = (len(layers), *parameters[0].shape)
        places = torch.empty(shape, dtype=dtype, device=device)
        for place, parameter in zip(places, parameters, strict=True):
            parameter.data = place.copy_(parameter.data)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy where the tensors are already slices of one."""
    one = _as_one(tensors)
    return torch.stack(list(tensors)) if one is None else one


def _as_one(tensors: Sequence[Tensor]) -> Tensor | None:
    """The stack of tensors that lie in one memory at equal distances; None of others, or for a gradient."""
    first = tensors[0]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    forms = {(t.untyped_storage().data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in tensors}
    offsets = [tensor.storage_offset() for tensor in tensors]
    distances = {after - before for before, after in pairwise(offsets)} or {first.numel()}
    distance = distances.pop()
    if len(forms) > 1 or distances or distance <= 0:
        return None
    return first.as_strided((len(tensors), *first.shape), (distance, *first.stride()), offsets[0])
