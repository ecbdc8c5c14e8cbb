"""The denoiser's operations, float and INT8, the only door to their implementations.

Each computes what the function of the same name in `sana_edge.kernels.reference` defines. Tensors that a
docstring calls scratch, and sums "in place", are overwritten where no gradient is recorded.

What makes the CPU fast: oneDNN's 1×1 convolution on a channels-last view is a linear layer that adds its bias
for nothing (torch's own writes the bias first and adds to it), and tensors that stay in the cache and in
malloc's pool cost less than the page faults of fresh ones. What is done to INT8 products (`int_mm`) is
done in pieces that stay in the cache.

On a CUDA device Triton's kernels compute what has a gradient, where they can. The fused operations of INT8
models have a door of their own, `sana_edge.fused.ops`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import conv_product, quant
from sana_edge.int8.conv_product import onednn_refusal as onednn_refusal
from sana_edge.int8.conv_product import pack_conv2d as pack_conv2d
from sana_edge.int8.conv_product import quantize_map as quantize_map
from sana_edge.int8.conv_product import unpack_conv2d as unpack_conv2d
from sana_edge.int8.matmul import hold_weight as hold_weight
from sana_edge.int8.matmul import int8_refusal as int8_refusal
from sana_edge.int8.matmul import int8_sums as int8_sums
from sana_edge.int8.matmul import multiplier
from sana_edge.kernels.triton import support

# a layer's weight and bias
Layer = tuple[Tensor, Tensor]
# gives a linear layer's output channels start to stop: (B, N, stop - start)
Columns = Callable[[int, int], Tensor]

# a piece of the Mix-FFN on a CPU, and what its channels are a multiple of; measured at 1024 px on two cores,
# where 4 to 8 MiB are equally good
_PIECE_BYTES = 6 << 20
_PIECE_CHANNELS = 192

# rows and columns of a piece of an INT8 product, and the bytes in fp32 of one that is quantized, on a CPU
_PRODUCT_ROWS = 256
_PRODUCT_COLUMNS = 576
_QUANTIZED_BYTES = 1 << 20

# heads that Triton's linear attention has
_TRITON_HEADS = (16, 32, 64)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,)."""
    onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if torch.is_grad_enabled() or x.device.type != "cpu" or not onednn or x.ndim != 3:
        return F.linear(x, weight, bias)
    # (B, in, N, 1) in channels-last memory
    image = x.unsqueeze(2).permute(0, 3, 1, 2)
    return F.conv2d(image, weight[..., None, None], bias).permute(0, 2, 3, 1).flatten(1, 2)


def relu_linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float = 1e-15) -> Tensor:
    """ReLU linear attention of scratch (B, N, C) tensors, fp32 inside, also under autocast; (B, N, C)."""
    by_row = not torch.is_grad_enabled() and q.device.type == "cpu"
    with torch.autocast(q.device.type, enabled=False):
        if _triton(q) and q.shape[-1] // heads in _TRITON_HEADS and q.dtype == k.dtype == v.dtype:
            from sana_edge.kernels.triton import linear_attention

            return linear_attention.relu_linear_attention(q, k, v, heads, eps)
        return (_linear_attention_by_row if by_row else _linear_attention)(q, k, v, heads, eps)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float) -> Tensor:
    B, N, C = q.shape
    # (B, heads, N, d)
    q32, k32, v32 = (
        t.float().view(B, N, heads, C // heads).transpose(1, 2) for t in (F.relu(q), F.relu(k), v)
    )
    out = (q32 @ (k32.transpose(2, 3) @ v32)) / (q32 @ k32.sum(2).unsqueeze(3) + eps)
    return out.transpose(1, 2).reshape(B, N, C).to(q.dtype)


def _linear_attention_by_row(q: Tensor, k: Tensor, v: Tensor, heads: int, eps: float) -> Tensor:
    B, N, C = q.shape
    out = q.new_empty(B, N, heads, C // heads)
    for result, *row in zip(out, q.relu_(), k.relu_(), v, strict=True):
        # (heads, N, d); strided views without a copy where the inputs are fp32
        q32, k32, v32 = (t.float().view(N, heads, -1).transpose(0, 1) for t in row)
        # (heads, d, d + 1): the last column sums k, as a column of ones in v would
        state = torch.cat([k32.transpose(1, 2) @ v32, k32.sum(1).unsqueeze(2)], dim=2)
        sums = (q32 @ state).transpose(0, 1)
        torch.div(sums[..., :-1], sums[..., -1:] + eps, out=result)
    return out.flatten(2)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, q (R, heads, N, d) on k, v (R, heads, L, d) under a (R, 1, 1, L) bool mask."""
    if torch.is_grad_enabled() and q.device.type == "cpu":
        # the fused kernel's backward pass on a CPU is many small products, slow for texts this short
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        read: Tensor = scores.softmax(-1).to(v.dtype) @ v
        return read
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm of x (B, N, C), · scale + shift; these are (C,), or (B, 1, C) where rows differ."""
    if scale.ndim == 1:
        return F.layer_norm(x, scale.shape, scale, shift, eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, fp32 inside."""
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def glu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """SiLU, 3×3 depthwise convolution and gate of scratch x (B, N, 2h); (B, N, h)."""
    if _triton(x) and x.is_contiguous():
        from sana_edge.kernels.triton import mix_ffn

        return mix_ffn.glu_depthwise(x, weight, bias, height, width)
    value, gate = _silu_depthwise(x, weight, bias, height, width).chunk(2, dim=-1)
    return value * F.silu(gate, inplace=not torch.is_grad_enabled())


def expand_glu_depthwise(x: Tensor, expand: Columns, depthwise: Layer, height: int, width: int) -> Tensor:
    """`glu_depthwise` of expanded x (B, N, C), (B, N, h), in pieces of channels on a CPU.

    Args:
        expand: gives channels start to stop of the expanded x, (B, N, 2h) in all; x is not read otherwise.
        depthwise: weight (2h, 1, 3, 3) and bias (2h,).
    """
    hidden = len(depthwise[0]) // 2
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return glu_depthwise(expand(0, 2 * hidden), *depthwise, height, width)

    def mix(start: int, stop: int) -> Tensor:
        weight, bias = (tensor[start:stop] for tensor in depthwise)
        return _silu_depthwise(expand(start, stop), weight, bias, height, width)

    out = x.new_empty(*x.shape[:2], hidden)
    step = _PIECE_BYTES // (out[..., 0].numel() * x.element_size())
    step = max(step - step % _PIECE_CHANNELS, _PIECE_CHANNELS)
    for start in range(0, hidden, step):
        stop = min(start + step, hidden)
        gate = F.silu(mix(hidden + start, hidden + stop), inplace=True)
        torch.mul(mix(start, stop), gate, out=out[..., start:stop])
    return out


def _silu_depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    # (B, channels, H, W) in channels-last memory, which is what x already is
    activated = F.silu(x, inplace=not torch.is_grad_enabled())
    image = activated.view(len(x), height, width, -1).permute(0, 3, 1, 2)
    return F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).flatten(1, 2)


def _triton(x: Tensor) -> bool:
    """Whether Triton computes what has a gradient."""
    return torch.is_grad_enabled() and _triton_trains(x.device)


@functools.cache
def _triton_trains(device: torch.device) -> bool:
    return device.type == "cuda" and not support.refusal(device)


def add(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """x + gate · y, in place of x; ``gate`` broadcasts over tokens."""
    if torch.is_grad_enabled():
        return x + y if gate is None else torch.addcmul(x, gate, y)
    return x.add_(y) if gate is None else x.addcmul_(gate, y)


def add_parts(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """x with ``parts`` added to its equal shares along the batch, in place of x."""
    sums = [add(share, part) for share, part in zip(x.chunk(len(parts)), parts, strict=True)]
    if not torch.is_grad_enabled():
        return x
    return torch.cat(sums) if len(sums) > 1 else sums[0]


def saturate(x: Tensor, limit: float) -> Tensor:
    """Scratch x clipped to ±limit."""
    return x.clamp(-limit, limit) if torch.is_grad_enabled() else x.clamp_(-limit, limit)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations (..., C) as int8, one scale per token: values (..., C), scales (...,) fp32.

    The scale of a row with NaN or infinity is NaN, and so is all that is computed from it.
    """
    return _quantize(x, None)


def quantize_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` with one given scale () fp32; the rows' scales are this, or NaN as there."""
    return _quantize(x, scale)


def _quantize(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x.detach().flatten(0, -2)
    values = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    step = max(_QUANTIZED_BYTES // (4 * x.shape[-1]), 1) if x.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].float()
        found = quant.row_scales(piece)
        used = found if scale is None else scale
        scales[start : start + step] = torch.where(found.isfinite(), used, torch.nan)
        values[start : start + step] = quant.quantize(piece, used.unsqueeze(-1))
    return values.view(x.shape), scales.view(x.shape[:-1])


def w8a8_linear(
    values: Tensor,
    scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """INT8 values (..., in) times weight (out, in), exact sums · row scale · column scale + bias; (..., out).

    Args:
        scales: (...,) fp32 of the rows, or () of all of them.
        weight: int8; fastest as `hold_weight` gives it.
        weight_scales: (out,) fp32.
        bias: (out,).
        dtype: of the result; fp32 is used until then.
    """
    left = values.flatten(0, -2)
    rows = scales.expand(values.shape[:-1]).reshape(-1, 1)
    offsets = None if bias is None else bias.float()
    out = torch.empty(len(left), len(weight), dtype=dtype, device=values.device)
    pieces = values.device.type == "cpu"
    height, width = (_PRODUCT_ROWS, _PRODUCT_COLUMNS) if pieces else (max(len(left), 1), len(weight))
    for start in range(0, len(weight), width):
        columns = slice(start, start + width)
        multiply = multiplier(weight[columns])
        for top in range(0, len(left), height):
            band = slice(top, top + height)
            part = multiply(left[band]).mul_(rows[band]).mul_(weight_scales[columns])
            out[band, columns] = part if offsets is None else part.add_(offsets[columns])
    return out.view(*values.shape[:-1], len(weight))


def w8a8_conv2d(
    values: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """INT8 convolution, stride 1, zero padding, exact sums · scale · channel scale + bias; (B, out, H', W').

    Args:
        values: (B, in, H, W) int8.
        scale: () fp32 of the whole map.
        weight: (out, in, kh, kw) int8; fastest as `pack_conv2d` gives it.
        weight_scales: (out,) fp32.
        bias: (out,).
        dtype: of the result; fp32 is used until then.
    """
    if conv_product.is_packed(weight):
        return conv_product.onednn_conv2d(values, scale, weight, weight_scales, bias, padding, dtype)
    if values.device.type == "cpu" and not conv_product.wide_refusal():
        return conv_product.wide_conv2d(values, scale, weight, weight_scales, bias, padding, dtype)
    # (out, kh kw in)
    matrix = weight.permute(0, 2, 3, 1).flatten(1)
    kernel = (weight.shape[2], weight.shape[3])
    height, width = (side + 2 * padding - k + 1 for side, k in zip(values.shape[2:], kernel, strict=True))
    # filled row by row: pieces that are joined in the end would take the memory of two results
    out = torch.empty(len(values), height, width, len(weight), dtype=dtype, device=values.device)
    top = 0
    for columns in conv_product.unfold(values, kernel, padding):
        rows = w8a8_linear(columns, scale, matrix, weight_scales, bias, dtype)
        out[:, top : top + rows.shape[1]] = rows
        top += rows.shape[1]
    return out.permute(0, 3, 1, 2)
