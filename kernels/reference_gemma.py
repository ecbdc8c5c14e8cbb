"""What the operations of Gemma-2 (arXiv 2408.00118) compute, and a layer of them in floating point.

Activations between operations are fp32. A product's input has two INT8 digits, x = step · (254 · high + low),
which hold 16 bits of a row's absmax. Heads of q and k have their channels in pairs: 2 i and 2 i + 1 are i and
i + d / 2 of the checkpoint, which rotate with one angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sana_edge.int8 import quant
from sana_edge.kernels import reference

# values of a low digit for one of a high: half a step, ±1/2, becomes ±127
LOW = 2 * quant.QMAX


def split_digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., C) as two digits: (..., 2, C) int8, high then low, and steps (...,) fp32, absmax / 32258.

    high is `quantize_rows`, low what its rounding left over. Steps of rows of zeros are 1 / 254, of rows with
    NaN or infinity NaN.
    """
    x = x.float()
    high, scales = reference.quantize_rows(x)
    rest = x * scales.reciprocal().unsqueeze(-1) - high
    low = (rest * LOW).round().clamp(-quant.QMAX, quant.QMAX).to(torch.int8)
    return torch.stack([high, low], dim=-2), scales / LOW


def quantize_digits(x: Tensor, gated: bool = False) -> tuple[Tensor, Tensor]:
    """`split_digits` of x (..., C); ``gated``: of GELU(gate) · up with x (..., 2 C), gate first."""
    if gated:
        gate, up = x.float().chunk(2, dim=-1)
        x = F.gelu(gate, approximate="tanh") * up
    return split_digits(x)


def add_norm_digits(
    x: Tensor, y: Tensor | None, post_weight: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What lies between two parts of the network: the residual after one, and the input of the next.

    Args:
        x: (..., C) fp32, the residual.
        y: (..., C) fp32, what a part gave; None before the first.
        post_weight: (C,) fp32, of the RMSNorm of y, its 1 included; None with y.
        weight: (C,) fp32, of the RMSNorm before the next part, its 1 included.

    Returns:
        x + norm(y), (..., C) fp32, and `split_digits` of its norm.
    """
    total = x if y is None or post_weight is None else x + reference.rms_norm(y, post_weight, eps)
    return total, *split_digits(reference.rms_norm(total, weight, eps))


def w8a16_linear(
    digits: Tensor,
    steps: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None = None,
    rotation: Tensor | None = None,
    rotated: int = 0,
) -> Tensor:
    """Two-digit activations times INT8 weights, both digits' sums exact.

    Args:
        digits: (..., N, 2, in) int8.
        steps: (..., N) fp32.
        weight: (out, in) int8.
        weight_scales: (out,) fp32.
        bias: (out,) fp32.
        rotation: (N, pairs, 2) fp32, cosine and sine of each token's angles, for heads of 2 · pairs columns.
        rotated: how many of the first columns are heads that rotate.

    Returns:
        (..., N, out) fp32: (254 · high + low) · step · scale + bias, in that order, then `rotate`.
    """
    high, low = (digits.double() @ weight.double().T).float().unbind(-2)
    out = (high * LOW + low) * steps.unsqueeze(-1) * weight_scales
    out = out if bias is None else out + bias
    if rotation is None:
        return out
    return torch.cat([rotate(out[..., :rotated], rotation), out[..., rotated:]], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864) of heads side by side, (..., N, heads · d).

    Args:
        rotation: (N, d / 2, 2), cosine and sine of the angle of each pair of channels.
    """
    first, second = x.unflatten(-1, (-1, rotation.shape[1], 2)).unbind(-1)
    cos, sin = rotation.unsqueeze(1).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-3)


def soft_capped_attention(
    qkv: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    known: Tensor,
    heads: int,
    scale: float,
    cap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of tokens behind a prefix, scores cap · tanh(score / cap).

    Args:
        qkv: (B, N, (heads + 2 kv) · d) fp32: heads of q, then of k, then of v; q and k are rotated.
        prefix_keys: (kv, capacity, d), of what stands before all B texts.
        prefix_values: (kv, capacity, d).
        known: () int32, how many of the prefix count; the first token is at this position.
        heads: heads / kv heads of q share one of k and v.
        scale: multiplies q · k.
        cap: None leaves scores as they are.
        window: a token reads itself and the window - 1 before it; None reads all.

    Returns:
        (B, N, heads · d) fp32.
    """
    kv, _, d = prefix_keys.shape
    q, k, v = qkv.unflatten(-1, (-1, d)).transpose(1, 2).split([heads, kv, kv], dim=1)
    count = int(known)
    before = ((t[None, :, :count].expand(len(qkv), -1, -1, -1)) for t in (prefix_keys, prefix_values))
    k, v = (
        torch.cat([old.float(), own.float()], dim=2).repeat_interleave(heads // kv, dim=1)
        for old, own in zip(before, (k, v), strict=True)
    )
    scores = q.float() @ k.transpose(2, 3) * scale
    scores = scores if cap is None else (scores / cap).tanh() * cap
    at = torch.arange(k.shape[2], device=qkv.device)
    distance = at[count:, None] - at
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    read: Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return read.transpose(1, 2).flatten(2)


def rotation_of(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines (N, pairs, 2) fp32 for positions (N,) and angles per position (pairs,)."""
    angles = positions[:, None].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def pair_channels(weight: Tensor, d: int) -> Tensor:
    """Rows of q or k, (heads · d, ...), with the channels of each head in pairs."""
    paired: Tensor = weight.unflatten(0, (-1, 2, d // 2)).transpose(1, 2).flatten(0, 2)
    return paired


def gemma_layer(
    x: Tensor,
    weights: Mapping[str, Tensor],
    rotation: Tensor,
    *,
    heads: int,
    eps: float,
    cap: float | None,
    scalar: float,
    window: int | None,
) -> Tensor:
    """One layer on whole texts in fp32, nothing quantized: what the operations above make of it.

    Args:
        x: (B, N, C).
        weights: by the names of the checkpoint, "self_attn.q_proj.weight" and so on; norms without their 1.
        rotation: of positions 0 to N - 1.
        scalar: query_pre_attn_scalar, of which the root divides scores.

    Returns:
        (B, N, C) fp32.
    """
    w = {name: weight.float() for name, weight in weights.items()}
    d = 2 * rotation.shape[1]

    def norm(name: str, t: Tensor) -> Tensor:
        return reference.rms_norm(t, 1 + w[f"{name}.weight"], eps)

    def linear(name: str, t: Tensor) -> Tensor:
        return reference.linear(t, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def paired(name: str, t: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias")
        return reference.linear(
            t, pair_channels(w[f"{name}.weight"], d), None if bias is None else pair_channels(bias, d)
        )

    x = x.float()
    tokens = norm("input_layernorm", x)
    q, k = (rotate(paired(f"self_attn.{name}_proj", tokens), rotation) for name in "qk")
    qkv = torch.cat([q, k, linear("self_attn.v_proj", tokens)], dim=-1)
    nothing = x.new_zeros(k.shape[-1] // d, 0, d)
    known = torch.zeros((), dtype=torch.int32)
    read = soft_capped_attention(qkv, nothing, nothing, known, heads, 1 / math.sqrt(scalar), cap, window)
    x = x + norm("post_attention_layernorm", linear("self_attn.o_proj", read))
    tokens = norm("pre_feedforward_layernorm", x)
    hidden = F.gelu(linear("mlp.gate_proj", tokens), approximate="tanh") * linear("mlp.up_proj", tokens)
    return x + norm("post_feedforward_layernorm", linear("mlp.down_proj", hidden))
