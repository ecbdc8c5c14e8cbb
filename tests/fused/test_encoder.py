"""The fused INT8 encoder on the emulator, against its operations' definitions and against the unfused one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import InvalidInput
from sana_edge.fused.decoder import fuse_encoder
from sana_edge.fused.decoder_attention import FusedAttention, FusedGatedConv
from sana_edge.fused.decoder_blocks import FusedResBlock
from sana_edge.int8 import quant
from sana_edge.nets.autoencoder import Encoder
from sana_edge.nets.quantize import quantize_encoder
from sana_edge.torch_runtime import encoding

RES, VIT = "ResBlock", "EfficientViTBlock"
CONFIG = AutoencoderConfig(
    encoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(16, 16, 32),
    encoder_layers_per_block=(1, 2, 2),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_block_types=(RES, RES, VIT),
    decoder_block_out_channels=(16, 16, 32),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    downsample_block_type="Conv",
    latent_channels=16,
    attention_head_dim=32,
)


@torch.no_grad()
def encoder() -> Encoder:
    """Random weights, norms and biases; nothing is 0 or 1."""
    model = Encoder(CONFIG).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def pixels(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width).bfloat16().contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("emulated")
def test_is_as_good_as_the_unfused() -> None:
    """See test_decoder.py for the bounds of two draws of INT8's noise.

    Against the definition: a map's scale is that of its largest value, which may round to the next of bf16;
    all of the map is then rounded anew, 0.9 % of it. There are 14 maps in INT8, one after the other.
    """
    torch.manual_seed(5)
    exact = encoder()
    torch.manual_seed(5)
    model = encoder()
    quantize_encoder(model)
    model.bfloat16()
    given = pixels(16, 12)
    with torch.no_grad():
        wanted, unfused = exact(given.float()), model(given.clone())
        fused, defined = (fuse_encoder(model, backend)(given.clone()) for backend in ("cuda", "torch"))
    noise = quant.relative_error(unfused, wanted)
    assert noise < 0.05
    assert quant.relative_error(fused, defined) < 14**0.5 * 0.009
    assert quant.relative_error(fused, unfused) < 2**0.5 * noise
    assert quant.relative_error(fused, wanted) < 1.12 * noise


@pytest.mark.usefixtures("emulated")
def test_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    quantize_encoder(model)
    fused = fuse_encoder(model.bfloat16())
    kinds = {type(module) for module in fused.modules()}
    assert {FusedResBlock, FusedAttention, FusedGatedConv} <= kinds
    given = pixels(48, 8)
    monkeypatch.setattr(encoding, "_rows", lambda *_: 16)
    monkeypatch.setattr(encoding.maps, "encode_bytes", lambda *_: 2 << 30)
    whole = encoding.encode(fused, given.clone(), memory_limit=None)
    strips = encoding.encode(fused, given.clone(), memory_limit=1 << 30)
    # each strip has a scale of its own: another draw of INT8's noise
    assert quant.relative_error(strips, whole) < 2**0.5 * 0.05


def test_fp32_is_refused() -> None:
    with pytest.raises(InvalidInput, match="float32"):
        fuse_encoder(encoder())
