"""Decoders of the public models' shapes with random weights, for machines without the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.results import BASELINE, INT8, OURS
from harness.work import Loader, Stage, Work, random_weights, weight_bytes
from sana_edge.bench.shapes import AUTOENCODERS, random_latent, static_scales
from sana_edge.fused import backends
from sana_edge.fused.decoder import fuse_decoder
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.quantize import decoder_targets, quantize_decoder
from sana_edge.store.weights import load_into
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.device import DTYPES
from sana_edge.torch_runtime.load import store_in_16_bit


@dataclass(frozen=True, kw_only=True)
class DecoderWork(Work):
    """The decoder of DC-AE. size: of the picture in pixels; tiled: whether diffusers decodes in its tiles."""

    shapes: str
    size: int
    tiled: bool

    @property
    def title(self) -> str:
        tiles = f"{BASELINE} in tiles, " if self.tiled else ""
        return f"{self.shapes} decoder, {self.size}x{self.size}, {tiles}{self.dtype} on {self.device}"

    @property
    def stages(self) -> tuple[str, ...]:
        return ("decode",)

    @property
    def int8_tolerance(self) -> Mapping[str, float]:
        # one scale for a whole map, in some 60 layers one after the other
        return {"decode": 0.1}

    def limit(self, stage: str, name: str) -> float | None:
        # diffusers' attention sees a tile only
        return None if self.tiled else super().limit(stage, name)

    def state(self) -> dict[str, Tensor]:
        """Weights by diffusers' names, which are ours."""
        with torch.device("meta"):
            shapes = Autoencoder(AUTOENCODERS[self.shapes], encoder=False).state_dict()
        return random_weights(shapes, self)

    def loaders(self) -> dict[str, Loader]:
        state = self.state()
        return {
            OURS: partial(_our_decoder, self, state),
            INT8: partial(_our_decoder, self, state, int8=True),
            BASELINE: partial(_diffusers_decoder, self, state),
        }


def our_decoder(work: DecoderWork, state: Mapping[str, Tensor]) -> Autoencoder:
    """In float."""
    with torch.device("meta"):
        autoencoder = Autoencoder(AUTOENCODERS[work.shapes], encoder=False)
    load_into(autoencoder, state, where=work.title)
    return autoencoder.requires_grad_(False).eval()


def their_decoder(work: DecoderWork, state: Mapping[str, Tensor]) -> nn.Module:
    """diffusers' autoencoder without its encoder."""
    from diffusers import AutoencoderDC

    with torch.device("meta"):
        autoencoder = AutoencoderDC(**asdict(AUTOENCODERS[work.shapes]))
    del autoencoder.encoder
    autoencoder.load_state_dict(state, assign=True)
    found: nn.Module = autoencoder.requires_grad_(False).eval()
    return found


def _our_decoder(work: DecoderWork, state: Mapping[str, Tensor], *, int8: bool = False) -> dict[str, Stage]:
    autoencoder = our_decoder(work, state)
    if int8:
        # a CUDA kernel has no scale of its own for each map
        small = random_latent(work.size, work.device)[..., :8, :8].to(DTYPES[work.dtype])
        scales = None
        if _fuses(work):
            scales = static_scales(
                autoencoder, decoder_targets(autoencoder), lambda: autoencoder.decode(small)
            )
        quantize_decoder(autoencoder, input_scales=scales)
        store_in_16_bit(autoencoder)
    # the layout that the loader of a model folder gives the weights
    autoencoder.to(DTYPES[work.dtype], memory_format=torch.channels_last)  # type: ignore[call-overload]
    autoencoder.requires_grad_(False).eval()
    latent = random_latent(work.size, work.device).to(DTYPES[work.dtype])
    weights = weight_bytes(autoencoder)
    if int8 and _fuses(work):
        autoencoder = fuse_decoder(autoencoder)

    @torch.inference_mode()
    def decode() -> Tensor:
        return tiling.decode(autoencoder, latent)

    return {"decode": Stage(decode, weights)}


def _fuses(work: Work) -> bool:
    """Whether the runtime would fuse this decoder."""
    chosen = backends.choose("auto", torch.device(work.device), work.dtype, True)
    return chosen.name == "cuda" and DTYPES[work.dtype].itemsize == 2


def _diffusers_decoder(work: DecoderWork, state: Mapping[str, Tensor]) -> dict[str, Stage]:
    autoencoder: Any = their_decoder(work, state)
    if work.tiled:
        autoencoder.enable_tiling()
    latent = random_latent(work.size, work.device).to(DTYPES[work.dtype])

    @torch.no_grad()
    def decode() -> Tensor:
        pixels: Tensor = autoencoder.decode(latent, return_dict=False)[0]
        return pixels

    return {"decode": Stage(decode, weight_bytes(autoencoder))}
