"""The public models' networks in full size, with random weights, latents, and scales of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sana_edge.config import LATENT_CELL, DenoiserConfig
from sana_edge.int8.quant import QMAX
from sana_edge.store import architectures
from sana_edge.store.tiny_autoencoder import DecoderConfig, TinyAutoencoderConfig

# the scale of a layer that saw nothing but zeros
LEAST = 1e-6
# the last of each for tests
DENOISERS = {
    **{name: architectures.DENOISERS[name] for name in ("0.6b", "1.6b")},
    "tiny": DenoiserConfig(
        num_layers=3,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=48,
    ),
}
AUTOENCODERS = {
    "0.6b": architectures.DC_AE,
    "1.6b": architectures.DC_AE,
    "tiny": replace(
        architectures.DC_AE,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        attention_head_dim=16,
    ),
}
# other decoders of the public models' latents
DECODERS: dict[str, DecoderConfig] = {
    "dc-ae-lite": architectures.DC_AE_LITE,
    "taesana": architectures.TAESANA,
}


def decoder_shapes(shapes: str, name: str) -> DecoderConfig:
    """Another decoder's config beside a model of these shapes; for tests narrow ones."""
    config = DECODERS[name]
    if shapes != "tiny":
        return config
    if isinstance(config, TinyAutoencoderConfig):
        return replace(config, decoder_block_out_channels=(16, 8, 8, 8, 8, 8), num_decoder_blocks=(1,) * 6)
    tiny = AUTOENCODERS["tiny"]
    return replace(
        config,
        encoder_block_out_channels=tiny.encoder_block_out_channels,
        decoder_block_out_channels=tiny.decoder_block_out_channels,
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
    )


def weights(
    shapes: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """Normal weights that keep activations near 1, the same in every process, one tensor at a time.

    device: where they are drawn, each kind its own; they arrive on the CPU.
    """
    generator = torch.Generator(device).manual_seed(0)
    for name, like in shapes.items():
        fan_in = like[0].numel() if like.ndim > 1 else 4
        if "embed_tokens" in name:
            fan_in = 1
        tensor = torch.randn(like.shape, generator=generator, dtype=torch.float32, device=device)
        tensor *= 0.5 if "table" in name else fan_in**-0.5
        # Gemma-2's norms add the 1 themselves
        if "norm" in name and name.endswith("weight") and "layernorm" not in name:
            tensor += 1
        yield name, tensor.to("cpu", dtype)


def random_latent(size: int, device: str) -> Tensor:
    """(1, C, h, w) fp32 of a picture with sides of ``size`` pixels, the same in every process."""
    side = size // LATENT_CELL
    shape = (1, DenoiserConfig().in_channels, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device)


@torch.no_grad()
def static_scales(model: nn.Module, targets: Iterable[str], run: Callable[[], Any]) -> dict[str, float]:
    """One step of INT8 for each target, by its largest input: what calibration finds with many runs.

    Args:
        targets: names of layers that have an ``observer``.
        run: calls the model.
    """
    largest: dict[str, float] = {}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in targets}
    for name, layer in layers.items():

        def listen(x: Tensor, name: str = name) -> None:
            largest[name] = max(largest.get(name, 0.0), float(x.abs().max()))

        layer.observer = listen
    try:
        run()
    finally:
        for layer in layers.values():
            layer.observer = None
    return {name: max(value, LEAST) / QMAX for name, value in largest.items()}
