"""Counted weights and bytes are those of the networks themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2Model

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.nets.autoencoder import Autoencoder, Encoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_decoder, quantize_denoiser, quantize_encoder
from sana_edge.nets.tiny_autoencoder import latent_decoder
from sana_edge.plan import layers, model
from sana_edge.store.known_models import KNOWN
from sana_edge.store.tiny_autoencoder import DecoderConfig, TinyAutoencoderConfig

SMALL = AutoencoderConfig(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
    decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
    encoder_layers_per_block=(1, 2, 1, 1, 1, 2),
    decoder_layers_per_block=(1, 2, 1, 1, 1, 2),
    attention_head_dim=8,
)
TINY = TinyAutoencoderConfig(32, 3, (16, 8, 8, 8, 8, 8), (2, 1, 1, 1, 1, 1))
DECODERS: dict[str, DecoderConfig] = {
    "shuffled": SMALL,
    "interpolated": dataclasses.replace(SMALL, upsample_block_type="interpolate"),
    "no layers at first": dataclasses.replace(SMALL, decoder_layers_per_block=(0, 1, 1, 1, 1, 1)),
    "tiny": TINY,
}
DENOISERS = {
    "plain": DenoiserConfig(
        num_layers=2,
        num_attention_heads=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=96,
        caption_channels=48,
    ),
}
DENOISERS["sprint"] = dataclasses.replace(
    DENOISERS["plain"], guidance_embeds=True, qk_norm="rms_norm_across_heads", attention_bias=True
)
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def weights(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


def held(network: nn.Module) -> int:
    tensors = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("config", DENOISERS.values(), ids=DENOISERS)
def test_denoisers(config: DenoiserConfig) -> None:
    denoiser = Denoiser(config)
    found = list(layers.denoiser_layers(config))
    assert layers.count(found) == weights(denoiser)
    assert layers.weight_bytes(found, 4) == held(denoiser)
    quantize_denoiser(denoiser)
    # as `to_compute` leaves what runs once: all of it in fp32 here, and a scale for each output
    cold = sum(layer.weights for layer in found if layer.cold)
    scales = held(denoiser) - layers.weight_bytes(found, 4, int8=True) - 2 * cold
    assert 0 < scales < 0.1 * held(denoiser)


@pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
def test_decoders(config: DecoderConfig) -> None:
    decoder = latent_decoder(config)
    found = list(layers.decoder_layers(config))
    assert layers.count(found) == weights(decoder)
    quantize_decoder(decoder)
    scales = held(decoder) - layers.weight_bytes(found, 4, int8=True)
    # narrow layers have many outputs for their weights
    assert 0 <= scales < 0.15 * held(decoder)


@pytest.mark.parametrize("halving", ["pixel_unshuffle", "Conv"])
@pytest.mark.parametrize("first", [0, 1])
def test_encoders(halving: str, first: int) -> None:
    depths = (first, *SMALL.encoder_layers_per_block[1:])
    config = dataclasses.replace(SMALL, downsample_block_type=halving, encoder_layers_per_block=depths)
    encoder = Encoder(config)
    found = list(layers.encoder_layers(config))
    assert layers.count(found) == weights(encoder)
    quantize_encoder(encoder)
    assert abs(held(encoder) - layers.weight_bytes(found, 4, int8=True)) < 0.15 * held(encoder)


def test_text_encoders() -> None:
    gemma = Gemma2Model(Gemma2Config(**TEXT, vocab_size=8))
    assert layers.count(layers.text_layers(TEXT)) == weights(gemma) - 8 * TEXT["hidden_size"]


def test_public_models_have_the_published_sizes() -> None:
    """Within 1 %: the table's are rounded."""
    published = {"0.6b": 592e6, "1.6b": 1605e6, "4.8b": 4722e6}
    for info in KNOWN.values():
        facts = model.known_facts(info)
        expected = next(size for kind, size in published.items() if kind in info.name)
        found = layers.count(facts.layers["denoiser"])
        # guidance is embedded by two layers more
        assert abs(found / expected - 1) < (0.02 if facts.denoiser.guidance_embeds else 0.01), info.name
        assert facts.denoiser.native_size == int(
            info.name.replace("-multiling", "").split("-")[-1].replace("bf16", "1024")
        )
    # decoder and encoder together
    both = layers.count(facts.layers["decoder"]) + layers.count(facts.layers["encoder"])
    assert abs(both / 312e6 - 1) < 0.01


def test_products_of_a_decoder() -> None:
    """Places are positions where a weight is used, counted in a real decode of one cell."""
    config = dataclasses.replace(SMALL, upsample_block_type="interpolate")
    decoder = Autoencoder(config, encoder=False)
    counted = 0

    def count(layer: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal counted
        if isinstance(layer, nn.Conv2d):
            counted += layer.weight.numel() * out.shape[2] * out.shape[3]

    hooks = [layer.register_forward_hook(count) for layer in decoder.modules()]
    with torch.no_grad():
        decoder.decode(torch.randn(1, 32, 1, 1))
    for hook in hooks:
        hook.remove()
    # without what is no module's own call: linear layers of attention, and phases
    expected = sum(layer.weights * layer.places for layer in layers.decoder_layers(config))
    assert 0.4 * expected < counted < expected
