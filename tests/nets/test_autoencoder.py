"""The DC-AE against diffusers' AutoencoderDC, with gradients (training) and without (strips, in place)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders import autoencoder_dc as reference
from torch import Tensor, nn

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import CheckpointError
from sana_edge.nets import autoencoder_blocks as blocks
from sana_edge.nets.autoencoder import Autoencoder, decoder_state
from sana_edge.nets.efficient_vit import EfficientViTBlock

RES, VIT = "ResBlock", "EfficientViTBlock"


def settings(
    channels: tuple[int, ...], layers: tuple[int, ...], types: tuple[str, ...], scales: tuple[int, ...]
) -> dict[str, Any]:
    scales_per_stage = tuple(scales if block == VIT else () for block in types)
    per_side = {
        "block_types": types,
        "block_out_channels": channels,
        "layers_per_block": layers,
        "qkv_multiscales": scales_per_stage,
    }
    stages = {"decoder_norm_types": ("rms_norm",) * len(types), "decoder_act_fns": ("silu",) * len(types)}
    return {
        f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in per_side.items()
    } | stages


PLAIN = {"upsample_block_type": "interpolate", "downsample_block_type": "Conv"}
SHUFFLED = {"upsample_block_type": "pixel_shuffle", "downsample_block_type": "pixel_unshuffle"}
CONFIGS = {
    "sana": AutoencoderConfig(
        **settings((8, 16, 16, 32, 64, 64), (1, 1, 1, 1, 1, 2), (RES,) * 3 + (VIT,) * 3, (5,)),
        **PLAIN,
        attention_head_dim=16,
    ),
    "res_only": AutoencoderConfig(
        **settings((8, 8, 16, 16, 32, 32), (1, 1, 1, 1, 1, 1), (RES,) * 6, ()), **PLAIN
    ),
    "shuffled": AutoencoderConfig(
        **settings((8, 8, 16, 16, 32, 64), (0, 1, 1, 1, 1, 1), (RES,) * 5 + (VIT,), (3, 5)), **SHUFFLED
    ),
    "late_first_stage": AutoencoderConfig(
        **settings((8, 8, 16, 16, 32, 32), (0, 1, 1, 1, 1, 1), (RES,) * 5 + (VIT,), ()),
        **PLAIN,
        decoder_conv_act_fn="silu",
    ),
    "no_shortcuts": AutoencoderConfig(
        **settings((6, 12, 12), (1, 2, 1), (RES, RES, VIT), (5,)),
        **SHUFFLED | {"downsample_block_type": "Conv"},
        attention_head_dim=4,
        latent_channels=5,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
    ),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_mode = pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])


def randomised(module: nn.Module) -> nn.Module:
    """Random norm scales, offsets and biases, which start as ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def pair(config: AutoencoderConfig) -> tuple[AutoencoderDC, Autoencoder]:
    torch.manual_seed(0)
    theirs = randomised(AutoencoderDC(**dataclasses.asdict(config)))
    ours = Autoencoder(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of three rows at any size, so that tiny maps have first, middle and last ones."""
    monkeypatch.setattr(blocks, "strip_rows", lambda row_bytes: 3)


@each_config
@each_mode
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (128, 128)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_encode_and_decode_match_diffusers(
    config: AutoencoderConfig, gradients: bool, size: tuple[int, int]
) -> None:
    theirs, ours = pair(config)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    before = pixels.clone()
    with torch.set_grad_enabled(gradients):
        latent = ours.encode(pixels)
        expected = theirs.encode(pixels).latent
        assert relative_error(latent, expected) <= 1e-5
        kept = expected.clone()
        assert relative_error(ours.decode(expected), theirs.decode(kept).sample) <= 1e-5
    assert torch.equal(pixels, before)
    assert torch.equal(expected, kept)


@each_config
@pytest.mark.usefixtures("narrow_strips")
def test_strips_join_without_a_trace(config: AutoencoderConfig) -> None:
    theirs, ours = pair(config)
    with torch.no_grad():
        pixels = torch.rand(2, 3, 64, 96) * 2 - 1
        latent = theirs.encode(pixels).latent
        assert relative_error(ours.encode(pixels), latent) <= 1e-5
        assert relative_error(ours.decode(latent), theirs.decode(latent).sample) <= 1e-5


@each_config
def test_state_dicts_are_interchangeable(config: AutoencoderConfig) -> None:
    theirs, ours = pair(config)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())


@each_mode
@pytest.mark.parametrize(
    ("kind", "width", "height"), [(VIT, 7, 6), (VIT, 8, 4), (RES, 9, 5)], ids=["linear", "quadratic", "res"]
)
def test_blocks_of_full_width_match_diffusers(kind: str, width: int, height: int, gradients: bool) -> None:
    torch.manual_seed(1)
    if kind == VIT:
        channels = 1024
        theirs: nn.Module = reference.EfficientViTBlock(channels, norm_type="rms_norm")
        ours: nn.Module = EfficientViTBlock(channels, 32, (5,))
    else:
        channels = 512
        theirs = reference.ResBlock(channels, channels, norm_type="rms_norm", act_fn="silu")
        ours = blocks.ResBlock(channels, "silu")
    ours.load_state_dict(randomised(theirs).state_dict())
    x = torch.randn(1, channels, height, width)
    with torch.set_grad_enabled(gradients):
        expected = theirs(x.clone())
        assert relative_error(ours(x.contiguous(memory_format=torch.channels_last)), expected) <= 1e-5


def public_config() -> AutoencoderConfig:
    """dc-ae-f32c32-sana-1.0 and 1.1."""
    types = (RES,) * 3 + (VIT,) * 3
    sides = settings((128, 256, 512, 512, 1024, 1024), (2, 2, 2, 3, 3, 3), types, (5,))
    return AutoencoderConfig(**sides | PLAIN | {"decoder_layers_per_block": (3,) * 6})


def test_parameter_count_of_the_public_autoencoder() -> None:
    with torch.device("meta"):
        ours = Autoencoder(public_config())
    total = sum(parameter.numel() for parameter in ours.parameters())
    decoder = sum(parameter.numel() for parameter in ours.decoder.parameters())
    assert round(total / 1e6, 2) == 312.25
    assert round(decoder / 1e6, 1) == 159.2


@pytest.mark.parametrize("name", ["sana", "shuffled"])
def test_gradients_match_diffusers(name: str) -> None:
    theirs, ours = pair(CONFIGS[name])
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    target = torch.rand(2, 3, 64, 64)
    ((ours.decode(ours.encode(pixels)) - target) ** 2).mean().backward()
    ((theirs.decode(theirs.encode(pixels).latent).sample - target) ** 2).mean().backward()
    expected = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        assert expected[key] is not None
        assert relative_error(parameter.grad, expected[key]) <= 1e-4, key


def test_gradients_are_finite_under_bf16_autocast() -> None:
    _, ours = pair(CONFIGS["sana"])
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        out = ours.decode(ours.encode(pixels))
    (out.float() - pixels).abs().mean().backward()
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key


def test_error_in_bf16_is_that_of_diffusers() -> None:
    theirs, ours = pair(CONFIGS["sana"])
    with torch.no_grad():
        latent = torch.randn(2, 32, 4, 5)
        exact = theirs.decode(latent).sample
        half = latent.bfloat16()
        error = relative_error(ours.bfloat16().decode(half), exact)
        assert error <= 1.2 * relative_error(theirs.bfloat16().decode(half).sample, exact)


def test_decoder_alone() -> None:
    config = CONFIGS["res_only"]
    theirs, _ = pair(config)
    ours = Autoencoder(config, encoder=False)
    ours.load_state_dict(decoder_state(theirs.state_dict()))
    latent = torch.randn(1, 32, 2, 3)
    assert relative_error(ours.decode(latent), theirs.decode(latent).sample) <= 1e-5
    with pytest.raises(RuntimeError, match="encoder=False"):
        ours.encode(torch.zeros(1, 3, 32, 32))


def test_widths_that_no_shortcut_can_join() -> None:
    config = dataclasses.replace(CONFIGS["res_only"], decoder_block_out_channels=(8, 8, 12, 16, 32, 32))
    with pytest.raises(CheckpointError, match="cannot join 12 and 32 channels"):
        Autoencoder(config)
