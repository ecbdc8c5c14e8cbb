"""Launchers of the CUDA operations, by the names and arguments of `reference_fused` and `reference_conv`.

Matrices are contiguous, on the device; sizes have the limits of sana_edge.h. An operation with an argument
``workspace`` makes its own where that is None. ``out=`` is what a result is written to, which may be
``residual``. All raise InvalidInput where shapes, dtypes or layouts do not suit each other, and SanaError
where the library refuses.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference_conv, reference_fused
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.library import TYPES
from sana_edge.kernels.cuda.operations import OPERATIONS, Operation, Pointer

_HALVES = (torch.float16, torch.bfloat16)
_KINDS = {
    "int8": (torch.int8,),
    "int32": (torch.int32,),
    "fp32": (torch.float32,),
    "vector": (torch.float32,),
    "bytes": (torch.uint8,),
    "half": _HALVES,
    "any": tuple(TYPES),
}
_DTYPES = {"w8a8_linear": torch.float16, "w8a8_conv2d": torch.bfloat16}
_UPSAMPLINGS = {"none": 0, "phases": 1, "shuffle": 2}
_ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2}

# arguments, sizes and dtypes of one launch, by their names
Values = dict[str, Any]


def workspace(images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    """Memory for sums between blocks of `qkv_linear_attention` and `qk_norm_linear_attention`, zeros.

    One of the largest size serves all sizes, one call after the other on one stream.
    """
    return torch.zeros(library.load().workspace(images, tokens, heads), dtype=torch.uint8, device=device)


def _launch(name: str, *arguments: Any, **named: Any) -> Any:
    """Check the arguments of an operation, make its results, and start it on the current stream."""
    operation = OPERATIONS[name]
    values = _bound(name, arguments, named)
    _PREPARE.get(name, lambda _: None)(values)
    given = [pointer for pointer in operation.pointers if values.get(pointer.name) is not None]
    for pointer in operation.pointers:
        if not pointer.optional and not pointer.written and pointer not in given:
            raise InvalidInput(f"{pointer.name} of {name} is None", "give a tensor")
    _find_type(operation, given, values)
    _find_sizes(given, values)
    strides = [_check(name, pointer, values) for pointer in given]
    device = values[given[0].name].device
    results = _results(operation, values, device)
    if "stride" in operation.numbers:
        values["stride"] = _common(given, strides)
    if "workspace_bytes" in operation.numbers:
        if values["workspace"] is None:
            values["workspace"] = workspace(values["images"], values["tokens"], values["heads"], device)
        values["workspace_bytes"] = values["workspace"].numel()
    fields: Values = {pointer.name: values.get(pointer.name) for pointer in operation.pointers}
    fields |= {field: number(values) for field, number in operation.numbers.items()}
    library.load().call(name, device, **fields)
    return results[0] if len(results) == 1 else tuple(results)


@functools.cache
def _parameters(name: str) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Names of an operation's arguments, those of its reference first, and defaults."""
    reference = reference_conv if name == "w8a8_conv2d" else reference_fused
    parameters = inspect.signature(getattr(reference, name)).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    # the references' own, fp32, is no kernel's
    defaults |= {"dtype": _DTYPES[name]} if name in _DTYPES else {}
    # the references have no memory to use again
    own = [pointer.name for pointer in OPERATIONS[name].pointers if pointer.kind == "bytes"]
    written = [pointer.name for pointer in OPERATIONS[name].pointers if pointer.written]
    return (*parameters, *own, *written), {**defaults, **dict.fromkeys((*own, *written))}


def _bound(name: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Values:
    names, defaults = _parameters(name)
    values = {**defaults, **dict(zip(names, arguments, strict=False)), **named}
    if len(arguments) > len(names) or len(values) != len(names):
        raise TypeError(f"{name} takes {', '.join(names)}")
    return values


def _find_type(operation: Operation, given: list[Pointer], values: Values) -> None:
    """The one type of an operation's 16-bit tensors: that asked for, or of the first of them."""
    if "dtype" in values:
        values["half"] = values["dtype"]
        if values["half"] not in _HALVES:
            raise InvalidInput(
                f"{operation.name} cannot give {values['half']}", "ask for float16 or bfloat16"
            )
    else:
        values["half"] = next(values[p.name].dtype for p in given if p.kind in ("any", "half"))
    values["type"] = TYPES.get(values["half"], -1)


def _find_sizes(given: list[Pointer], values: Values) -> None:
    """Sizes from the tensors' shapes: first what is a dimension by itself, then what is a factor of one."""
    for alone in (True, False):
        for pointer in given:
            shape, sizes = values[pointer.name].shape, pointer.shape
            leading = len(shape) - len(sizes)
            if pointer.kind in ("vector", "bytes") or leading < 0 or (leading and not pointer.lead):
                continue
            if pointer.lead and pointer.lead not in values:
                _find_rows(pointer.lead, tuple(shape[:leading]), values)
            for size, found in zip(sizes, shape[leading:], strict=True):
                unknown = [name for name in size.names if name not in values]
                if len(unknown) == 1 and alone is (size.names == (unknown[0],) and size.factor == 1):
                    known = size.factor * math.prod(values[name] for name in size.names if name in values)
                    values[unknown[0]] = found // known if known else 0


def _find_rows(name: str, lead: tuple[int, ...], values: Values) -> None:
    """Leading dimensions are rows, (B, tokens) of B images, or else of one."""
    values[name], values[name[1:]] = lead, math.prod(lead)
    values["images"] = lead[0] if len(lead) == 2 else 1
    values["tokens"] = max(lead[-1], 1) if lead else 1


def _check(name: str, pointer: Pointer, values: Values) -> int:
    """The stride of a tensor's rows, or of its images, where these may lie apart.

    Raises:
        InvalidInput: it is none of `operations`.
    """
    tensor, kind = values[pointer.name], pointer.kind
    if kind == "bytes":
        return 0
    allowed = _KINDS[kind] if kind in _KINDS else (values[kind],)
    # one type for all
    allowed = (values["half"],) if kind in ("half", "any") and values["half"] in allowed else allowed
    try:
        shape = pointer.dimensions(values)
    except KeyError as unknown:
        found = f"{pointer.name} of {name} is {tensor.dtype} {tuple(tensor.shape)}"
        raise InvalidInput(
            f"{found}: it has no {unknown.args[0]}", "see kernels/reference_fused.py"
        ) from None
    shapes: tuple[tuple[int, ...], ...] = (shape,)
    if kind == "vector":
        shapes = shape[1:], (1, 1, *shape[1:]), (shape[0], 1, *shape[1:])
    stride, ordered = _layout(pointer, tensor)
    if tensor.shape not in shapes or tensor.dtype not in allowed or not ordered:
        gaps = "" if ordered else f" with gaps, strides {tensor.stride()}"
        layout = {"vector": "without gaps within a vector"}.get(
            kind, "in evenly spaced rows" if pointer.spaced else "contiguous"
        )
        wanted = " or ".join(dict.fromkeys(str(shape) for shape in (shapes[0], shapes[-1])))
        raise InvalidInput(
            f"{pointer.name} of {name} is {tensor.dtype} {tuple(tensor.shape)}{gaps}",
            f"give {' or '.join(map(str, allowed))} {wanted}, {layout}",
        )
    stride = 0 if kind == "vector" and (tensor.ndim == 1 or len(tensor) == 1) else stride
    values[f"{pointer.name}_stride"] = stride
    return stride


def _layout(pointer: Pointer, tensor: Tensor) -> tuple[int, bool]:
    """Numbers from one vector or row to the next, and whether nothing else has gaps."""
    strides = tensor.stride()
    if pointer.kind == "vector":
        dense = tensor.ndim > 0 and (tensor.shape[-1] <= 1 or strides[-1] == 1)
        return (strides[0] if tensor.ndim else 0), dense
    if not pointer.spaced or tensor.ndim != 3:
        return 0, tensor.is_contiguous()
    images, tokens, width = tensor.shape
    stride = strides[1] if tokens > 1 else strides[0] if images > 1 else width
    follow = images <= 1 or tokens <= 1 or strides[0] == tokens * stride
    return stride, follow and strides[2] == 1


def _common(given: list[Pointer], strides: list[int]) -> int:
    """The one stride of all vectors."""
    found = {p.name: stride for p, stride in zip(given, strides, strict=True) if p.kind == "vector"}
    if len(set(found.values())) > 1:
        apart = " and ".join(map(str, found.values()))
        raise InvalidInput(
            f"{' and '.join(found)}: {apart} floats from an image to the next",
            "take both from one table, or make both contiguous",
        )
    return next(iter(found.values()))


def _results(operation: Operation, values: Values, device: torch.device) -> list[Tensor]:
    # sums of no tokens are zeros, and the kernels do nothing then
    make = torch.zeros if values.get("tokens") == 0 else torch.empty
    written = [pointer for pointer in operation.pointers if pointer.written]
    for pointer in written:
        if values[pointer.name] is None:
            dtype = values[pointer.kind] if pointer.kind in values else _KINDS[pointer.kind][0]
            values[pointer.name] = make(pointer.dimensions(values), dtype=dtype, device=device)
    return [values[pointer.name] for pointer in written]


def _prepare_linear(values: Values) -> None:
    limit = values["limit"]
    if limit is not None and not limit > 0:
        raise InvalidInput(f"w8a8_linear cannot clip to ±{limit}", "give a limit above 0")
    values |= {"limit": limit or 0.0, "silu": int(values["silu"]), "gate_stride": 0, "constant_stride": 0}


def _prepare_finish(values: Values) -> None:
    if (values["roots"] is None) != (values["norm_q"] is None):
        raise InvalidInput("roots and norm_q: one of them without the other", "give both or neither")


def _prepare_head(values: Values) -> None:
    values["height"], values["width"] = values["size"]
    values["guided"] = 1 if values["guidance"] is None else 2


def _prepare_conv(values: Values) -> None:
    upsample, weight = values["upsample"], values["weight"]
    shuffled = 4 if upsample == "shuffle" else 1
    columns = weight.shape[-4] // shuffled if weight.ndim > 3 else 0
    values |= {
        "*outer": (4, columns) if upsample == "phases" else (shuffled * columns,),
        "columns": columns,
        "shuffled": shuffled,
        "corners": 1 if upsample == "none" else 4,
        "factor": 1 if upsample == "none" else 2,
        "wide": 4 * columns // max(values["repeats"], 1),
        "result": values["dtype"] if values["out_scale"] is None else torch.int8,
        "weight_scales": values["weight_scales"].flatten(),
        "upsample": _UPSAMPLINGS[upsample],
        "activation": _ACTIVATIONS[values["activation"]],
    }


_PREPARE: dict[str, Callable[[Values], None]] = {
    "w8a8_linear": _prepare_linear,
    "linear_attention_finish": _prepare_finish,
    "velocity_head": _prepare_head,
    "w8a8_conv2d": _prepare_conv,
}

quantize_rows = functools.partial(_launch, "quantize_rows")
norm_modulate_quantize = functools.partial(_launch, "norm_modulate_quantize")
dwconv_glu_quantize = functools.partial(_launch, "dwconv_glu_quantize")
w8a8_linear = functools.partial(_launch, "w8a8_linear")
qkv_linear_attention = functools.partial(_launch, "qkv_linear_attention")
qk_norm_linear_attention = functools.partial(_launch, "qk_norm_linear_attention")
linear_attention_finish = functools.partial(_launch, "linear_attention_finish")
cross_attention_quantize = functools.partial(_launch, "cross_attention_quantize")
patch_embed = functools.partial(_launch, "patch_embed")
velocity_head = functools.partial(_launch, "velocity_head")
w8a8_conv2d = functools.partial(_launch, "w8a8_conv2d")
