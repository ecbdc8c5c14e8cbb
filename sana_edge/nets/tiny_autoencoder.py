"""The tiny decoder of SANA's latents, TAESANA: convolutions alone, a fifteenth of the DC-AE's products.

Module names follow diffusers' ``AutoencoderTiny``; see `sana_edge.store.tiny_autoencoder` for the source.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sana_edge.decoding import strip_rows
from sana_edge.int8.conv import Conv2d, PhaseConv2d, W8A8PhaseConv2d
from sana_edge.int8.feature_maps import strips
from sana_edge.nets.autoencoder import Autoencoder, LatentDecoder
from sana_edge.nets.autoencoder_blocks import ACTIVATIONS, Upsample
from sana_edge.store.tiny_autoencoder import REACH, DecoderConfig, TinyAutoencoderConfig

# latents beyond this are bent towards it
CLAMP = 3.0


class TinyBlock(nn.Module):
    """Three 3x3 convolutions, added to the input, and ReLU."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        # by their numbers in diffusers' sequence, activations counted
        self.conv = nn.ModuleDict({n: Conv2d(channels, channels, 3, padding=1) for n in ("0", "2", "4")})

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.relu(x + self._convolve(x))
        rows_per_strip = strip_rows(x[:, :, 0].numel() * x.element_size())
        for rows, window, top in strips(x, rows_per_strip, halo=REACH):
            target = x[:, :, rows]
            # at a cut each convolution saw padding in place of a row
            target.add_(self._convolve(window)[:, :, top : top + target.shape[2]]).relu_()
        return x

    def _convolve(self, x: Tensor) -> Tensor:
        inplace = not torch.is_grad_enabled()
        for name in ("0", "2"):
            x = self.activation(self.conv[name](x), inplace=inplace)
        out: Tensor = self.conv["4"](x)
        return out


class _TinyDecoder(nn.Module):
    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.act_fn]
        widths = config.decoder_block_out_channels
        # activations and upsamplings are layers, too, in the numbers of diffusers' sequence
        layers: list[nn.Module] = [Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.Identity()]
        for stage, blocks in enumerate(config.num_decoder_blocks):
            layers += [TinyBlock(widths[stage], config.act_fn) for _ in range(blocks)]
            if stage + 1 < len(widths):
                up = PhaseConv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False)
                layers += [nn.Identity(), up]
        self.layers = nn.ModuleList([*layers, Conv2d(widths[-1], config.out_channels, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        first, _, *others = self.layers
        hidden = self.activation(first(clamped(x)))
        for layer in others:
            if isinstance(layer, nn.Identity):
                continue
            doubles = isinstance(layer, PhaseConv2d | W8A8PhaseConv2d)
            hidden = Upsample.around(layer)(hidden) if doubles else layer(hidden)
        # from 0 to 1
        return hidden.mul(2).sub(1)


class TinyAutoencoder(LatentDecoder):
    """The decoder of an ``AutoencoderTiny`` with its parameter names; it has no encoder here."""

    config: TinyAutoencoderConfig

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = _TinyDecoder(config)
        # moves with the rest, of which nothing may be float
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    @property
    def dtype(self) -> torch.dtype:
        """See `LatentDecoder.dtype`."""
        return self.get_buffer("_like").dtype

    def parts(self) -> list[str]:
        """See `LatentDecoder.parts`."""
        return [f"layers.{n}" for n, layer in enumerate(self.layers) if not isinstance(layer, nn.Identity)]

    def blocks(self) -> list[nn.Module]:
        """See `LatentDecoder.blocks`."""
        return [layer for layer in self.layers if isinstance(layer, TinyBlock)]

    def stage_end(self, stage: int) -> nn.Module:
        """See `LatentDecoder.stage_end`."""
        return self.layers[self.stage(stage)[-1]]

    def doublings(self, name: str) -> int:
        """See `LatentDecoder.doublings`."""
        index = int(name.removeprefix("decoder.layers.").split(".")[0])
        return sum(isinstance(layer, PhaseConv2d | W8A8PhaseConv2d) for layer in self.layers[: index + 1])

    def stage(self, number: int) -> list[int]:
        """Indices of a stage's layers, its upsampling first; the highest resolution's is stage 0."""
        blocks = self.config.num_decoder_blocks
        stage = len(blocks) - 1 - number
        # two layers before the first stage, and two of each upsampling
        first = 2 + sum(blocks[:stage]) + 2 * stage
        return [*([first - 1] if stage else []), *range(first, first + blocks[stage])]

    @property
    def layers(self) -> list[nn.Module]:
        """In the order of their use; activations and upsamplings do nothing themselves."""
        return list(self.decoder.get_submodule("layers").children())


def clamped(x: Tensor) -> Tensor:
    """Latents bent into -3 to 3, where nearly all of them are."""
    return torch.tanh(x / CLAMP) * CLAMP


def latent_decoder(config: DecoderConfig) -> LatentDecoder:
    """The decoder that a config describes, with weights of no meaning."""
    if isinstance(config, TinyAutoencoderConfig):
        return TinyAutoencoder(config)
    return Autoencoder(config, encoder=False)
