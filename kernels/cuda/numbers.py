"""What a launch is told beyond its tensors: numbers and sizes from the arguments that are none.

An operation whose arguments are all in its struct has no function here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from sana_edge.errors import InvalidInput

# arguments as forms, sizes and dtypes of one launch, by their names
Values = dict[str, Any]

_UPSAMPLINGS = {"none": 0, "phases": 1, "shuffle": 2}
_ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2}


def prepare(name: str, values: Values) -> None:
    """Complete the values of an operation.

    Raises:
        InvalidInput: arguments that exclude each other, or a number out of bounds.
    """
    if name in _PREPARE:
        _PREPARE[name](values)


def _prepare_linear(values: Values) -> None:
    limit = values["limit"]
    if limit is not None and not limit > 0:
        raise InvalidInput(f"a product cannot clip to ±{limit}", "give a limit above 0")
    values |= {"limit": limit or 0.0, "silu": int(values["silu"]), "gate_stride": 0, "constant_stride": 0}


def _prepare_linear_quantize(values: Values) -> None:
    if (values["scale"] is None) != (values["shift"] is None):
        raise InvalidInput("scale and shift: one of them without the other", "give both or neither")
    _prepare_linear(values | {"silu": False})
    values |= {f"{name}_stride": 0 for name in ("gate", "constant", "scale", "shift")}
    values["limit"] = values["limit"] or 0.0
    values["plain_first"], values["plain_end"] = values["plain"]


def _prepare_finish(values: Values) -> None:
    if (values["roots"] is None) != (values["norm_q"] is None):
        raise InvalidInput("roots and norm_q: one of them without the other", "give both or neither")


def _prepare_head(values: Values) -> None:
    values["height"], values["width"] = values["size"]
    values["guided"] = 1 if values["guidance"] is None else 2


def _prepare_multiscale(values: Values) -> None:
    if (values["depthwise"] is None) != (values["pointwise"] is None):
        raise InvalidInput("depthwise and pointwise: one of them without the other", "give both or neither")
    values["copies"] = 1 if values["depthwise"] is None else 2
    # its workspace grows no further
    values["tokens"] = min(values["height"] * values["width"], 2048)


def _prepare_conv(values: Values) -> None:
    upsample, weight, scales = values["upsample"], values["weight"], values["weight_scales"]
    shuffled = 4 if upsample == "shuffle" else 1
    flat = scales._replace(shape=(math.prod(scales.shape),), strides=(1,))
    columns = weight.shape[-4] // shuffled if len(weight.shape) > 3 else 0
    values |= {
        "*outer": (4, columns) if upsample == "phases" else (shuffled * columns,),
        "columns": columns,
        "shuffled": shuffled,
        "corners": 1 if upsample == "none" else 4,
        "factor": 1 if upsample == "none" else 2,
        "wide": 4 * columns // max(values["repeats"], 1),
        "result": values["dtype"] if values["out_scale"] is None else torch.int8,
        "weight_scales": flat if scales.contiguous else scales,
        "upsample": _UPSAMPLINGS[upsample],
        "activation": _ACTIVATIONS[values["activation"]],
        "out_activation": _ACTIVATIONS[values["out_activation"]],
    }


def _prepare_digits(values: Values) -> None:
    shape, halves = values["x"].shape, 2 if values["gated"] else 1
    values |= {"gated": int(values["gated"]), "columns": shape[-1] // halves if shape else 0}
    values["wide"] = halves * values["columns"]


def _prepare_add_norm(values: Values) -> None:
    if (values["y"] is None) != (values["post_weight"] is None):
        raise InvalidInput("y and post_weight: one of them without the other", "give both or neither")


def _prepare_digits_linear(values: Values) -> None:
    if values["rotation"] is None:
        values["pairs"] = 0


def _prepare_soft_capped(values: Values) -> None:
    shape = values["prefix_keys"].shape
    if len(shape) == 3:
        values["width"] = (values["heads"] + 2 * shape[0]) * shape[2]
    values |= {"cap": values["cap"] or 0.0, "window": values["window"] or 0}


_PREPARE: dict[str, Callable[[Values], None]] = {
    "w8a8_linear": _prepare_linear,
    "w8a8_linear_quantize": _prepare_linear_quantize,
    "linear_attention_finish": _prepare_finish,
    "velocity_head": _prepare_head,
    "w8a8_conv2d": _prepare_conv,
    "multiscale_linear_attention": _prepare_multiscale,
    "quantize_digits": _prepare_digits,
    "add_norm_digits": _prepare_add_norm,
    "w8a16_linear": _prepare_digits_linear,
    "soft_capped_attention": _prepare_soft_capped,
}
