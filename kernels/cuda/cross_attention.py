"""Cross-attention of csrc/, by the names of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.library import TYPES


def cross_attention_quantize(
    q: Tensor,
    keys: Tensor,
    values_transposed: Tensor,
    lengths: Tensor,
    norm_q: Tensor | None = None,
    norm_eps: float = 1e-5,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.cross_attention_quantize` of contiguous fp16 or bf16 tensors, norm_q (C,) fp32.

    q is rounded to its dtype after its norm, and so are the softmax's numerators. The capacity is a multiple
    of 16; lengths are read on the device, and values beyond them count nothing, but must be finite.

    Raises:
        InvalidInput: shapes or dtypes that do not fit.
    """
    prompts, heads, capacity, head_dim = keys.shape
    tokens, columns = q.shape[-2:]
    expected: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype]] = {
        "q": (q, (prompts, tokens, heads * head_dim), q.dtype),
        "keys": (keys, (prompts, heads, capacity, head_dim), q.dtype),
        "values_transposed": (values_transposed, (prompts, heads, head_dim, capacity), q.dtype),
        "lengths": (lengths, (prompts,), torch.int32),
        "norm_q": (norm_q, (columns,), torch.float32),
        "static_scale": (static_scale, (), torch.float32),
    }
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            raise InvalidInput(
                f"cross_attention_quantize: {name} is {tuple(tensor.shape)} {tensor.dtype}",
                f"it must be {shape} {dtype}",
            )
        if tensor is not None and not tensor.is_contiguous():
            raise InvalidInput(f"cross_attention_quantize: {name} is not contiguous", "use .contiguous()")
    values = torch.empty(q.shape, dtype=torch.int8, device=q.device)
    scales = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    library.load().call(
        "cross_attention_quantize",
        q.device,
        q=q,
        norm_q=norm_q,
        keys=keys,
        values_transposed=values_transposed,
        lengths=lengths,
        static_scale=static_scale,
        values=values,
        scales=scales,
        prompts=prompts,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        capacity=capacity,
        type=TYPES.get(q.dtype, -1),
        norm_eps=norm_eps,
    )
    return values, scales
