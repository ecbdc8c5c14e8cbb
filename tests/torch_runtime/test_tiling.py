"""Tiled decoding against diffusers, the choice between tiles and a whole picture, and its memory estimate."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderDC
from torch import Tensor

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.plan.maps import decode_bytes
from sana_edge.torch_runtime import tiling

RES, VIT = "ResBlock", "EfficientViTBlock"
# 4 pixels per latent cell: tiles of many cells stay small pictures
CONFIG = AutoencoderConfig(
    encoder_block_types=(RES, RES, VIT),
    decoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(8, 16, 32),
    decoder_block_out_channels=(8, 16, 32),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    latent_channels=4,
    attention_head_dim=8,
)


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderDC, Autoencoder]:
    torch.manual_seed(0)
    theirs = AutoencoderDC(**dataclasses.asdict(CONFIG))
    ours = Autoencoder(CONFIG)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("size", "tile", "stride"),
    [
        ((16, 16), 32, 28),
        ((15, 30), 32, 24),
        ((9, 7), 32, 28),
        ((7, 23), 32, 16),
        ((21, 11), 32, 32),
        ((10, 9), 32, 8),
        ((8, 8), 32, 28),
    ],
    ids=["even", "wide", "thin_last_tiles", "wide_low", "no_overlap", "overlap_over_half", "one_tile"],
)
def test_tiles_match_diffusers(
    pair: tuple[AutoencoderDC, Autoencoder], size: tuple[int, int], tile: int, stride: int
) -> None:
    theirs, ours = pair
    torch.manual_seed(1)
    latent = torch.randn(2, 4, *size)
    theirs.enable_tiling(tile, tile, stride, stride)
    with torch.no_grad():
        expected = theirs.decode(latent).sample
    theirs.use_tiling = False
    actual = tiling.decode(ours, latent, tile=tile, stride=stride)
    assert relative_error(actual, expected) <= 1e-5


@torch.no_grad()
def test_tiles_are_not_a_full_decode(pair: tuple[AutoencoderDC, Autoencoder]) -> None:
    _, ours = pair
    latent = torch.randn(1, 4, 16, 16)
    whole = tiling.decode(ours, latent)
    assert torch.equal(whole, ours.decode(latent))
    assert relative_error(tiling.decode(ours, latent, tile=32, stride=28), whole) > 1e-3


def test_each_tile_is_reported(pair: tuple[AutoencoderDC, Autoencoder]) -> None:
    calls: list[tuple[int, int]] = []
    tiling.decode(
        pair[1], torch.randn(2, 4, 9, 16), tile=32, on_tile=lambda done, total: calls.append((done, total))
    )
    assert calls == [(n, 12) for n in range(1, 13)]


def test_tiles_are_chosen_where_a_picture_does_not_fit(
    pair: tuple[AutoencoderDC, Autoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair
    monkeypatch.setattr(tiling, "DEFAULT_TILE", 32)
    latent = torch.randn(1, 4, 24, 24)
    result = 3 * 96 * 96 * 4
    whole = decode_bytes(CONFIG, 24, 24, 4) + result
    one_tile = decode_bytes(CONFIG, 8, 8, 4) + result
    tiled = tiling.decode(ours, latent, tile=32, stride=28)
    assert torch.equal(tiling.decode(ours, latent, memory_limit=whole), tiling.decode(ours, latent))
    assert torch.equal(tiling.decode(ours, latent, memory_limit=whole - 1), tiled)
    assert torch.equal(tiling.decode(ours, latent, memory_limit=one_tile), tiled)
    with pytest.raises(
        OutOfMemory, match=f"96x96 pixels needs {one_tile} bytes, {one_tile - 1} are free"
    ) as e:
        tiling.decode(ours, latent, memory_limit=one_tile - 1)
    assert "smaller" in e.value.hint


@pytest.mark.parametrize(
    ("tile", "stride"), [(0, None), (30, None), (-32, None), (32, 0), (32, 30), (32, 36)]
)
def test_impossible_tiles(pair: tuple[AutoencoderDC, Autoencoder], tile: int, stride: int | None) -> None:
    with pytest.raises(InvalidInput, match=r"tile|stride"):
        tiling.decode(pair[1], torch.randn(1, 4, 24, 24), tile=tile, stride=stride)


def test_where_free_memory_is_unknown_nothing_is_refused(
    pair: tuple[AutoencoderDC, Autoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair
    latent = torch.randn(1, 4, 24, 24)
    whole, tiled = tiling.decode(ours, latent), tiling.decode(ours, latent, tile=32)
    monkeypatch.setattr(tiling, "available_memory", lambda _: None)
    monkeypatch.setattr(tiling, "DEFAULT_TILE", 32)
    assert torch.equal(tiling.decode(ours, latent), whole)
    monkeypatch.setattr(tiling, "_ASSUMED_MEMORY", 1)
    assert torch.equal(tiling.decode(ours, latent), tiled)


def test_estimate_of_the_public_decoder() -> None:
    types = (RES,) * 3 + (VIT,) * 3
    config = AutoencoderConfig(decoder_block_types=types, upsample_block_type="interpolate")
    one_map = 128 * 1024 * 1024 * 4
    # input and output of the last upsampling, and strips
    needed = decode_bytes(config, 32, 32, 4)
    assert 1.5 * one_map < needed < 2.2 * one_map
    assert decode_bytes(config, 32, 32, 2) < 0.6 * needed
    assert decode_bytes(config, 128, 128, 4) > 14 * needed


# a second decode, after the libraries have made their lasting allocations; strips are narrow to be several
MEASURE = """
import torch
from sana_edge import decoding as maps
from sana_edge.int8 import conv_product
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.config import AutoencoderConfig
from sana_edge.nets.quantize import quantize_decoder
from sana_edge.plan.maps import decode_bytes

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

maps.STRIP_BYTES = 4 << 20
# so are the pieces of CPUs without INT8 products
conv_product._UNFOLDED_BYTES = conv_product._WIDE_BYTES = 1 << 19
side = 96
for case in ("ResBlock interpolate", "ResBlock pixel_shuffle", "EfficientViTBlock interpolate"):
    block, up = case.split()
    config = AutoencoderConfig(
        decoder_block_types=("ResBlock", block), decoder_block_out_channels=(64, 64),
        encoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(64, 64),
        encoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_layers_per_block=(1, 1), decoder_qkv_multiscales=((), (5,)),
        decoder_norm_types=("rms_norm",) * 2, decoder_act_fns=("silu",) * 2, upsample_block_type=up,
    )
    latent = torch.randn(1, 32, side, side)
    for int8 in (False, True):
        decoder = Autoencoder(config, encoder=False)
        if int8:
            quantize_decoder(decoder)
        with torch.no_grad():
            decoder.decode(latent)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            before = status("VmRSS")
            decoder.decode(latent)
        print((status("VmHWM") - before) / decode_bytes(config, side, side, 4, int8=int8))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_estimate_is_near_the_measured_peak() -> None:
    # glibc would keep freed maps of this size for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment
    )
    ratios = [float(line) for line in run.stdout.split()]
    # float and INT8
    assert len(ratios) == 6
    assert all(0.85 < ratio < 1.15 for ratio in ratios), ratios
