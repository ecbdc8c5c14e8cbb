"""The fused INT8 decoder on the emulator, against its operations' definitions and against the unfused one."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import InvalidInput
from sana_edge.fused.decoder import FusedDecoder, fuse_decoder
from sana_edge.fused.decoder_attention import FusedAttention, FusedGatedConv
from sana_edge.fused.decoder_blocks import FusedConv2d, FusedResBlock, FusedUpsample
from sana_edge.fused.decoder_maps import Map, Workspaces
from sana_edge.int8 import quant
from sana_edge.int8.conv import Conv2d, W8A8Conv2d
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.quantize import decoder_targets, quantize_decoder
from sana_edge.torch_runtime import tiling

RES, VIT = "ResBlock", "EfficientViTBlock"
SANA = AutoencoderConfig(
    decoder_block_types=(RES, RES, VIT),
    decoder_block_out_channels=(16, 16, 32),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu", "relu", "silu"),
    encoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(16, 24, 32),
    encoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    decoder_in_shortcut=True,
    latent_channels=16,
    attention_head_dim=32,
)
SHUFFLED = replace(
    SANA,
    upsample_block_type="pixel_shuffle",
    decoder_layers_per_block=(0, 1, 1),
    decoder_conv_act_fn="silu",
)
CONFIGS = {"interpolate": SANA, "shuffled": SHUFFLED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def decoder(config: AutoencoderConfig) -> Autoencoder:
    """Random weights, norms and biases; nothing is 0 or 1."""
    model = Autoencoder(config, encoder=False).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def calibrated(model: Autoencoder, latent: Tensor) -> dict[str, float]:
    """Scales of the absmax of each layer's input."""
    absmax: dict[str, float] = {}

    def observer(name: str) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            absmax[name] = max(absmax.get(name, 0.0), float(x.abs().max()))

        return see

    layers: dict[str, Any] = {name: model.get_submodule(name) for name in decoder_targets(model)}
    for name, layer in layers.items():
        layer.observer = observer(name)
    model.decode(latent.clone())
    for layer in layers.values():
        layer.observer = None
    return {name: float(quant.scales(torch.tensor(value))) for name, value in absmax.items()}


@torch.no_grad()
def int8(
    config: AutoencoderConfig, latent: Tensor, *, static: bool = True, keep: Collection[str] = ()
) -> Autoencoder:
    model = decoder(config)
    scales = calibrated(model, latent) if static else {}
    quantize_decoder(model, keep=keep, input_scales={k: v for k, v in scales.items() if k not in keep})
    return model.bfloat16()


@torch.no_grad()
def decode(model: Autoencoder, latent: Tensor) -> Tensor:
    return model.decode(latent.bfloat16())


def kinds(model: Autoencoder) -> set[type]:
    return {type(module) for module in model.modules()}


def test_what_is_fused() -> None:
    latent = torch.randn(1, 16, 2, 2)
    blocks = {FusedResBlock, FusedUpsample, FusedAttention, FusedGatedConv}
    assert blocks | {FusedConv2d} <= kinds(fuse_decoder(int8(SANA, latent)))
    # a layer that stays float takes its block with it, and the block's other layer is fused alone
    model = int8(
        SANA, latent, keep=("decoder.up_blocks.0.1.conv1", "decoder.conv_out", "decoder.up_blocks.1.0.conv")
    )
    mixed = fuse_decoder(model)
    assert isinstance(mixed.get_submodule("decoder.up_blocks.0.1"), ResBlock)
    assert isinstance(mixed.get_submodule("decoder.up_blocks.0.1.conv2"), FusedConv2d)
    assert isinstance(mixed.get_submodule("decoder.up_blocks.1.0"), Upsample)
    assert isinstance(mixed.get_submodule("decoder.conv_out"), Conv2d)
    assert type(mixed.decoder) is FusedDecoder
    # the decoder that was given is as it was
    assert not kinds(model) & {*blocks, FusedConv2d}
    assert kinds(fuse_decoder(decoder(SANA).half())) == kinds(decoder(SANA))
    with pytest.raises(InvalidInput, match="float32"):
        fuse_decoder(decoder(SANA))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@each_config
def test_equals_the_definition(config: AutoencoderConfig, static: bool) -> None:
    """On two pictures of 3x2 cells.

    The operations differ from their definitions by the order of sums: a few values of a map round to the next
    of bf16 or INT8, never all of them. Were all of one map rounded anew, it would be noise of one INT8 step,
    1/127 of the largest value, / sqrt(12): 0.9 % of a map whose largest value is 4 times its rms.
    """
    latent = torch.randn(2, 16, 3, 2)
    model = int8(config, latent, static=static)
    actual, expected = decode(fuse_decoder(model), latent), decode(fuse_decoder(model, "torch"), latent)
    assert actual.dtype == torch.bfloat16
    assert actual.shape == expected.shape
    assert quant.relative_error(actual, expected) < 0.009


@pytest.mark.usefixtures("emulated")
@each_config
def test_is_as_good_as_the_unfused(config: AutoencoderConfig) -> None:
    """Against the float decoder, and against the INT8 decoder of torch's operations.

    That one rounds to bf16 before every quantization, which moves values of up to 127 steps by up to
    127 · 2^-9 = 1/4 of one: another draw of the same noise. Two draws of relative size e differ by about
    sqrt(2) e where they have nothing in common, and these have much; either is as good, within 12 % (1 dB)
    for a picture of this size.
    """
    latent = torch.randn(1, 16, 4, 3)
    torch.manual_seed(7)
    exact = decoder(config)
    torch.manual_seed(7)
    model = int8(config, latent)
    with torch.no_grad():
        pixels = exact.decode(latent.clone())
    unfused, fused = decode(model, latent), decode(fuse_decoder(model), latent)
    noise = quant.relative_error(unfused, pixels)
    assert noise < 0.05
    assert quant.relative_error(fused, unfused) < 2**0.5 * noise
    assert quant.relative_error(fused, pixels) < 1.12 * noise
    peak, levels = float(pixels.abs().max()), 255.0
    pictures = [((x.float() / peak + 1) / 2 * levels).round().clamp(0, levels) for x in (fused, unfused)]
    mean = (pictures[0] - pictures[1]).square().mean().item()
    assert 10 * math.log10(levels**2 / mean) > 30


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    "keep",
    [
        ("decoder.up_blocks.0.1.conv1",),
        ("decoder.up_blocks.0.1.conv2", "decoder.conv_in"),
        ("decoder.up_blocks.1.0.conv", "decoder.conv_out"),
        ("decoder.up_blocks.2.0.attn.to_out", "decoder.up_blocks.2.0.conv_out.conv_inverted"),
    ],
    ids=str,
)
def test_float_layers_stay(keep: tuple[str, ...]) -> None:
    latent = torch.randn(1, 16, 3, 3)
    model = int8(SANA, latent, keep=keep)
    unfused, fused = decode(model, latent), decode(fuse_decoder(model), latent)
    # another draw of INT8's noise, as above, of which this is the bound there
    assert quant.relative_error(fused, unfused) < 2**0.5 * 0.05


@pytest.mark.usefixtures("emulated")
def test_more_channels_than_a_tile_normalises() -> None:
    torch.manual_seed(3)
    block = ResBlock(272, "silu").requires_grad_(False)
    for conv in ("conv1", "conv2"):
        block.set_submodule(
            conv,
            W8A8Conv2d.from_float(cast(Conv2d, block.get_submodule(conv)), input_scale=torch.tensor(0.03)),
        )
    block = block.bfloat16()
    x = torch.randn(1, 272, 3, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = FusedResBlock(block, "torch", Workspaces("torch", 1))(x.clone())
        actual = FusedResBlock(block, "cuda", Workspaces("cuda", 1))(x.clone())
    # a neighbour of bf16 before the norm, and one behind it
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("emulated")
@each_config
def test_handing_on_changes_nothing(config: AutoencoderConfig) -> None:
    """A block's INT8 for the next is what that would make of its 16 bits, but for the last norm's."""
    latent = torch.randn(2, 16, 3, 2)
    model = int8(config, latent)
    fused, apart = fuse_decoder(model), fuse_decoder(model)
    handed: list[bool] = []
    for block in apart.blocks()[:-1]:
        for layer in block.modules():
            if hasattr(layer, "following"):
                layer.following = None
    for block in fused.blocks():
        block.register_forward_hook(lambda _, __, out: handed.append(isinstance(out, Map)))
    found = decode(fused, latent)
    assert handed == [True] * len(fused.blocks())
    assert torch.equal(found, decode(apart, latent))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("kernels", [(), (3,), (5, 5)], ids=str)
def test_other_scales_of_attention(kernels: tuple[int, ...]) -> None:
    config = replace(SANA, decoder_qkv_multiscales=((), (), kernels))
    latent = torch.randn(1, 16, 3, 3)
    model = int8(config, latent)
    fused = fuse_decoder(model)
    assert (FusedAttention in kinds(fused)) is (kernels == ())
    # another draw of INT8's noise, as above
    assert quant.relative_error(decode(fused, latent), decode(model, latent)) < 2**0.5 * 0.05


@pytest.mark.usefixtures("emulated")
def test_in_tiles() -> None:
    latent = torch.randn(2, 16, 3, 2)
    model = fuse_decoder(int8(SANA, latent))
    whole = tiling.decode(model, latent.bfloat16())
    assert torch.equal(whole[1:], decode(model, latent[1:]))
    tiles = tiling.decode(model, latent.bfloat16(), tile=8, stride=8)
    assert tiles.shape == whole.shape
    assert tiles.isfinite().all()


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    latent = torch.randn(1, 16, 3, 3)
    model = fuse_decoder(int8(SANA, latent))
    latent[0, 3, 1, 1] = bad
    assert decode(model, latent).isnan().any()


@pytest.mark.usefixtures("emulated")
def test_does_not_change_the_latent() -> None:
    latent = torch.randn(1, 16, 3, 3).bfloat16().contiguous(memory_format=torch.channels_last)
    model = fuse_decoder(int8(SANA, latent.float()))
    before = latent.clone()
    with torch.no_grad():
        model.decode(latent)
    assert torch.equal(latent, before)
