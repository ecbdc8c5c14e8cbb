"""Where a layer's input comes from, so that it can be divided by factors for nothing.

A layer reads x / s in place of x when what makes x is divided by s, channel by channel: exactly, because what
lies between is linear in each of these channels alone. Biases are divided with their weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.nets.autoencoder import Autoencoder, LatentDecoder
from sana_edge.nets.autoencoder_blocks import Upsample
from sana_edge.nets.block import Block
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.efficient_vit import EfficientViTBlock
from sana_edge.nets.tiny_autoencoder import TinyAutoencoder, TinyBlock

# divides what makes a layer's input by factors (C,) fp32
Fold = Callable[[Tensor], None]


def denoiser_folds(denoiser: Denoiser) -> dict[str, Fold]:
    """How to divide the input of each quantizable layer, by name; not of ``cross_q``.

    That one reads the residual stream, whose channels the norms read too: nothing can be divided there.
    """
    blocks = cast("list[Block]", list(denoiser.blocks))
    return {
        f"blocks.{index}.{name}": fold
        for index, block in enumerate(blocks)
        for name, fold in _block_folds(denoiser, block, index).items()
    }


def decoder_folds(autoencoder: LatentDecoder) -> dict[str, Fold]:
    """The same for the decoder: ``conv_point``, ``to_out``, and ``conv_out`` where a ReLU comes before it.

    All others read the residual stream, or what SiLU, which is not linear, makes of a convolution.
    """
    if isinstance(autoencoder, TinyAutoencoder):
        return _tiny_folds(autoencoder)
    assert isinstance(autoencoder, Autoencoder)
    decoder = autoencoder.decoder
    folds: dict[str, Fold] = {}
    for name, block in autoencoder.named_modules():
        if isinstance(block, EfficientViTBlock) and name.startswith("decoder."):
            folds |= {f"{name}.{layer}": fold for layer, fold in _vit_folds(block).items()}
    if decoder.activation is F.relu:
        last = "decoder.conv_out.conv" if isinstance(decoder.conv_out, Upsample) else "decoder.conv_out"
        # ReLU(x / s) is ReLU(x) / s
        folds[last] = lambda s: _divide(decoder.norm_out, slice(None), s)
    return folds


def _tiny_folds(autoencoder: TinyAutoencoder) -> dict[str, Fold]:
    """The second and third convolution of a block, which read a ReLU."""

    def fold(before: nn.Module) -> Fold:
        return lambda s: _divide(before, slice(None), s)

    return {
        f"{name}.conv.{after}": fold(block.conv[before])
        for name, block in autoencoder.named_modules()
        if isinstance(block, TinyBlock) and block.activation is F.relu
        for before, after in (("0", "2"), ("2", "4"))
    }


def _block_folds(denoiser: Denoiser, block: Block, index: int) -> dict[str, Fold]:
    return {
        "qkv": lambda s: _divide_modulation(denoiser, index, 0, s),
        "expand": lambda s: _divide_modulation(denoiser, index, 1, s),
        # attention mixes tokens and leaves the channels of v apart
        "out": lambda s: _divide(block.qkv, slice(-len(s), None), s),
        "cross_out": lambda s: _divide(block.cross_kv, slice(-len(s), None), s),
        # value · SiLU(gate), the value is the first half of what the convolution makes
        "project": lambda s: _divide(block.depthwise, slice(0, len(s)), s),
    }


def _vit_folds(block: EfficientViTBlock) -> dict[str, Fold]:
    return {
        "attn.to_out": lambda s: _divide_values(block, s),
        "conv_out.conv_point": lambda s: _divide(block.conv_out.conv_depth, slice(0, len(s)), s),
    }


def _divide_modulation(denoiser: Denoiser, layer: int, branch: int, s: Tensor) -> None:
    if denoiser.smoothing is None:
        shape = (denoiser.config.num_layers, 2, denoiser.config.dim)
        denoiser.smoothing = torch.ones(shape, device=denoiser.table.device)
    denoiser.smoothing[layer, branch] *= s.to(denoiser.smoothing.device)


def _divide_values(block: EfficientViTBlock, s: Tensor) -> None:
    """The values of a multi-scale attention: s is (1 + scales, heads, head dim), the branches in order."""
    attention = block.attn
    width = attention.to_q.out_features
    heads = width // attention.head_dim
    s = s.view(-1, heads, attention.head_dim)
    # q, k and v together, as the attention reads them: every head's q, k and v in turn
    factors = torch.ones(len(s), heads, 3, attention.head_dim, device=s.device)
    factors[:, :, 2] = s
    base, *branches = factors.flatten(1)
    for layer, own in zip((attention.to_q, attention.to_k, attention.to_v), base.split(width), strict=True):
        _divide(layer, slice(None), own)
    for project, own in zip(attention.to_qkv_multiscale, branches, strict=True):
        # depthwise first, which hands the division on; then each output reads the inputs of its group
        out = cast("nn.Conv2d", project.proj_out)
        inputs = base.view(out.groups, 1, -1).expand(-1, out.out_channels // out.groups, -1)
        out.weight.mul_(inputs.reshape(out.weight.shape).to(out.weight.device))
        _divide(out, slice(None), own)


def _divide(layer: nn.Module, channels: slice, s: Tensor) -> None:
    """Output channels of a layer: rows of its weight, and its bias."""
    for parameter in layer.parameters(recurse=False):
        parameter[channels] /= s.view(-1, *[1] * (parameter.ndim - 1)).to(parameter.device)
