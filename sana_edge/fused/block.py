"""One layer of the Linear DiT on the fused INT8 operations: at most twelve launches.

What has a layer that is kept in 16 bit runs as `Block` computes it, on the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.fused.text import LayerText
from sana_edge.int8.linear import W8A8Linear
from sana_edge.nets.block import FP16_MAX, RMS_EPS, Block

_ATTENTION_EPS = 1e-15

Product = tuple[Tensor, Tensor, Tensor | None]


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


class FusedBlock:
    """`Block` for inference, whose tensors are prepared once.

    Args:
        dtype: of the token stream.
        clamp: see `Denoiser`.
    """

    def __init__(self, block: Block, *, backend: str, dtype: torch.dtype, clamp: bool) -> None:
        self._block, self._backend, self._dtype, self._clamp = block, backend, dtype, clamp
        self._limit = FP16_MAX if clamp or dtype == torch.float16 else None
        self._qkv, self._out = _pair(block.qkv, block.out)
        self._cross_q, self._cross_out = _pair(block.cross_q, block.cross_out)
        self._expand, self._project = _pair(block.expand, block.project)
        # (3, 3, 2 hidden)
        kernels, bias = block.depthwise.weight.detach(), block.depthwise.bias
        self._kernels = kernels[:, 0].permute(1, 2, 0).float().contiguous()
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
    ) -> None:
        """Take x (B, N, dim) through the layer, in place; six fp32 vectors (dim,) or (B, 1, dim)."""
        self._attend(x, vectors[:3], text.constant, workspace)
        if text.keys is not None:
            self._read(x[text.readers], text)
        self._mix(x, vectors[3:], size)

    def _attend(
        self, x: Tensor, vectors: Sequence[Tensor], constant: Tensor | None, workspace: Tensor | None
    ) -> None:
        fused, backend = ops, self._backend
        if self._qkv is None or self._out is None:
            self._block.self_attention(x, _cast(vectors, x), self._clamp)
            if constant is not None:
                x.add_(constant.to(x.dtype))
            return
        shift, scale, gate = vectors
        tokens = fused.norm_modulate_quantize(
            x, scale, shift, self._block.eps, self._qkv.static_scale, backend=backend
        )
        q, state, roots = self._state(tokens, workspace)
        read = fused.linear_attention_finish(
            q, state, _ATTENTION_EPS, roots, self._norm_q, self._out.static_scale, backend=backend
        )
        fused.w8a8_linear(
            *(*read, *self._out.product, self._dtype),
            backend=backend,
            limit=self._limit,
            gate=gate,
            constant=constant,
            residual=x,
            out=x,
        )

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

    def _read(self, x: Tensor, text: LayerText) -> None:
        """Cross-attention of the images that read keys, x (B', N, dim)."""
        fused, backend = ops, self._backend
        assert text.keys is not None
        if self._cross_q is None or self._cross_out is None:
            x.add_(self._block.cross_attention(x, text.as_keys_values()))
            return
        tokens = fused.quantize_rows(x, self._cross_q.static_scale, backend=backend)
        q = fused.w8a8_linear(*tokens, *self._cross_q.product, self._dtype, backend=backend)
        # images of one prompt follow each other: they attend to it as one long image
        values, scales = fused.cross_attention_quantize(
            q.view(len(text.keys), -1, q.shape[-1]),
            *(text.keys, text.values_transposed, text.lengths),
            *(self._cross_norm_q, RMS_EPS, self._cross_out.static_scale),
            backend=backend,
        )
        read = values.view(q.shape), scales.view(q.shape[:-1])
        fused.w8a8_linear(*read, *self._cross_out.product, self._dtype, backend=backend, residual=x, out=x)

    def _mix(self, x: Tensor, vectors: Sequence[Tensor], size: tuple[int, int]) -> None:
        fused, backend = ops, self._backend
        if self._expand is None or self._project is None:
            self._block.mix_ffn(x, _cast(vectors, x), size)
            return
        shift, scale, gate = vectors
        tokens = fused.norm_modulate_quantize(
            x, scale, shift, self._block.eps, self._expand.static_scale, backend=backend
        )
        hidden = fused.w8a8_linear(*tokens, *self._expand.product, self._dtype, backend=backend, silu=True)
        mixed = fused.dwconv_glu_quantize(
            hidden, self._kernels, self._kernel_bias, *size, self._project.static_scale, backend=backend
        )
        fused.w8a8_linear(
            *mixed, *self._project.product, self._dtype, backend=backend, gate=gate, residual=x, out=x
        )


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
