"""Decodes recorded as graphs: when, what for, and how their progress is told; a recorder stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sana_edge.config import AutoencoderConfig
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.plan.maps import decode_bytes
from sana_edge.torch_runtime import tiling
from sana_edge.torch_runtime.cuda_graph import Run
from sana_edge.torch_runtime.decode_graphs import KEPT, DecodeGraphs

# 4 pixels per latent cell
CONFIG = AutoencoderConfig(
    decoder_block_types=("ResBlock",) * 3,
    decoder_block_out_channels=(8, 8, 16),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((),) * 3,
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    encoder_block_types=("ResBlock",) * 3,
    encoder_block_out_channels=(8, 8, 16),
    encoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((),) * 3,
    latent_channels=4,
)


class Recorder:
    """Runs a function three times, as recording does, and then gives one tensor that each call writes."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fails: Exception | None = None

    def __call__(self, run: Run) -> Run:
        if self.fails is not None:
            raise self.fails
        self.recorded += 1
        result = [run() for _ in range(3)][-1].clone()

        def replay() -> Tensor:
            self.replayed += 1
            return result.copy_(run())

        return replay


@pytest.fixture
def decoder() -> Autoencoder:
    return Autoencoder(CONFIG, encoder=False).requires_grad_(False).eval()


def latents(count: int, *size: int) -> list[Tensor]:
    return [torch.randn(1, 4, *size) for _ in range(count)]


def test_the_second_of_a_size_is_recorded(decoder: Autoencoder) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(decoder, recorder)
    given = latents(3, 4, 5)
    found = [tiling.decode(decoder, latent, graphs=graphs) for latent in given]
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    for latent, pixels in zip(given, found, strict=True):
        assert torch.equal(pixels, tiling.decode(decoder, latent))


def test_tiles_of_one_size_share_a_graph(decoder: Autoencoder) -> None:
    recorder = Recorder()
    (latent,) = latents(1, 8, 16)
    graphs = DecodeGraphs(decoder, recorder)
    found = tiling.decode(decoder, latent, tile=32, stride=32, graphs=graphs)
    assert (recorder.recorded, recorder.replayed) == (1, 1)
    assert torch.equal(found, tiling.decode(decoder, latent, tile=32, stride=32))
    # faded into each other before the next is decoded
    for _ in range(2):
        found = tiling.decode(decoder, latent, tile=32, stride=16, graphs=graphs)
        assert torch.equal(found, tiling.decode(decoder, latent, tile=32, stride=16))


def test_blocks_are_told_once(decoder: Autoencoder) -> None:
    graphs = DecodeGraphs(decoder, Recorder())
    count = len(decoder.blocks())
    told: list[list[tuple[int, int]]] = []
    for latent in latents(3, 4, 4):
        told.append([])
        tiling.decode(decoder, latent, graphs=graphs, on_block=lambda *at: told[-1].append(at))
    assert told == [[(n, count) for n in range(count)], [(0, count)], [(0, count)]]
    tiles: list[tuple[int, int]] = []
    (latent,) = latents(1, 4, 8)
    tiling.decode(decoder, latent, tile=16, stride=16, graphs=graphs, on_block=lambda *at: tiles.append(at))
    assert tiles == [(0, 2 * count), (count, 2 * count)]


def test_the_last_used_are_kept(decoder: Autoencoder) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(decoder, recorder)
    for width in range(1, KEPT + 2):
        for latent in latents(2, 1, width):
            tiling.decode(decoder, latent, graphs=graphs)
    assert [graphs.recorded(latents(1, 1, width)[0]) for width in range(1, KEPT + 2)] == [False, True, True]
    graphs.release()
    assert not graphs.recorded(latents(1, 1, KEPT)[0])
    assert recorder.recorded == KEPT + 1


def test_nothing_is_recorded_where_memory_is_short(
    decoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    graphs = DecodeGraphs(decoder, recorder)
    (latent,) = latents(1, 4, 4)
    for _ in range(3):
        tiling.decode(decoder, latent, graphs=graphs, memory_limit=1 << 40)
    needed = 3 * 16 * 16 * 4 + decode_bytes(CONFIG, 4, 4, 4)
    monkeypatch.setattr(tiling, "available_memory", lambda _: 2 * needed - 1)
    for _ in range(3):
        tiling.decode(decoder, latent, graphs=graphs)
    assert recorder.recorded == 0


def test_a_graph_has_its_memory(decoder: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = DecodeGraphs(decoder, Recorder())
    (latent,) = latents(1, 4, 4)
    tiled: list[int] = []
    for free in (None, None, 1):
        monkeypatch.setattr(tiling, "available_memory", lambda _, free=free: free)
        tiling.decode(decoder, latent, graphs=graphs, on_tiled=tiled.append)
    assert not tiled


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("no")], ids=str)
def test_what_cannot_be_recorded_runs_as_it_is(decoder: Autoencoder, error: Exception) -> None:
    recorder = Recorder()
    recorder.fails = error
    graphs = DecodeGraphs(decoder, recorder)
    (latent,) = latents(1, 4, 4)
    decode: Callable[[], Tensor] = lambda: tiling.decode(decoder, latent, graphs=graphs)  # noqa: E731
    expected = decode()
    assert all(torch.equal(decode(), expected) for _ in range(3))
