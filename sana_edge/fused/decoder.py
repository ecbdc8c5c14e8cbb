"""An INT8 autoencoder on the fused operations: a map is in INT8 between convolutions, and between blocks.

Layers that are not INT8, or whose shapes the operations do not have, stay the modules that they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sana_edge.errors import InvalidInput
from sana_edge.fused.decoder_attention import FusedAttention, FusedGatedConv, attention_fits, gate_fits
from sana_edge.fused.decoder_blocks import (
    ACTIVATIONS,
    FusedConv2d,
    FusedResBlock,
    FusedUpsample,
    convolution_fits,
    res_block_fits,
)
from sana_edge.fused.decoder_maps import Following, Map, Workspaces, norm_vectors
from sana_edge.int8.conv import W8A8Conv2d
from sana_edge.int8.feature_maps import add
from sana_edge.nets.autoencoder import Autoencoder, Decoder, Encoder
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.efficient_vit import EfficientViTBlock, GatedConv, LinearAttention

M = TypeVar("M", bound=nn.Module)
_LAYERS = (FusedAttention, FusedConv2d, FusedGatedConv, FusedResBlock, FusedUpsample)


def fuse_decoder(autoencoder: Autoencoder, backend: str = "cuda") -> Autoencoder:
    """A decoder that computes the same on ``backend``, "cuda" or "torch" (the definition, slow).

    It shares what is not INT8 with ``autoencoder``, has its own order of INT8 weights, no gradients and no
    encoder, and stays on its device and in its 16-bit dtype.

    Raises:
        InvalidInput: the dtype has not 16 bits.
    """
    decoder = autoencoder.decoder
    _check_dtype(decoder.norm_out.weight.dtype)
    fused = _fused(decoder, backend, Workspaces(backend, _heads(decoder)))
    if any(isinstance(layer, _LAYERS) for layer in fused.modules()):
        fused = FusedDecoder(cast(Decoder, fused))
    found = _with_children(autoencoder, {"decoder": fused})
    found.encoder = None
    found.whole_maps = True
    return found


def fuse_encoder(encoder: Encoder, backend: str = "cuda") -> Encoder:
    """An encoder that computes the same on ``backend``, as `fuse_decoder`; what halves stays float.

    Raises:
        InvalidInput: the dtype has not 16 bits.
    """
    _check_dtype(encoder.conv_out.weight.dtype)
    fused: Encoder = _fused(encoder, backend, Workspaces(backend, _heads(encoder)))
    # a stage begins with what is no fused layer
    for stage in fused.down_blocks:
        link(_in_order(stage.children()))
    return fused


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float16, torch.bfloat16):
        raise InvalidInput(f"a fused autoencoder in {dtype}", "convert it to float16 or bfloat16")


class FusedDecoder(nn.Module):
    """`Decoder` with fused layers, which hand on INT8 where they follow each other."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.conv_in, self.repeats = decoder.conv_in, decoder.repeats
        self.up_blocks = decoder.up_blocks
        self.norm_out, self.activation, self.conv_out = decoder.norm_out, decoder.activation, decoder.conv_out
        first: list[nn.Module] = [self.conv_in] if isinstance(self.conv_in, FusedConv2d) else []
        layers = [*first, *_in_order(self._blocks())]
        link(layers)
        last = layers[-1]
        if isinstance(last, FusedResBlock) and last.narrow and isinstance(self.conv_out, _LAYERS):
            norm, activation = norm_vectors(self.norm_out), ACTIVATIONS[self.activation]
            last.following = Following(self.conv_out.takes.scale, norm=norm, activation=activation)

    def _enter(self, x: Tensor) -> Tensor | Map:
        if isinstance(self.conv_in, FusedConv2d):
            entered: Tensor | Map = self.conv_in(x, self.repeats)
            return entered
        hidden: Tensor = self.conv_in(x)
        return add(hidden, x.repeat_interleave(self.repeats, dim=1)) if self.repeats else hidden

    def _blocks(self) -> Iterator[nn.Module]:
        for stage in reversed(self.up_blocks):
            yield from stage.children()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self._enter(x)
        for block in self._blocks():
            hidden = block(hidden)
        if isinstance(hidden, Tensor):
            hidden = self.activation(self.norm_out(hidden), inplace=True)
        out: Tensor = self.conv_out(hidden)
        return out


def link(layers: Iterable[nn.Module]) -> None:
    """Tell fused layers, in the order of their use, what the layer behind each of them takes."""
    for layer, behind in pairwise(layers):
        if isinstance(layer, _LAYERS) and isinstance(behind, _LAYERS):
            layer.following = behind.takes


def _in_order(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Blocks, of EfficientViT's the two halves."""
    for block in blocks:
        if isinstance(block, EfficientViTBlock):
            yield from (block.attn, block.conv_out)
        else:
            yield block


def _heads(network: nn.Module) -> int:
    """The most heads of an attention in it, those of all scales."""
    attentions = [module for module in network.modules() if isinstance(module, LinearAttention)]
    counts = (a.to_out.in_features // a.head_dim for a in attentions)
    return max(counts, default=1)


def _fused(module: M, backend: str, spaces: Workspaces) -> Any:
    if isinstance(module, ResBlock) and res_block_fits(module):
        return FusedResBlock(module, backend, spaces)
    if isinstance(module, Upsample) and convolution_fits(module.conv):
        return FusedUpsample(module, backend, spaces)
    if isinstance(module, LinearAttention) and attention_fits(module):
        return FusedAttention(module, backend, spaces)
    if isinstance(module, GatedConv) and gate_fits(module):
        return FusedGatedConv(module, backend, spaces)
    if isinstance(module, W8A8Conv2d) and convolution_fits(module):
        return FusedConv2d(module, backend, spaces)
    children = {name: _fused(child, backend, spaces) for name, child in module.named_children()}
    return _with_children(module, children) if children else module


def _with_children(module: M, children: Mapping[str, nn.Module]) -> M:
    """A module that shares everything but these children."""
    clone = copy.copy(module)
    clone._modules = {**module._modules, **children}
    return clone
