"""ReLU linear attention of csrc/, heads of 32, by the names of `reference_fused`."""

from __future__ import annotations

import torch
from torch import Tensor

from sana_edge.errors import InvalidInput
from sana_edge.kernels.cuda import library
from sana_edge.kernels.cuda.library import TYPES

HEAD = 32


def workspace(images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    """Memory for sums between blocks of `qkv_linear_attention` and `qk_norm_linear_attention`, zeros.

    One of the largest size serves all sizes, one call after the other on one stream.
    """
    size = library.load().workspace(images, tokens, heads)
    return torch.zeros(size, dtype=torch.uint8, device=device)


def qkv_linear_attention(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    heads: int,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.qkv_linear_attention` of contiguous tensors; scales and bias fp32."""
    images, tokens, depth = values.shape
    _suits("values", values, (images, tokens, depth), torch.int8)
    _suits("scales", scales, (images, tokens), torch.float32)
    _suits("weight", weight, (3 * heads * HEAD, depth), torch.int8)
    _suits("weight_scales", weight_scales, (3 * heads * HEAD,), torch.float32)
    if bias is not None:
        _suits("bias", bias, (3 * heads * HEAD,), torch.float32)
    q = torch.empty((images, tokens, heads * HEAD), dtype=dtype, device=values.device)
    state = _empty_state(images, tokens, heads, values.device)
    space = _workspace(workspace, images, tokens, heads, values.device)
    library.load().call(
        "qkv_linear_attention",
        values.device,
        values=values,
        scales=scales,
        weight=weight,
        weight_scales=weight_scales,
        bias=bias,
        q=q,
        state=state,
        workspace=space,
        workspace_bytes=space.numel(),
        images=images,
        tokens=tokens,
        heads=heads,
        depth=depth,
        type=TYPES[dtype],
    )
    return q, state


def qk_norm_linear_attention(
    qkv: Tensor, norm_k: Tensor, heads: int, norm_eps: float, workspace: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference_fused.qk_norm_linear_attention` of contiguous tensors; norm_k fp32."""
    images, tokens, _ = qkv.shape
    _suits("qkv", qkv, (images, tokens, 3 * heads * HEAD), qkv.dtype)
    _suits("norm_k", norm_k, (heads * HEAD,), torch.float32)
    roots = torch.empty((images, tokens, 2), dtype=torch.float32, device=qkv.device)
    state = _empty_state(images, tokens, heads, qkv.device)
    space = _workspace(workspace, images, tokens, heads, qkv.device)
    library.load().call(
        "qk_norm_linear_attention",
        qkv.device,
        qkv=qkv,
        norm_k=norm_k,
        roots=roots,
        state=state,
        workspace=space,
        workspace_bytes=space.numel(),
        images=images,
        tokens=tokens,
        heads=heads,
        norm_eps=norm_eps,
        type=TYPES[qkv.dtype],
    )
    return roots, state


def linear_attention_finish(
    q: Tensor,
    state: Tensor,
    eps: float,
    roots: Tensor | None = None,
    norm_q: Tensor | None = None,
    static_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference_fused.linear_attention_finish`; q may be part of wider rows, such as those of qkv."""
    images, tokens, width = q.shape
    heads = state.shape[1]
    stride = q.stride(1) if tokens > 1 else q.stride(0) if images > 1 else width
    rows_follow = images <= 1 or tokens <= 1 or q.stride(0) == tokens * stride
    if width != heads * HEAD or q.stride(2) != 1 or not rows_follow:
        raise InvalidInput(
            f"q: {tuple(q.shape)} with strides {q.stride()}, "
            f"not {heads} heads of {HEAD} in evenly spaced rows",
            "give it contiguous, or as the first third of a contiguous qkv",
        )
    _suits("state", state, (images, heads, HEAD + 1, HEAD), torch.float32)
    if (roots is None) != (norm_q is None):
        raise InvalidInput("roots and norm_q: one of them without the other", "give both or neither")
    if roots is not None and norm_q is not None:
        _suits("roots", roots, (images, tokens, 2), torch.float32)
        _suits("norm_q", norm_q, (width,), torch.float32)
    values = torch.empty((images, tokens, width), dtype=torch.int8, device=q.device)
    scales = torch.empty((images, tokens), dtype=torch.float32, device=q.device)
    library.load().call(
        "linear_attention_finish",
        q.device,
        q=q,
        roots=roots,
        norm_q=norm_q,
        state=state,
        static_scale=static_scale,
        values=values,
        scales=scales,
        images=images,
        tokens=tokens,
        heads=heads,
        type=TYPES[q.dtype],
        q_stride=stride,
        eps=eps,
    )
    return values, scales


def _empty_state(images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    # sums of no tokens are zeros, and the kernels do nothing then
    make = torch.empty if tokens else torch.zeros
    return make((images, heads, HEAD + 1, HEAD), dtype=torch.float32, device=device)


def _workspace(given: Tensor | None, images: int, tokens: int, heads: int, device: torch.device) -> Tensor:
    return workspace(images, tokens, heads, device) if given is None else given


def _suits(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise InvalidInput(
            f"{name}: {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"not contiguous {dtype} {shape}",
            "see kernels/reference_fused.py",
        )
