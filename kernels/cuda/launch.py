"""Launchers of the CUDA operations, by the names and arguments of their definitions in `kernels.reference_*`.

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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels import reference_conv, reference_fused, reference_gemma
from sana_edge.kernels.cuda import library, tuning
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
_UPSAMPLINGS = {"none": 0, "phases": 1, "shuffle": 2}
_ACTIVATIONS = {"identity": 0, "relu": 1, "silu": 2}
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


# arguments as forms, sizes and dtypes of one launch, by their names
Values = dict[str, Any]


def definition(name: str) -> Callable[..., Any]:
    """The function that says what an operation computes."""
    homes = (reference_fused, reference_conv, reference_gemma)
    function: Callable[..., Any] = next(getattr(home, name) for home in homes if hasattr(home, name))
    return function


def workspace(images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    """Memory for what blocks tell each other: sums of linear attention, and which tiles are written; zeros.

    One of the largest size serves all sizes, one call after the other on one stream.
    """
    return torch.zeros(library.load().workspace(images, tokens, heads), dtype=torch.uint8, device=device)


def _launch(name: str, *arguments: Any, **named: Any) -> Any:
    """Check the arguments of an operation, make its results, and start it on the current stream."""
    names, defaults = _parameters(name)
    given = {**defaults, **dict(zip(names, arguments, strict=False)), **named}
    if len(arguments) > len(names) or given.keys() != set(names):
        raise TypeError(f"{name} takes {', '.join(names)}")
    forms = (
        Form(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v
        for v in (given[argument] for argument in names)
    )
    plan = _plan(name, *forms)
    pointers = OPERATIONS[name].names
    device = next(given[pointer].device for pointer in pointers if given[pointer] is not None)
    for result, (shape, dtype) in plan.results.items():
        if given[result] is None:
            given[result] = plan.make(shape, dtype=dtype, device=device)
    fields = {pointer: given[pointer] for pointer in pointers}
    if "workspace" in fields:
        space = fields["workspace"]
        if space is None:
            space = workspace(*plan.sums, device)
        fields |= {"workspace": space, "workspace_bytes": space.numel()}
    numbers = tuning.tuned(name, device, fields, plan.numbers) if name in tuning.TUNED else plan.numbers
    library.load().call(name, device, **fields, **numbers)
    results = tuple(given[result] for result in plan.results)
    return results if len(results) > 1 else results[0]


@functools.lru_cache(maxsize=512)
def _plan(name: str, *forms: Any) -> Plan:
    """The plan of arguments in their order, with the forms of tensors."""
    operation, values = OPERATIONS[name], dict(zip(_parameters(name)[0], forms, strict=True))
    given = [pointer for pointer in operation.pointers if values[pointer.name] is not None]
    for pointer in operation.pointers:
        if not pointer.optional and not pointer.written and pointer not in given:
            raise InvalidInput(f"{pointer.name} of {name} is None", "give a tensor")
    _PREPARE.get(name, lambda _: None)(values)
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
def _parameters(name: str) -> tuple[tuple[str, ...], Mapping[str, Any]]:
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

quantize_rows = functools.partial(_launch, "quantize_rows")
norm_modulate_quantize = functools.partial(_launch, "norm_modulate_quantize")
dwconv_glu_quantize = functools.partial(_launch, "dwconv_glu_quantize")
w8a8_linear = functools.partial(_launch, "w8a8_linear")
w8a8_linear_quantize = functools.partial(_launch, "w8a8_linear_quantize")
qkv_linear_attention = functools.partial(_launch, "qkv_linear_attention")
qk_norm_linear_attention = functools.partial(_launch, "qk_norm_linear_attention")
linear_attention_finish = functools.partial(_launch, "linear_attention_finish")
cross_attention_quantize = functools.partial(_launch, "cross_attention_quantize")
patch_embed = functools.partial(_launch, "patch_embed")
sampler_step = functools.partial(_launch, "sampler_step")
velocity_head = functools.partial(_launch, "velocity_head")
w8a8_conv2d = functools.partial(_launch, "w8a8_conv2d")
norm_add_quantize = functools.partial(_launch, "norm_add_quantize")
tensor_scale = functools.partial(_launch, "tensor_scale")
multiscale_linear_attention = functools.partial(_launch, "multiscale_linear_attention")
quantize_digits = functools.partial(_launch, "quantize_digits")
add_norm_digits = functools.partial(_launch, "add_norm_digits")
w8a16_linear = functools.partial(_launch, "w8a16_linear")
soft_capped_attention = functools.partial(_launch, "soft_capped_attention")
