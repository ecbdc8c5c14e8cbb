"""One layer of the Linear DiT on the fused INT8 operations: at most nine launches on CUDA, else twelve.

On CUDA a product turns the rows it makes to INT8 for the next one, normalised where that asks for it.

What has a layer that is kept in 16 bit runs as `Block` computes it, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.fused.text import LayerText
from sana_edge.int8.linear import W8A8Linear
from sana_edge.nets.block import FP16_MAX, RMS_EPS, Block

_ATTENTION_EPS = 1e-15

# columns of rows that a product can turn to INT8 on CUDA
_MOST_COLUMNS = 2304

Product = tuple[Tensor, Tensor, Tensor | None]
# values (B, N, dim) int8 and scales (B, N) fp32
Tokens = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FusedLinear:
    """A `W8A8Linear` as kernels take it; ``static_scale`` is None where each token has a scale."""

    weight: Tensor
    weight_scales: Tensor
    bias: Tensor | None
    static_scale: Tensor | None

    @property
    def product(self) -> Product:
        """What all products take of it."""
        return self.weight, self.weight_scales, self.bias


@dataclass(frozen=True, eq=False)
class Norm:
    """What makes a layer's INT8 tokens of x: vectors (dim,) or (B, 1, dim) fp32, a static scale if any."""

    scale: Tensor
    shift: Tensor
    eps: float
    static_scale: Tensor | None

    def of(self, images: slice) -> dict[str, Any]:
        """The arguments of an operation on some of the images."""
        scale, shift = (v[images] if v.ndim > 1 and len(v) > 1 else v for v in (self.scale, self.shift))
        return {"scale": scale, "shift": shift, "eps": self.eps, "static_scale": self.static_scale}


class FusedBlock:
    """`Block` for inference, whose tensors are prepared once.

    Args:
        dtype: of the token stream.
        clamp: see `Denoiser`.
    """

    def __init__(self, block: Block, *, backend: str, dtype: torch.dtype, clamp: bool) -> None:
        self._block, self._backend, self._dtype, self._clamp = block, backend, dtype, clamp
        self._limit = FP16_MAX if clamp or dtype == torch.float16 else None
        self._makes_rows = backend == "cuda" and block.table.shape[-1] <= _MOST_COLUMNS
        self._qkv, self._out = _pair(block.qkv, block.out)
        self._cross_q, self._cross_out = _pair(block.cross_q, block.cross_out)
        self._expand, self._project = _pair(block.expand, block.project)
        # (3, 3, 2 hidden)
        kernels, bias = block.depthwise.weight.detach(), block.depthwise.bias
        self._kernels = kernels[:, 0].permute(1, 2, 0).to(dtype).contiguous()
        self._kernel_bias = None if bias is None else bias.detach().float()
        self._norm_q, self._norm_k = _fp32(block.norm_q), _fp32(block.norm_k)
        self._cross_norm_q = _fp32(block.cross_norm_q)

    def __call__(
        self,
        x: Tensor,
        vectors: Sequence[Tensor],
        text: LayerText,
        size: tuple[int, int],
        workspace: Tensor | None,
        tokens: Tokens | None = None,
        following: Norm | None = None,
    ) -> Tokens | None:
        """Take x (B, N, dim) through the layer, in place; six fp32 vectors (dim,) or (B, 1, dim).

        Args:
            tokens: what `attention_norm` makes of x, where the layer before has made it.
            following: the `attention_norm` of the next layer.

        Returns:
            The tokens of ``following``, where they were made.
        """
        mixing = self._norm(vectors[3:], self._expand)
        # of readers as they are, of others normed
        tokens = self._attend(x, vectors[:3], text, workspace, tokens, mixing)
        if text.keys is not None:
            tokens = self._read(x, text, workspace, tokens, mixing)
        return self._mix(x, vectors[3:], size, workspace, tokens, following)

    def attention_norm(self, vectors: Sequence[Tensor]) -> Norm | None:
        """What is made of x for self-attention, of the six vectors; None where that is not INT8."""
        return self._norm(vectors, self._qkv)

    def _norm(self, vectors: Sequence[Tensor], layer: FusedLinear | None) -> Norm | None:
        if layer is None:
            return None
        shift, scale, *_ = vectors
        return Norm(scale, shift, self._block.eps, layer.static_scale)

    def _product(
        self,
        read: Tokens,
        layer: FusedLinear,
        x: Tensor,
        workspace: Tensor | None,
        rows: dict[str, Any] | None,
        **asked: Any,
    ) -> Tokens | None:
        """x += a product; its rows in INT8 by ``rows``, where it is given and there is such a kernel."""
        common: dict[str, Any] = {"backend": self._backend, "residual": x, "out": x}
        if rows is None or not self._makes_rows:
            ops.w8a8_linear(*read, *layer.product, self._dtype, **common, **asked)
            return None
        made = ops.w8a8_linear_quantize(
            *read, *layer.product, self._dtype, workspace=workspace, **common, **asked, **rows
        )
        return made[1], made[2]

    def _attend(
        self,
        x: Tensor,
        vectors: Sequence[Tensor],
        text: LayerText,
        workspace: Tensor | None,
        tokens: Tokens | None,
        mixing: Norm | None,
    ) -> Tokens | None:
        fused, backend, constant = ops, self._backend, text.constant
        norm = self._norm(vectors, self._qkv)
        if norm is None or self._out is None:
            self._block.self_attention(x, _cast(vectors, x), self._clamp)
            if constant is not None:
                x.add_(constant.to(x.dtype))
            return None
        tokens = self._quantized(x, norm) if tokens is None else tokens
        q, state, roots = self._state(tokens, workspace)
        read = fused.linear_attention_finish(
            q, state, _ATTENTION_EPS, roots, self._norm_q, self._out.static_scale, backend=backend
        )
        # who reads keys is normed when that is done
        rows = None if mixing is None else mixing.of(slice(None))
        if text.keys is not None:
            cross, first, end = self._cross_q, text.readers.start, text.readers.stop
            plain = (
                None if cross is None else {"plain": (first, end), "plain_static_scale": cross.static_scale}
            )
            rows = None if plain is None else {**(rows or {}), **plain}
        return self._product(
            read, self._out, x, workspace, limit=self._limit, gate=vectors[2], constant=constant, rows=rows
        )

    def _quantized(self, x: Tensor, norm: Norm) -> Tokens:
        tokens: Tokens = ops.norm_modulate_quantize(
            x, norm.scale, norm.shift, norm.eps, norm.static_scale, backend=self._backend
        )
        return tokens

    def _state(
        self, tokens: tuple[Tensor, Tensor], workspace: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, the state of linear attention and, of models with norms of q and k, 1 / rms of both."""
        assert self._qkv is not None
        fused, heads, product = ops, self._block.heads, self._qkv.product
        if self._norm_k is None:
            q, state = fused.qkv_linear_attention(
                *tokens, *product, self._dtype, heads, workspace=workspace, backend=self._backend
            )
            return q, state, None
        qkv = fused.w8a8_linear(*tokens, *product, self._dtype, backend=self._backend)
        roots, state = fused.qk_norm_linear_attention(
            qkv, self._norm_k, heads, RMS_EPS, workspace=workspace, backend=self._backend
        )
        return qkv[..., : len(self._norm_k)], state, roots

    def _read(
        self, x: Tensor, text: LayerText, workspace: Tensor | None, made: Tokens | None, mixing: Norm | None
    ) -> Tokens | None:
        """Cross-attention of the images that read keys; their rows of ``made`` are x, and become normed."""
        fused, backend, readers = ops, self._backend, text.readers
        assert text.keys is not None
        x = x[readers]
        if self._cross_q is None or self._cross_out is None:
            x.add_(self._block.cross_attention(x, text.as_keys_values()))
            return None
        tokens = (
            fused.quantize_rows(x, self._cross_q.static_scale, backend=backend)
            if made is None
            else (made[0][readers], made[1][readers])
        )
        q = fused.w8a8_linear(*tokens, *self._cross_q.product, self._dtype, backend=backend)
        # images of one prompt follow each other: they attend to it as one long image
        values, scales = fused.cross_attention_quantize(
            q.view(len(text.keys), -1, q.shape[-1]),
            *(text.keys, text.values_transposed, text.lengths),
            *(self._cross_norm_q, RMS_EPS, self._cross_out.static_scale),
            backend=backend,
        )
        read = values.view(q.shape), scales.view(q.shape[:-1])
        rows = None
        if made is not None and mixing is not None:
            # cross_q has read these rows
            rows = {**mixing.of(readers), "next_values": tokens[0], "next_scales": tokens[1]}
        self._product(read, self._cross_out, x, workspace, rows=rows)
        return None if rows is None else made

    def _mix(
        self,
        x: Tensor,
        vectors: Sequence[Tensor],
        size: tuple[int, int],
        workspace: Tensor | None,
        tokens: Tokens | None,
        following: Norm | None,
    ) -> Tokens | None:
        fused, backend = ops, self._backend
        norm = self._norm(vectors, self._expand)
        if norm is None or self._expand is None or self._project is None:
            self._block.mix_ffn(x, _cast(vectors, x), size)
            return None
        tokens = self._quantized(x, norm) if tokens is None else tokens
        hidden = fused.w8a8_linear(*tokens, *self._expand.product, self._dtype, backend=backend, silu=True)
        mixed = fused.dwconv_glu_quantize(
            hidden, self._kernels, self._kernel_bias, *size, self._project.static_scale, backend=backend
        )
        rows = None if following is None else following.of(slice(None))
        return self._product(mixed, self._project, x, workspace, gate=vectors[2], rows=rows)


def _pair(first: nn.Module, second: nn.Module) -> tuple[FusedLinear | None, FusedLinear | None]:
    """Both layers, or neither where one is not INT8: what lies between them is fused with both."""
    if not isinstance(first, W8A8Linear) or not isinstance(second, W8A8Linear):
        return None, None
    return _linear(first), _linear(second)


def _linear(layer: W8A8Linear) -> FusedLinear:
    # a CPU holds weights in another order
    return FusedLinear(
        layer.weight.contiguous(),
        layer.weight_scale.float(),
        _fp32(layer.bias),
        layer.input_scale if layer.static else None,
    )


def _fp32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().float().contiguous()


def _cast(vectors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    return [vector.to(x.dtype) for vector in vectors]
