"""Launchers of the CUDA operations, by the names and arguments of their definitions in `kernels.reference_*`.

An operation with an argument ``workspace`` makes its own where that is None. ``out=`` is what a result is
written to, which may be ``residual``. All raise InvalidInput where shapes, dtypes or layouts do not suit each
other, and SanaError where the library refuses.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sana_edge.kernels.cuda import library, tuning
from sana_edge.kernels.cuda.arguments import Form, parameters, plan
from sana_edge.kernels.cuda.operations import OPERATIONS


def workspace(images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    """Memory for what blocks tell each other: sums of linear attention, and which tiles are written; zeros.

    One of the largest size serves all sizes, one call after the other on one stream.
    """
    return torch.zeros(library.load().workspace(images, tokens, heads), dtype=torch.uint8, device=device)


def _launch(name: str, *arguments: Any, **named: Any) -> Any:
    """Check the arguments of an operation, make its results, and start it on the current stream."""
    names, defaults = parameters(name)
    given = {**defaults, **dict(zip(names, arguments, strict=False)), **named}
    if len(arguments) > len(names) or given.keys() != set(names):
        raise TypeError(f"{name} takes {', '.join(names)}")
    forms = (
        Form(v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v
        for v in (given[argument] for argument in names)
    )
    planned = plan(name, *forms)
    pointers = OPERATIONS[name].names
    device = next(given[pointer].device for pointer in pointers if given[pointer] is not None)
    for result, (shape, dtype) in planned.results.items():
        if given[result] is None:
            given[result] = planned.make(shape, dtype=dtype, device=device)
    fields = {pointer: given[pointer] for pointer in pointers}
    if "workspace" in fields:
        space = fields["workspace"]
        if space is None:
            space = workspace(*planned.sums, device)
        fields |= {"workspace": space, "workspace_bytes": space.numel()}
    numbers = tuning.tuned(name, device, fields, planned.numbers) if name in tuning.TUNED else planned.numbers
    library.load().call(name, device, **fields, **numbers)
    results = tuple(given[result] for result in planned.results)
    return results if len(results) > 1 else results[0]


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
