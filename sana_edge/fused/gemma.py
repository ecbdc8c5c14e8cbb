"""Gemma-2 with INT8 projections on the fused operations: nine launches a layer, whatever the length.

Activations are fp32 between operations, so that nothing overflows where there is no bf16, and have two INT8
digits in products: 16 bits, which err less than a rounding to bf16 does. A prompt is so short that a product
takes as long as reading its weight, with one digit or two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sana_edge.fused import ops
from sana_edge.int8.text_linear import WeightOnlyLinear
from sana_edge.kernels import reference
from sana_edge.kernels.reference_gemma import pair_channels, rotation_of
from sana_edge.nets.text_encoder import KeysValues
from sana_edge.nets.text_weights import text_targets

if TYPE_CHECKING:
    from transformers import Gemma2Model

# weight, its scales and bias
Product = tuple[Tensor, Tensor, Tensor | None]

# what the kernels have: widths of the stream, of the FFN and of all heads; channels of a head
_WIDEST, _WIDEST_PRODUCT = 8192, 16384
_HEAD_DIMS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A decoder layer as the operations take it; norms are fp32 with their 1."""

    input_norm: Tensor
    qkv: Product
    out: Product
    post_attention: Tensor
    pre_ffn: Tensor
    gate_up: Product
    down: Product
    post_ffn: Tensor
    window: int | None


class FusedGemma:
    """A `Gemma2Model` that `refusal` says nothing against; it takes the layers out of the model.

    Attributes:
        embed: token ids (...) to their rows of the embedding.
        dtype: of kept keys and values, and of hidden states.
    """

    def __init__(self, model: Gemma2Model, backend: str) -> None:
        config = model.config
        self.embed, self.dtype = model.embed_tokens, model.norm.weight.dtype
        self._backend, self._eps = backend, config.rms_norm_eps
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        self._scale, self._cap = 1 / math.sqrt(config.query_pre_attn_scalar), config.attn_logit_softcapping
        self._norm = _norm(model.norm)
        self._frequencies = model.rotary_emb.inv_freq.float().to(self._norm.device)
        self._layers = []
        for index, layer in enumerate(model.layers):
            self._layers.append(_layer(layer, config.head_dim))
            # what it was made of may go before the next is
            model.layers[index] = nn.Identity()
        shape = len(self._layers), 1, self._kv_heads, 16, self._head_dim
        nothing = torch.zeros(shape, dtype=self.dtype, device=self._norm.device)
        self._nothing: KeysValues = list(zip(nothing, nothing, strict=True))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._norm.device

    @torch.no_grad()
    def hidden_states(
        self, rows: Tensor, past: KeysValues, known: Tensor, own: KeysValues | None = None
    ) -> Tensor:
        """The last hidden states of texts behind a prefix.

        Args:
            rows: (B, N, C), what `embed` gave.
            past: what this function has left in ``own`` of the prefix, which all B texts have in common; or
                nothing.
            known: () int32 on the device: how many tokens of ``past`` stand before the texts.
            own: gets the texts' own keys and values of each layer, (B, heads, N, d) in ``dtype``.

        Returns:
            (B, N, C) in ``dtype``, after the last norm; what stands behind a token does not change it.
        """
        backend, eps = self._backend, self._eps
        positions = known + torch.arange(rows.shape[1], device=rows.device)
        rotation = rotation_of(positions, self._frequencies)
        rotated = (self._heads + self._kv_heads) * self._head_dim
        x, *tokens = ops.add_norm_digits(
            rows.float(), None, None, self._layers[0].input_norm, eps, backend=backend
        )
        following = [*(layer.input_norm for layer in self._layers[1:]), self._norm]
        for layer, memory, norm in zip(self._layers, past or self._nothing, following, strict=True):
            qkv = ops.w8a16_linear(*tokens, *layer.qkv, rotation, rotated, backend=backend)
            if own is not None:
                own.append(self._keys_values(qkv))
            read = ops.soft_capped_attention(
                *(qkv, memory[0][0], memory[1][0], known, self._heads, self._scale, self._cap, layer.window),
                backend=backend,
            )
            y = self._product(read, layer.out)
            x, *tokens = ops.add_norm_digits(x, y, layer.post_attention, layer.pre_ffn, eps, backend=backend)
            wide = ops.w8a16_linear(*tokens, *layer.gate_up, backend=backend)
            y = self._product(wide, layer.down, gated=True)
            x, *tokens = ops.add_norm_digits(x, y, layer.post_ffn, norm, eps, backend=backend)
        return reference.rms_norm(x, self._norm, eps).to(self.dtype)

    def _product(self, x: Tensor, product: Product, gated: bool = False) -> Tensor:
        tokens = ops.quantize_digits(x, gated, backend=self._backend)
        out: Tensor = ops.w8a16_linear(*tokens, *product, backend=self._backend)
        return out

    def _keys_values(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, N, d)."""
        heads = qkv.view(*qkv.shape[:2], -1, self._head_dim).transpose(1, 2)[:, self._heads :]
        keys, values = heads.to(self.dtype).chunk(2, dim=1)
        return keys.contiguous(), values.contiguous()


def refusal(model: Gemma2Model) -> str:
    """Why a model cannot run as `FusedGemma`; empty where it can."""
    config = model.config
    for name in text_targets(len(model.layers)):
        if not isinstance(model.get_submodule(name), WeightOnlyLinear):
            return f"{name} is not INT8"
    wide, d = config.num_attention_heads * config.head_dim, config.head_dim
    wrong = {
        f"hidden_activation is {config.hidden_activation}": config.hidden_activation != "gelu_pytorch_tanh",
        "its positions are scaled": model.rotary_emb.rope_type != "default",
        "its attention is not causal": bool(getattr(config, "use_bidirectional_attention", False)),
        f"heads have {d} channels": d not in _HEAD_DIMS,
        f"its width is {config.hidden_size}": config.hidden_size % 16 or config.hidden_size > _WIDEST,
        f"its FFN has {config.intermediate_size} channels": config.intermediate_size % 16
        or config.intermediate_size > _WIDEST_PRODUCT,
        f"all heads have {wide} channels": wide % 16 or wide > _WIDEST_PRODUCT,
        "heads do not share keys evenly": config.num_attention_heads % config.num_key_value_heads,
    }
    return next((reason for reason, found in wrong.items() if found), "")


def _layer(layer: nn.Module, head_dim: int) -> _Layer:
    attention, mlp = cast("nn.Module", layer.self_attn), cast("nn.Module", layer.mlp)
    q, k, v, out = (_product(getattr(attention, f"{name}_proj")) for name in "qkvo")
    gate, up, down = (_product(getattr(mlp, f"{name}_proj")) for name in ("gate", "up", "down"))
    return _Layer(
        input_norm=_norm(layer.input_layernorm),
        qkv=_joined(_paired(q, head_dim), _paired(k, head_dim), v),
        out=out,
        post_attention=_norm(layer.post_attention_layernorm),
        pre_ffn=_norm(layer.pre_feedforward_layernorm),
        gate_up=_joined(gate, up),
        down=down,
        post_ffn=_norm(layer.post_feedforward_layernorm),
        window=cast("int | None", attention.sliding_window),
    )


def _product(layer: WeightOnlyLinear) -> Product:
    bias = None if layer.bias is None else layer.bias.float()
    # a mapped file's may begin anywhere, and kernels read 16 bytes at once
    weight = layer.weight.clone() if layer.weight.data_ptr() % 16 else layer.weight
    return weight, layer.weight_scale, bias


def _paired(product: Product, head_dim: int) -> Product:
    weight, scales, bias = product
    return (
        pair_channels(weight, head_dim),
        pair_channels(scales, head_dim),
        None if bias is None else pair_channels(bias, head_dim),
    )


def _joined(*products: Product) -> Product:
    """One product of several, of the same input."""
    weights, scales, biases = zip(*products, strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    return torch.cat(weights), torch.cat(scales), bias


def _norm(norm: nn.Module | Tensor) -> Tensor:
    return 1 + cast("Tensor", cast("nn.Module", norm).weight).detach().float()
