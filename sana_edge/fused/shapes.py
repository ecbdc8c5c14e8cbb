"""Shapes and dtypes of what the operations of `fused_ops` return, for tensors without memory.

The arguments are those of the operations, in the order of their schemas.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    """INT8 of x's shape (..., C), scales (...,)."""
    return _int8(x, x.shape[-1])


def _glu(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _int8(x, x.shape[-1] // 2)


def _int8(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty((*x.shape[:-1], columns), dtype=torch.int8)
    return values, x.new_empty(x.shape[:-1], dtype=torch.float32)


def _linear(values: Tensor, scales: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    _, _, dtype = arguments[:3]
    return values.new_empty((*values.shape[:-1], len(weight)), dtype=dtype)


def _nothing(*_: Any) -> None:
    return None


def _qkv(values: Tensor, scales: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, _, dtype, heads = arguments[:4]
    C = len(weight) // 3
    return values.new_empty((*values.shape[:-1], C), dtype=dtype), _state(values, C, heads)


def _qk_norm(qkv: Tensor, norm_k: Tensor, heads: int, *_: Any) -> tuple[Tensor, Tensor]:
    roots = qkv.new_empty((*qkv.shape[:-1], 2), dtype=torch.float32)
    return roots, _state(qkv, len(norm_k), heads)


def _state(x: Tensor, C: int, heads: int) -> Tensor:
    d = C // heads
    return x.new_empty((len(x), heads, d + 1, d), dtype=torch.float32)


def _patch(latent: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    _, _, copies, dtype = arguments[:4]
    B, _, H, W = latent.shape
    return latent.new_empty((copies * B, H * W, weight.shape[1]), dtype=dtype)


def _head(x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, *arguments: Any) -> Tensor:
    _, guidance, height, width = arguments[:4]
    images = len(x) if guidance is None else len(x) // 2
    return x.new_empty((images, len(weight), height, width), dtype=torch.float32)


def _conv(values: Tensor, scale: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    _, _, dtype, upsample, _, _, _, out_scale = arguments[:8]
    B, H, W, _ = values.shape
    columns = weight.shape[-4] // (4 if upsample == "shuffle" else 1)
    factor = 1 if upsample == "none" else 2
    kind = dtype if out_scale is None else torch.int8
    return values.new_empty((B, factor * H, factor * W, columns), dtype=kind)


# `rows` is that of the others
SHAPES = {
    "dwconv_glu_quantize": _glu,
    "w8a8_linear": _linear,
    "w8a8_linear_add_": _nothing,
    "qkv_linear_attention": _qkv,
    "qk_norm_linear_attention": _qk_norm,
    "patch_embed": _patch,
    "velocity_head": _head,
    "w8a8_conv2d": _conv,
    "w8a8_conv2d_add_": _nothing,
}
