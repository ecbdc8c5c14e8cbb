"""Tiles with numpy against tiles with torch; strips against the whole, with graphs that see their halo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sana_edge.config import AutoencoderConfig
from sana_edge.engines import strips, tiles
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.store import hub
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.load import load_encoder

CONFIG = AutoencoderConfig(
    encoder_block_types=("ResBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3,
    encoder_block_out_channels=(8, 8, 16),
    decoder_block_out_channels=(8, 8, 16),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((),) * 3,
    decoder_qkv_multiscales=((),) * 3,
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    latent_channels=4,
)


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(CONFIG, encoder=False).requires_grad_(False).eval()


def runner(model: Autoencoder) -> tiles.Run:
    @torch.no_grad()
    def run(latent: np.ndarray) -> np.ndarray:
        assert latent.flags.c_contiguous
        pixels = model.decode(torch.from_numpy(latent)).contiguous().numpy()
        # what an engine returns may be read-only
        pixels.flags.writeable = False
        return pixels

    return run


@pytest.mark.parametrize(
    ("size", "tile", "stride"),
    [((16, 16), 32, 28), ((15, 30), 32, 24), ((7, 23), 32, 16), ((21, 11), 32, 32), ((8, 8), 32, None)],
    ids=["even", "wide", "wide_low", "no_overlap", "one_tile"],
)
def test_tiles_equal_torch(model: Autoencoder, size: tuple[int, int], tile: int, stride: int | None) -> None:
    latent = torch.randn(1, 4, *size)
    expected = tiling.decode(model, latent, tile=tile, stride=stride)
    calls: list[tuple[int, int]] = []
    actual = tiles.decode_tiles(
        latent.numpy(),
        runner(model),
        cell=4,
        tile=tile,
        stride=stride,
        on_tile=lambda done, total: calls.append((done, total)),
    )
    # the same operations on the same values, roundings included
    assert np.array_equal(actual, expected.numpy())
    assert calls == [(n + 1, len(calls)) for n in range(len(calls))]


@pytest.mark.parametrize(
    ("tile", "stride"), [(0, None), (30, None), (-32, None), (32, 0), (32, 30), (32, 36)]
)
def test_impossible_tiles(tile: int, stride: int | None) -> None:
    with pytest.raises(InvalidInput, match=r"tile|stride"):
        tiles.tile_cells(24, 4, tile, stride)


def test_tiles_that_fit() -> None:
    def choose(limit: int | None, cells: int = 64) -> int | None:
        return tiles.choose_tile(cells, cells, cell=32, pixel_bytes=2000, memory_limit=limit)

    whole = 2048**2 * (2000 + 12)
    assert choose(whole) is None
    assert choose(whole - 1) == 1024
    assert choose(1024**2 * 2000 + 12 * 2048**2 - 1) == 512
    assert choose(None) == 1024
    assert choose(None, 32) is None
    with pytest.raises(OutOfMemory, match="2048x2048") as error:
        choose(12 * 2048**2)
    assert "smaller" in error.value.hint


# --- strips


def stage(width: int, radius: int) -> Callable[[np.ndarray], np.ndarray]:
    """Zero-padded 3x3 convolutions after nearest-neighbour doubling, in integers that fp32 holds."""
    weights = [torch.randint(-1, 2, (width, width, 3, 3)).float() for _ in range(radius)]

    def run(x: np.ndarray) -> np.ndarray:
        hidden = F.interpolate(torch.from_numpy(x), scale_factor=2)
        for weight in weights:
            # remainders, so that sums stay exact
            hidden = F.conv2d(hidden, weight, padding=1).remainder(97)
        return np.asarray(hidden.numpy())

    return run


@pytest.mark.parametrize("height", [1, 2, 13, 40])
@pytest.mark.parametrize("strip_rows", [1, 14, 1000])
def test_strips_equal_the_whole(height: int, strip_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_MIN_ROWS_PER_HALO", 1)
    parts = [stage(3, 4), stage(3, 1), stage(3, 3)]
    halos = [2, 1, 2]
    heights: list[set[int]] = [set() for _ in parts]

    def counted(n: int) -> strips.Run:
        def run(x: np.ndarray) -> np.ndarray:
            heights[n].add(x.shape[2])
            return parts[n](x)

        return run

    tails = [strips.Tail(counted(n), halo, 2, 5) for n, halo in enumerate(halos)]
    latent = torch.randint(0, 97, (1, 3, height, 5)).float().numpy()
    expected = latent
    for part in parts:
        expected = part(expected)
    done: list[tuple[int, int]] = []
    actual = strips.decode_strips(
        latent,
        lambda x: x,
        tails,
        # for all three tails
        strip_bytes=3 * 4 * 5 * 5 * strip_rows,
        on_rows=lambda rows, all_rows: done.append((rows, all_rows)),
    )
    assert np.array_equal(actual, expected)
    # one shape for an engine to prepare for
    assert [len(found) for found in heights] == [1, 1, 1]
    assert done[-1] == (8 * height, 8 * height)
    if strip_rows == 1 and height == 40:
        assert max(heights[0]) == 6 and len(done) > 10


def test_a_halo_too_small_shows() -> None:
    part = stage(3, 4)
    latent = torch.randint(0, 97, (1, 3, 40, 5)).float().numpy()
    tails = [strips.Tail(part, 1, 2, 5)]
    actual = strips.decode_strips(latent, lambda x: x, tails, strip_bytes=1)
    assert not np.array_equal(actual, part(latent))


def test_without_tails_it_is_the_head() -> None:
    latent = torch.randn(1, 3, 4, 5).numpy()
    assert np.array_equal(strips.decode_strips(latent, lambda x: 2 * x, []), 2 * latent)


def test_windows_cover_every_row_once() -> None:
    for height in range(1, 40):
        for halo in range(4):
            for rows in range(2 * halo + 1, 42):
                found = strips.windows(height, rows, halo)
                assert [top for _, top, _ in found] == [0, *(bottom for *_, bottom in found[:-1])]
                assert found[-1][2] == height
                for start, top, bottom in found:
                    stop = start + min(rows, height)
                    assert start >= 0 and stop <= height and top < bottom
                    assert start == 0 or top - start >= halo
                    assert stop == height or stop - bottom >= halo


def test_windows_are_as_even_as_can_be() -> None:
    for height in range(1, 60):
        for halo in range(4):
            for most in range(2 * halo + 1, 62):
                rows = strips.even_rows(height, most, halo)
                count = len(strips.windows(height, most, halo))
                assert rows <= most and len(strips.windows(height, rows, halo)) == count
                if count > 1 and rows - 1 > 2 * halo:
                    assert len(strips.windows(height, rows - 1, halo)) > count


def test_no_torch_is_imported() -> None:
    code = "import sys; sys.modules['torch'] = None; import sana_edge.engines.decoder"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_encoding_in_tiles_is_near_the_whole() -> None:
    """As near as attention that sees less allows: the error that the docstring states."""
    encoder = load_encoder(hub.resolve("sana-tiny"), device=torch.device("cpu"), dtype=torch.float32)
    noise = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(3))
    pixels = F.interpolate(noise, scale_factor=32, mode="bicubic").clamp(-1, 1).numpy()
    seen: list[tuple[int, ...]] = []

    @torch.no_grad()
    def run(x: np.ndarray) -> np.ndarray:
        assert x.flags.c_contiguous
        seen.append(x.shape[2:])
        return encoder(torch.from_numpy(x)).contiguous().numpy()

    whole = tiles.encode_tiles(pixels, run, cell=32)
    assert seen == [(384, 512)] and whole.shape == (1, 32, 12, 16)
    found = tiles.encode_tiles(pixels, run, cell=32, tile=256)
    assert seen[1] == (256, 256) and len(seen) == 7
    assert found.shape == whole.shape
    # a fifth; latents that are not related differ by 1.4
    assert 0 < np.linalg.norm(found - whole) < 0.25 * np.linalg.norm(whole)
