"""DC-AE, the deep-compression autoencoder of SANA (arXiv 2410.10733): pixels to latents and back.

Module names follow diffusers' ``AutoencoderDC``: a state dict of one loads into the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from sana_edge.config import AutoencoderConfig
from sana_edge.int8.conv import Conv2d
from sana_edge.int8.feature_maps import ChannelNorm, add
from sana_edge.nets.autoencoder_blocks import (
    ACTIVATIONS,
    Downsample,
    ResBlock,
    Upsample,
    average_groups,
    multiple,
)
from sana_edge.nets.efficient_vit import EfficientViTBlock


def _blocks(config: AutoencoderConfig, side: str, stage: int) -> Iterator[nn.Module]:
    channels: int = getattr(config, f"{side}_block_out_channels")[stage]
    for _ in range(getattr(config, f"{side}_layers_per_block")[stage]):
        if getattr(config, f"{side}_block_types")[stage] == "ResBlock":
            yield ResBlock(channels, config.decoder_act_fns[stage] if side == "decoder" else "silu")
        else:
            kernels = getattr(config, f"{side}_qkv_multiscales")[stage]
            yield EfficientViTBlock(channels, config.attention_head_dim, kernels)


class Encoder(nn.Module):
    """Pixels to latents, `Autoencoder.encode` on its own.

    Attributes:
        scaling_factor: what a sampler wants its latents multiplied by.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling_factor = config.scaling_factor
        channels, layers = config.encoder_block_out_channels, config.encoder_layers_per_block
        unshuffle = config.downsample_block_type == "pixel_unshuffle"
        self.conv_in: nn.Module
        if layers[0] > 0:
            self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        else:
            self.conv_in = Downsample(config.in_channels, channels[1], unshuffle=unshuffle, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for stage in range(len(channels)):
            blocks = list(_blocks(config, "encoder", stage))
            if blocks and stage + 1 < len(channels):
                down = Downsample(channels[stage], channels[stage + 1], unshuffle=unshuffle, shortcut=True)
                blocks.append(down)
            self.down_blocks.append(nn.Sequential(*blocks))
        self.conv_out = nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1)
        self.group = multiple(channels[-1], config.latent_channels) if config.encoder_out_shortcut else 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks():
            x = block(x)
        return self.finish(x)

    def blocks(self) -> list[nn.Module]:
        """All but the last convolution, one called after the other."""
        return [self.conv_in, *(block for stage in self.down_blocks for block in stage.children())]

    def finish(self, x: Tensor) -> Tensor:
        """The latent of what the last block made."""
        out: Tensor = self.conv_out(x)
        return add(out, average_groups(x, self.group)) if self.group else out


class Decoder(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, layers = config.decoder_block_out_channels, config.decoder_layers_per_block
        interpolate = config.upsample_block_type == "interpolate"
        self.conv_in = Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.repeats = multiple(channels[-1], config.latent_channels) if config.decoder_in_shortcut else 0
        self.up_blocks = nn.ModuleList()
        for stage in range(len(channels)):
            blocks = list(_blocks(config, "decoder", stage))
            if blocks and stage + 1 < len(channels):
                up = Upsample(channels[stage + 1], channels[stage], interpolate=interpolate, shortcut=True)
                blocks.insert(0, up)
            self.up_blocks.append(nn.Sequential(*blocks))
        width = channels[0] if layers[0] > 0 else channels[1]
        self.norm_out = ChannelNorm(width)
        self.activation = ACTIVATIONS[config.decoder_conv_act_fn]
        self.conv_out: nn.Module
        if layers[0] > 0:
            self.conv_out = Conv2d(width, config.in_channels, 3, padding=1)
        else:
            self.conv_out = Upsample(width, config.in_channels, interpolate=interpolate, shortcut=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.conv_in(x)
        if self.repeats:
            hidden = add(hidden, x.repeat_interleave(self.repeats, dim=1))
        for stage in reversed(self.up_blocks):
            # not stage(hidden), which would keep its input until its last block is done
            for block in stage.children():
                hidden = block(hidden)
        hidden = self.activation(self.norm_out(hidden), inplace=not torch.is_grad_enabled())
        out: Tensor = self.conv_out(hidden)
        return out


class LatentConfig(Protocol):
    """What every decoder's config says."""

    @property
    def in_channels(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def scaling_factor(self) -> float: ...
    @property
    def spatial_compression(self) -> int: ...


class LatentDecoder(nn.Module):
    """What turns latents into pixels: a DC-AE or a tiny autoencoder.

    Attributes:
        whole_maps: whether `decode` holds whole maps of a residual block, not strips of them.
    """

    config: LatentConfig
    decoder: nn.Module
    whole_maps = False

    def decode(self, latent: Tensor) -> Tensor:
        """Return pixels (B, 3, f h, f w), about [-1, 1], of ``latent`` (B, latent channels, h, w).

        ``config.scaling_factor`` is not applied: divide what goes in by it.
        """
        pixels: Tensor = self.decoder(latent.contiguous(memory_format=torch.channels_last))
        return pixels

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in where it is not INT8."""
        return next(self.parameters()).dtype

    def parts(self) -> list[str]:
        """Names of the modules in ``decoder``, in the order of their use."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """What the decoder's time is spent in, one called after the other."""
        raise NotImplementedError

    def stage_end(self, stage: int) -> nn.Module:
        """The last block of a stage; the highest resolution's is 0."""
        raise NotImplementedError

    def doublings(self, name: str) -> int:
        """How often the latent has been doubled where a parameter of this name is used."""
        raise NotImplementedError


class Autoencoder(LatentDecoder):
    """Encoder and decoder, or the decoder alone, with the parameter names of diffusers' ``AutoencoderDC``.

    Neither method applies ``config.scaling_factor``: multiply what `encode` returns by it, divide what
    goes into `decode`.
    """

    config: AutoencoderConfig
    decoder: Decoder

    def __init__(self, config: AutoencoderConfig, *, encoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config) if encoder else None
        self.decoder = Decoder(config)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the latent (B, latent channels, H/f, W/f) of ``pixels`` (B, 3, H, W) in [-1, 1].

        H and W are multiples of f, ``config.spatial_compression``.

        Raises:
            RuntimeError: the instance was made without an encoder.
        """
        if self.encoder is None:
            raise RuntimeError("this autoencoder was made with encoder=False")
        latent: Tensor = self.encoder(pixels.contiguous(memory_format=torch.channels_last))
        return latent

    def parts(self) -> list[str]:
        """See `LatentDecoder.parts`."""
        stages = reversed(range(len(self.decoder.up_blocks)))
        return ["conv_in", *(f"up_blocks.{stage}" for stage in stages), "conv_out"]

    def blocks(self) -> list[nn.Module]:
        """See `LatentDecoder.blocks`."""
        return [block for stage in reversed(self.decoder.up_blocks) for block in stage.children()]

    def stage_end(self, stage: int) -> nn.Module:
        """See `LatentDecoder.stage_end`."""
        return list(self.decoder.up_blocks[stage].children())[-1]

    def doublings(self, name: str) -> int:
        """See `LatentDecoder.doublings`."""
        highest, stage = len(self.decoder.up_blocks) - 1, re.match(r"decoder\.up_blocks\.(\d+)\.", name)
        return highest - int(stage[1]) if stage else (highest if "conv_out" in name else 0)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the encoder's entries of a full state dict, by their names in `Encoder`."""
    return {name[8:]: tensor for name, tensor in state.items() if name.startswith("encoder.")}


def decoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the decoder's entries of a full state dict, for an `Autoencoder` made with ``encoder=False``."""
    return {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
