"""Encoding in strips against encoding at once, and its memory estimate."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import OutOfMemory
from sana_edge.nets.autoencoder import Encoder
from sana_edge.nets.quantize import quantize_encoder
from sana_edge.plan import maps
from sana_edge.torch_runtime import encoding
from sana_edge.torch_runtime.encoding import encode

RES, VIT = "ResBlock", "EfficientViTBlock"
# 8 pixels a cell, the first attention at a quarter of the side
CONFIG = AutoencoderConfig(
    encoder_block_types=(RES, RES, VIT, VIT),
    encoder_block_out_channels=(8, 8, 16, 32),
    encoder_layers_per_block=(1, 2, 1, 1),
    encoder_qkv_multiscales=((), (), (5,), (5,)),
    decoder_block_types=(RES,) * 4,
    decoder_block_out_channels=(8, 8, 16, 32),
    decoder_layers_per_block=(1,) * 4,
    decoder_qkv_multiscales=((),) * 4,
    decoder_norm_types=("rms_norm",) * 4,
    decoder_act_fns=("silu",) * 4,
    downsample_block_type="Conv",
    latent_channels=4,
    attention_head_dim=8,
)
CONFIGS = {
    "strided": CONFIG,
    "unshuffled": dataclasses.replace(CONFIG, downsample_block_type="pixel_unshuffle"),
    "no layers at first": dataclasses.replace(CONFIG, encoder_layers_per_block=(0, 1, 1, 1)),
    "convolutions alone": dataclasses.replace(
        CONFIG, encoder_block_types=(RES,) * 4, encoder_qkv_multiscales=((),) * 4
    ),
}


def encoder_of(config: AutoencoderConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config)
    for weight in encoder.parameters():
        # norms and biases too
        weight.data = torch.randn_like(weight) / max(weight[0].numel(), 1) ** 0.5
    return encoder.requires_grad_(False)


def pixels_of(height: int, width: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def budget(config: AutoencoderConfig, height: int, width: int) -> int:
    """Less than the whole takes, enough for the stages that see the whole map."""
    cells = height // 8, width // 8
    whole = maps.encode_bytes(config, *cells, 4)
    strip = maps.middle_bytes(config, height, width, 4) + maps.front_bytes(config, 192, width, 4)
    least = max(maps.back_bytes(config, height, width, 4), strip)
    assert least < whole
    return least


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(520, 40), (416, 72)])
def test_strips_are_the_whole(
    config: AutoencoderConfig, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, pixels = encoder_of(config), pixels_of(*size)
    with torch.no_grad():
        expected = encoder(pixels.clone(memory_format=torch.preserve_format))
    calls: list[int] = []
    conv = encoder.conv_in.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[2]))
    monkeypatch.setattr(encoding, "_rows", lambda *arguments: 64)
    monkeypatch.setattr(maps, "encode_bytes", lambda *arguments: 2)
    monkeypatch.setattr(maps, "front_bytes", lambda *arguments: 1)
    monkeypatch.setattr(maps, "back_bytes", lambda *arguments: 1)
    monkeypatch.setattr(maps, "middle_bytes", lambda *arguments: 0)
    found = encode(encoder, pixels, memory_limit=1)
    conv.remove()
    assert len(calls) == -(-size[0] // 64)
    # the same sums over other strips: some tens of roundings of 2^-24
    assert relative_error(found, expected) <= 1e-5


def test_int8_strips_differ_as_int8_does() -> None:
    """One scale for what a convolution is given: another for each strip."""
    config, size = CONFIG, (416, 40)
    pixels = pixels_of(*size)
    with torch.no_grad():
        exact = encoder_of(config)(pixels.clone(memory_format=torch.preserve_format))
        encoder = encoder_of(config)
        quantize_encoder(encoder)
        whole = encoder(pixels.clone(memory_format=torch.preserve_format))
    strips = encode(encoder, pixels, memory_limit=budget(config, *size))
    assert 0 < relative_error(strips, whole) < 1.5 * relative_error(whole, exact)


def test_at_once_where_it_fits_or_nothing_is_known() -> None:
    encoder, pixels = encoder_of(CONFIG), pixels_of(64, 64)
    with torch.no_grad():
        expected = encoder(pixels.clone(memory_format=torch.preserve_format))
    for limit in (None, maps.encode_bytes(CONFIG, 8, 8, 4)):
        copy = pixels.clone(memory_format=torch.preserve_format)
        assert torch.equal(encode(encoder, copy, memory_limit=limit), expected)


def test_what_does_not_fit_in_strips() -> None:
    least = budget(CONFIG, 520, 40)
    with pytest.raises(OutOfMemory, match=r"encoding 40x520 pixels needs") as caught:
        encode(encoder_of(CONFIG), pixels_of(520, 40), memory_limit=least // 4)
    assert caught.value.free == least // 4 and caught.value.needed > least // 4


MEASURE = """
import torch
from sana_edge import decoding
from sana_edge.config import AutoencoderConfig
from sana_edge.nets.autoencoder import Encoder
from sana_edge.plan import maps
from sana_edge.torch_runtime.encoding import encode

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

decoding.STRIP_BYTES = 4 << 20
types = ("ResBlock", "ResBlock", "EfficientViTBlock")
config = AutoencoderConfig(
    encoder_block_types=types, decoder_block_types=types, encoder_block_out_channels=(32, 32, 64),
    decoder_block_out_channels=(32, 32, 64), encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1), encoder_qkv_multiscales=((), (), (5,)),
    decoder_qkv_multiscales=((), (), (5,)), decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3, downsample_block_type="Conv",
)
encoder = Encoder(config).requires_grad_(False)
height, width = 1024, 512
whole = maps.encode_bytes(config, height // 4, width // 4, 4)
back = max(
    maps.back_bytes(config, height, width, 4),
    maps.middle_bytes(config, height, width, 4) + maps.front_bytes(config, 256, width, 4),
)
assert back < whole
for limit in (None, back):
    pixels = torch.randn(1, 3, height, width).contiguous(memory_format=torch.channels_last)
    encode(encoder, pixels, memory_limit=limit)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    encode(encoder, pixels, memory_limit=limit)
    print((status("VmHWM") - before) / (limit or whole))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_estimate_is_near_the_measured_peak() -> None:
    # glibc would keep freed maps of this size for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment
    )
    whole, strips = (float(line) for line in run.stdout.split())
    # at once, and in strips within the limit
    assert 0.85 < whole < 1.15 and strips < 1.15, (whole, strips)
