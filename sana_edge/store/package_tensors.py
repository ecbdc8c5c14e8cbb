"""The tensors of a quantized component: which are INT8, and whether its config says the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from sana_edge.errors import CheckpointError, DamagedWeights
from sana_edge.store.package import DAMAGED, Quantization

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# of fp16's normal numbers
_FP16_MIN, _FP16_MAX = 2.0**-14, 65504.0


def check_tensors(
    state: Mapping[str, Tensor],
    quantization: Quantization,
    layers: Sequence[tuple[str, ...]],
    *,
    where: str,
) -> None:
    """Compare the dtypes and scales of a component with its config; shapes are the loaders' to check.

    Args:
        layers: what can be INT8: for each layer the names, in the state, of the modules that are stacked in
            it. They are quantized together, and the first has their ``input_scale``.
        where: the component's folder, for messages.

    Raises:
        CheckpointError: names the first tensor that does not fit.
    """
    modules = {name for layer in layers for name in layer}
    for name in sorted(set(quantization.kept) - modules):
        _refuse(where, f"config.json keeps {name}, which no package has in INT8")
    used = set[str]()
    for layer in layers:
        kept = [name for name in layer if name in quantization.kept]
        if kept and len(kept) < len(layer):
            _refuse(where, f"of {', '.join(layer)} config.json keeps only {', '.join(kept)}")
        if kept:
            _check_kept(state, layer, where)
        else:
            used |= _check_quantized(state, layer, quantization, where)
    for name in sorted(set(state) - used):
        if state[name].dtype not in _FLOATS:
            _refuse(where, f"{name} is {_dtype(state[name])}, expected 16 bit")
        if is_scale(name):
            _refuse(where, f"{name} belongs to no INT8 module")


def is_scale(name: str) -> bool:
    """Whether a tensor of this name belongs to an INT8 module, beside its weight."""
    return name.endswith((".weight_scale", ".input_scale"))


def keeps_fp32(name: str) -> bool:
    """Whether a package has a tensor of this name in fp32: weights are multiplied with just these."""
    return is_scale(name) or name.endswith(".smoothing")


def to_16_bit(tensor: Tensor) -> Tensor:
    """A float tensor as packages store it: fp32 becomes fp16, or bf16 where its largest value needs that."""
    if tensor.dtype != torch.float32 or tensor.numel() == 0:
        return tensor
    largest = float(tensor.abs().max())
    return tensor.to(torch.float16 if largest == 0 or _FP16_MIN <= largest <= _FP16_MAX else torch.bfloat16)


def _check_kept(state: Mapping[str, Tensor], layer: tuple[str, ...], where: str) -> None:
    for name in layer:
        weight = _weight(state, name, where)
        if weight.dtype not in _FLOATS:
            _refuse(where, f"{name}.weight is {_dtype(weight)}, but config.json keeps it in 16 bit")


def _check_quantized(
    state: Mapping[str, Tensor], layer: tuple[str, ...], quantization: Quantization, where: str
) -> set[str]:
    """Check a layer's INT8 tensors and return their names."""
    used = set[str]()
    for name in layer:
        weight = _weight(state, name, where)
        if weight.dtype != torch.int8:
            _refuse(where, f"{name}.weight is {_dtype(weight)}, but config.json does not keep it")
        used |= {f"{name}.weight", f"{name}.weight_scale"}
        _check_scale(state, f"{name}.weight_scale", where)
    scale = f"{layer[0]}.input_scale"
    if quantization.activations == "tensor" or scale in state:
        _check_scale(state, scale, where)
        used.add(scale)
    return used


def _weight(state: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    weight = state.get(f"{name}.weight")
    return _refuse(where, f"{name}.weight is missing") if weight is None else weight


def _check_scale(state: Mapping[str, Tensor], name: str, where: str) -> None:
    scale = state.get(name)
    if scale is None:
        _refuse(where, f"{name} is missing")
    if scale.dtype != torch.float32:
        _refuse(where, f"{name} is {_dtype(scale)}, expected float32")
    wrong = scale[~(scale.isfinite() & (scale > 0))]
    if len(wrong):
        raise DamagedWeights(f"{where}: {name} has {float(wrong[0])}, expected numbers above 0", DAMAGED)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse(where: str, problem: str) -> NoReturn:
    raise CheckpointError(f"{where}: {problem}", DAMAGED)
