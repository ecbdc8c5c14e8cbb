"""One layer of the Linear DiT (arXiv 2410.10629, section 2.2) and what it keeps of the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.int8 import ops
from sana_edge.int8.linear import Linear

RMS_EPS = 1e-5
FP16_MAX = 65504.0


@dataclass(frozen=True)
class KeysValues:
    """One layer's keys and values of a group, (rows, heads, L, head dim).

    ``mask`` is (rows, 1, 1, L) bool, True on valid tokens; None where all are valid.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Constant:
    """One layer's cross-attention output, (rows, 1, dim), for prompts of one token: softmax over it is 1."""

    output: Tensor


class Block(nn.Module):
    """Linear self-attention, cross-attention to the text and Mix-FFN, each added to the token stream.

    All linear layers but ``cross_kv`` may be replaced by `sana_edge.int8.linear.W8A8Linear`.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, config.ffn_dim
        inner = config.num_cross_attention_heads * config.cross_attention_head_dim
        self.eps = config.norm_eps
        self.heads, self.cross_heads = config.num_attention_heads, config.num_cross_attention_heads
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.qkv = Linear(dim, 3 * dim, bias=config.attention_bias)
        self.out = Linear(dim, dim)
        self.cross_q = Linear(dim, inner)
        self.cross_kv = Linear(config.cross_attention_dim, 2 * inner)
        self.cross_out = Linear(inner, dim)
        self.expand = Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = Linear(hidden, dim, bias=False)
        normed = config.qk_norm is not None
        self.norm_q = nn.Parameter(torch.ones(dim)) if normed else None
        self.norm_k = nn.Parameter(torch.ones(dim)) if normed else None
        self.cross_norm_q = nn.Parameter(torch.ones(inner)) if normed else None
        self.cross_norm_k = nn.Parameter(torch.ones(inner)) if normed else None

    def read(self, projected: Tensor, mask: Tensor | None) -> KeysValues | Constant:
        """Keys and values of what `cross_kv` made of captions (rows, L, dim) under a mask (rows, L)."""
        keys, values = projected.chunk(2, dim=-1)
        if projected.shape[1] == 1:
            return Constant(self.cross_out(values))
        keys, values = self._heads(_normed(keys, self.cross_norm_k)), self._heads(values)
        return KeysValues(keys, values, None if mask is None else mask[:, None, None])

    def forward(
        self,
        x: Tensor,
        vectors: Sequence[Tensor],
        text: Sequence[KeysValues | Constant],
        size: tuple[int, int],
        clamp: bool,
    ) -> Tensor:
        """x (B, N, dim) to the same, in place of x without gradients; six vectors (dim,) or (B, 1, dim)."""
        x = self.self_attention(x, vectors[:3], clamp)
        shares = x.chunk(len(text))
        x = ops.add_parts(
            x, [self.cross_attention(part, group) for part, group in zip(shares, text, strict=True)]
        )
        return self.mix_ffn(x, vectors[3:], size)

    def self_attention(self, x: Tensor, vectors: Sequence[Tensor], clamp: bool) -> Tensor:
        """x plus its linear attention, in place; vectors are shift, scale and gate."""
        shift, scale, gate = vectors
        attended = self._attend(ops.norm_modulate(x, scale, shift, self.eps))
        if clamp or attended.dtype == torch.float16:
            attended = ops.saturate(attended, FP16_MAX)
        return ops.add(x, attended, gate)

    def mix_ffn(self, x: Tensor, vectors: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """x plus its Mix-FFN, in place; vectors are shift, scale and gate."""
        shift, scale, gate = vectors
        hidden = ops.norm_modulate(x, scale, shift, self.eps)
        hidden = ops.expand_glu_depthwise(
            hidden, self.expand.columns(hidden), _tensors(self.depthwise), *size
        )
        return ops.add(x, self.project(hidden), gate)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = _normed(q, self.norm_q), _normed(k, self.norm_k)
        output: Tensor = self.out(ops.relu_linear_attention(q, k, v, self.heads))
        return output

    def cross_attention(self, x: Tensor, group: KeysValues | Constant) -> Tensor:
        """What the tokens of a group's images read of the text, not added yet."""
        if isinstance(group, Constant):
            return group.output.repeat_interleave(len(x) // len(group.output), dim=0)
        # images of one prompt follow each other: they attend to it as one long image
        rows = len(group.keys)
        q = _normed(self.cross_q(x), self.cross_norm_q)
        heads = self._heads(q.view(rows, -1, q.shape[-1]))
        read = ops.cross_attention(heads, group.keys, group.values, group.mask)
        output: Tensor = self.cross_out(read.transpose(1, 2).reshape(q.shape))
        return output

    def _heads(self, x: Tensor) -> Tensor:
        # (rows, length, inner) to (rows, heads, length, head dim)
        return x.view(*x.shape[:2], self.cross_heads, -1).transpose(1, 2)


def _tensors(layer: nn.Module) -> ops.Layer:
    weight, bias = layer.parameters()
    return weight, bias


def _normed(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else ops.rms_norm(x, weight, RMS_EPS)
