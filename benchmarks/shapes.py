"""The public models' networks in full size, random weights for them, and what their decoders get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from contenders import Work
from torch import Tensor

from sana_edge.config import LATENT_CELL, AutoencoderConfig, DenoiserConfig
from sana_edge.torch_runtime.load import DTYPES

BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

DENOISERS = {
    "0.6b": DenoiserConfig(
        num_layers=28,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "1.6b": DenoiserConfig(),
    # for tests
    "tiny": DenoiserConfig(
        num_layers=3,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
    ),
}
F32C32 = AutoencoderConfig(
    encoder_block_types=BLOCKS,
    decoder_block_types=BLOCKS,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
AUTOENCODERS = {
    "0.6b": F32C32,
    "1.6b": F32C32,
    "tiny": replace(
        F32C32,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        attention_head_dim=16,
    ),
}


def random_weights(shapes: Mapping[str, Tensor], work: Work) -> dict[str, Tensor]:
    """Normal weights that keep activations near 1, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, like in shapes.items():
        fan_in = like[0].numel() if like.ndim > 1 else 4
        tensor = torch.randn(like.shape, generator=generator) * (0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name and name.endswith("weight"):
            tensor += 1
        state[name] = tensor.to(work.device, DTYPES[work.dtype])
    return state


def random_latent(size: int, device: str) -> Tensor:
    """(1, C, h, w) fp32 of a picture with sides of ``size`` pixels, the same in every process."""
    side = size // LATENT_CELL
    shape = (1, DenoiserConfig().in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)
