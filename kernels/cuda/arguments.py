"""What a launch takes and gives: its arguments as `operations` says, checked once for all tensors of a form.

Matrices are contiguous, on the device; sizes have the limits of sana_edge.h.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference_conv, reference_fused, reference_gemma
from sana_edge.kernels.cuda import library, tuning
from sana_edge.kernels.cuda.numbers import Values, prepare
from sana_edge.kernels.cuda.operations import OPERATIONS, Operation, Pointer

_HALVES = (torch.float16, torch.bfloat16)
_KINDS = {
    "int8": (torch.int8,),
    "int32": (torch.int32,),
    "fp32": (torch.float32,),
    "vector": (torch.float32,),
    "bytes": (torch.uint8,),
    "half": _HALVES,
    "any": tuple(library.TYPES),
}
_DTYPES = {"w8a8_linear": torch.float16, "w8a8_linear_quantize": torch.float16, "w8a8_conv2d": torch.bfloat16}
# what a result belongs to that is made only with it
_SCALE_OF = {"next_values": "next_scale"}


class Form(NamedTuple):
    """What is checked of a tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def contiguous(self) -> bool:
        """As `Tensor.is_contiguous`."""
        follows = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        places = zip(self.shape, self.strides, follows, strict=True)
        return 0 in self.shape or all(size == 1 or stride == wanted for size, stride, wanted in places)


@dataclass(frozen=True)
class Plan:
    """A launch that is right: the numbers of its struct, and shapes and dtypes of its results."""

    numbers: Mapping[str, Any]
    results: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    # sums of no tokens are zeros, and the kernels do nothing then
    make: Callable[..., Tensor]
    # images, tokens and heads whose sums need a workspace
    sums: tuple[int, int, int]


def definition(name: str) -> Callable[..., Any]:
    """The function that says what an operation computes."""
    homes = (reference_fused, reference_conv, reference_gemma)
    function: Callable[..., Any] = next(getattr(home, name) for home in homes if hasattr(home, name))
    return function


@functools.lru_cache(maxsize=512)
def plan(name: str, *forms: Any) -> Plan:
    """The plan of arguments in their order, with the forms of tensors."""
    operation, values = OPERATIONS[name], dict(zip(parameters(name)[0], forms, strict=True))
    given = [pointer for pointer in operation.pointers if values[pointer.name] is not None]
    for pointer in operation.pointers:
        if not pointer.optional and not pointer.written and pointer not in given:
            raise InvalidInput(f"{pointer.name} of {name} is None", "give a tensor")
    prepare(name, values)
    _find_type(operation, given, values)
    _find_sizes(given, values)
    strides = {pointer: _check(name, pointer, values) for pointer in given}
    values |= {f"{pointer.name}_stride": stride for pointer, stride in strides.items()}
    if "stride" in operation.numbers:
        values["stride"] = _common({p.name: n for p, n in strides.items() if p.kind == "vector"})
    numbers = {n: size(values) for n, size in operation.numbers.items() if n != "workspace_bytes"}
    results = {
        pointer.name: (pointer.dimensions(values), _dtypes(pointer, values)[0])
        for pointer in operation.pointers
        if pointer.written and (not pointer.optional or values[_SCALE_OF[pointer.name]] is not None)
    }
    nothing = 0 in (values.get("tokens"), values.get("rows"))
    images, heads = results["state"][0][:2] if "state" in results else (1, 1)
    sums = (images, values.get("tokens", 1), heads)
    return Plan(numbers, results, torch.zeros if nothing else torch.empty, sums)


@functools.cache
def parameters(name: str) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Names of an operation's arguments, those of its reference first, and defaults."""
    parameters = inspect.signature(definition(name)).parameters
    defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    # the references' own, fp32, is no kernel's
    defaults |= {"dtype": _DTYPES[name]} if name in _DTYPES else {}
    # the references have no memory to use again
    own = [pointer.name for pointer in OPERATIONS[name].pointers if pointer.kind == "bytes"]
    chosen = {"tile": 0} if name in tuning.TUNED else {}
    written = [pointer.name for pointer in OPERATIONS[name].pointers if pointer.written]
    return (*parameters, *own, *chosen, *written), {**defaults, **chosen, **dict.fromkeys((*own, *written))}


def _find_type(operation: Operation, given: list[Pointer], values: Values) -> None:
    """The one type of an operation's 16-bit tensors: that asked for, or of the first of them."""
    if "dtype" in values:
        values["half"] = values["dtype"]
        if values["half"] not in _HALVES:
            raise InvalidInput(
                f"{operation.name} cannot give {values['half']}", "ask for float16 or bfloat16"
            )
    else:
        halves = (values[p.name].dtype for p in given if p.kind in ("any", "half"))
        values["half"] = next(halves, torch.float32)
    values["type"] = library.TYPES.get(values["half"], -1)


def _find_sizes(given: list[Pointer], values: Values) -> None:
    """Sizes from the tensors' shapes: first what is a dimension by itself, then what is a factor of one."""
    for alone in (True, False):
        for pointer in given:
            shape, sizes = tuple(values[pointer.name].shape), pointer.shape
            leading = len(shape) - len(sizes)
            if pointer.kind in ("vector", "bytes") or leading < 0 or (leading and not pointer.lead):
                continue
            if pointer.lead and pointer.lead not in values:
                _find_rows(pointer.lead, shape[:leading], values)
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


def _dtypes(pointer: Pointer, values: Values) -> tuple[torch.dtype, ...]:
    """What a tensor may be: of several the one that all have, where this is one of them."""
    allowed = _KINDS.get(pointer.kind) or (values[pointer.kind],)
    return (values["half"],) if len(allowed) > 1 and values["half"] in allowed else allowed


def _check(name: str, pointer: Pointer, values: Values) -> int:
    """The stride of a tensor's rows, or of its images, where these may lie apart; 0 where one serves all.

    Raises:
        InvalidInput: it is not what `operations` says.
    """
    form, kind = values[pointer.name], pointer.kind
    if kind == "bytes":
        return 0
    found = f"{pointer.name} of {name} is {form.dtype} {tuple(form.shape)}"
    try:
        shape = pointer.dimensions(values)
    except KeyError as unknown:
        raise InvalidInput(f"{found}, which has no {unknown}", "see kernels/reference_fused.py") from None
    shapes = (shape,) if kind != "vector" else (shape[1:], (1, 1, *shape[1:]), (shape[0], 1, *shape[1:]))
    allowed = _dtypes(pointer, values)
    stride, dense = _layout(pointer, form)
    if form.shape in shapes and form.dtype in allowed and dense:
        return 0 if kind == "vector" and form.shape != shapes[-1] else stride
    gaps = "" if dense else f" with gaps, strides {form.strides}"
    layout = "in evenly spaced rows" if pointer.spaced else "contiguous"
    wanted = f"{' or '.join(map(str, allowed))} {' or '.join(map(str, shapes))}"
    raise InvalidInput(found + gaps, f"give {wanted}, {layout}")


def _layout(pointer: Pointer, form: Form) -> tuple[int, bool]:
    """Numbers from one vector or row to the next, and whether nothing else has gaps."""
    strides = form.strides
    if pointer.kind == "vector" and strides:
        # the images' vectors may lie apart
        return strides[0], form.shape[-1] <= 1 or strides[-1] == 1
    if not pointer.spaced or len(strides) != 3:
        return 0, form.contiguous
    images, tokens, width = form.shape
    stride = strides[1] if tokens > 1 else strides[0] if images > 1 else width
    return stride, strides[2] == 1 and (images <= 1 or tokens <= 1 or strides[0] == tokens * stride)


def _common(strides: Mapping[str, int]) -> int:
    """The one stride of vectors."""
    if len(set(strides.values())) > 1:
        apart = " and ".join(map(str, strides.values()))
        raise InvalidInput(
            f"{' and '.join(strides)}: {apart} floats from an image to the next",
            "take both from one table, or make both contiguous",
        )
    return next(iter(strides.values()))
