"""Pictures larger than a tile: strips against the whole in real engines, and what is in memory meanwhile."""

# ruff: noqa: E402 (what is not installed skips the file before it is imported)

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

for module in ("onnx", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed")

from numpy.typing import NDArray

from sana_edge.config import AutoencoderConfig
from sana_edge.engines import decoder as engine_decoder
from sana_edge.engines import strips as engine_strips
from sana_edge.engines.choose import choose
from sana_edge.engines.decoder import EngineDecoder, strip_bytes
from sana_edge.engines.engine import Settings
from sana_edge.engines.sessions import Graphs
from sana_edge.engines.tensorrt.backend import TensorRT
from sana_edge.errors import InvalidInput, OutOfMemory
from sana_edge.export.graph.builder import GraphBuilder
from sana_edge.export.graph.decoder import add_decoder
from sana_edge.export.graph.decoder_parts import add_decoder_part, decoder_parts
from sana_edge.export.graph.external_data import ExternalData
from sana_edge.export.graph.ports import ports
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.store import hub
from sana_edge.store.manifest import DecoderPart, StoredFile
from sana_edge.torch_runtime.load import load_decoder

Floats = NDArray[np.float32]
# two tiles wide, and more than one strip of every tail
TILE, SIZE = 128, (7, 6)
PARTS = ("decoder_head", *(f"decoder_tail_{n}" for n in range(4)))


def exported(model: str, folder: Path) -> tuple[Path, Any]:
    """The decoder of a bundled model as graphs, and what a manifest says of them."""
    decoder = load_decoder(hub.resolve(model), device=torch.device("cpu"), dtype=torch.float32)
    parts = decoder_parts(decoder)
    with ExternalData(folder / "decoder.data") as data:
        graph = GraphBuilder("decoder", data)
        add_decoder(graph, decoder)
        graph.save(folder / "decoder.onnx")
        for part in parts:
            graph = GraphBuilder(part.name, data)
            add_decoder_part(graph, decoder, part)
            graph.save(folder / f"{part.name}.onnx")
    return folder, SimpleNamespace(
        graphs={name: ports(folder / f"{name}.onnx") for name in ("decoder", *PARTS)},
        files={path.name: StoredFile("", path.stat().st_size) for path in folder.iterdir()},
        cell=32,
        decoder_parts=tuple(DecoderPart(part.name, part.halo, part.scale, part.values) for part in parts),
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    return {name: exported(name, tmp_path_factory.mktemp(name)) for name in ("sana-tiny", "sana-tiny-int8")}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_decoder, "DEFAULT_TILE", TILE)
    monkeypatch.setattr(engine_decoder, "strip_bytes", lambda free: 0)
    monkeypatch.setattr(engine_strips, "_MIN_ROWS_PER_HALO", 2)


def graphs(model: tuple[Path, Any], engine: str, precision: str = "fp32", **changed: Any) -> Graphs:
    folder, described = model
    kind = choose(engine, "cpu", None, Settings(threads=1, precision=precision))
    return Graphs(folder, SimpleNamespace(**{**vars(described), **changed}), kind)  # type: ignore[arg-type]


def latents() -> Floats:
    return np.random.default_rng(0).standard_normal((1, 32, *SIZE), np.float32)


def error(found: Floats, expected: Floats) -> tuple[float, float]:
    """In L2, and the largest; both relative."""
    assert found.shape == expected.shape == (1, 3, 32 * SIZE[0], 32 * SIZE[1])
    assert found.dtype == np.float32 and np.isfinite(found).all()
    difference = np.abs(found - expected)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected)), float(
        difference.max() / np.abs(expected).max()
    )


def whole(made: Graphs, latent: Floats) -> Floats:
    return made.run("decoder", latent=latent)["pixels"]


CASES = {
    "onnxruntime": ("onnxruntime", "sana-tiny", "fp32"),
    "onnxruntime int8": ("onnxruntime", "sana-tiny-int8", "fp32"),
    "openvino": ("openvino", "sana-tiny", "fp32"),
    "openvino bf16": ("openvino", "sana-tiny", "bf16"),
    "openvino int8": ("openvino", "sana-tiny-int8", "fp32"),
    "openvino int8 bf16": ("openvino", "sana-tiny-int8", "bf16"),
}


@pytest.mark.parametrize(("engine", "model", "precision"), CASES.values(), ids=CASES)
def test_strips_have_no_seams(
    models: dict[str, tuple[Path, Any]], engine: str, model: str, precision: str
) -> None:
    pytest.importorskip(engine, reason=f"{engine} is not installed")
    try:
        latent, made = latents(), graphs(models[model], engine, precision)
    except InvalidInput as refused:
        # older CPUs have no bf16
        pytest.skip(str(refused))
    expected = whole(made, latent)
    calls = counted(made)
    strips = error(EngineDecoder(made).decode(latent), expected)
    assert calls["decoder_head"] == 1 and "decoder" not in calls
    assert min(calls[name] for name in PARTS[2:]) > 1
    tiles = graphs(models[model], engine, precision, decoder_parts=())
    seams = error(EngineDecoder(tiles).decode(latent), expected)
    if precision == "fp32":
        # The same sums, which an engine may split elsewhere for another height: a hundred roundings of 2^-24,
        # five times that for the largest of 10^5 values. In INT8 all between two sums is rounded alike.
        assert strips[0] <= 1e-5 and strips[1] <= 5e-5
    else:
        # What goes from graph to graph is rounded to bf16 there, and maybe not within one graph, and kernels
        # for another height may round elsewhere: both pictures are as far from the exact one as rounding
        # takes them, and at most twice that from each other.
        rounded = error(expected, whole(graphs(models[model], engine), latent))
        assert strips[0] <= 2 * rounded[0] and strips[1] <= 2 * rounded[1]
    # attention over a tile is not that over the picture
    assert seams[0] > 4 * strips[0] and seams[1] > 2 * strips[1]


def counted(made: Graphs) -> dict[str, int]:
    """How often each graph runs from now on."""
    calls: dict[str, int] = {}
    run = made.run

    def counting(name: str, **inputs: Any) -> dict[str, Floats]:
        calls[name] = calls.get(name, 0) + 1
        return run(name, **inputs)

    made.run = counting  # type: ignore[method-assign]
    return calls


def test_a_picture_of_a_tile_is_decoded_at_once(models: dict[str, tuple[Path, Any]]) -> None:
    made = graphs(models["sana-tiny"], "onnxruntime")
    calls, latent = counted(made), latents()[..., :4, :4]
    assert np.array_equal(EngineDecoder(made).decode(latent), whole(made, latent))
    assert set(calls) == {"decoder"}


@pytest.mark.parametrize("loaded", [True, False])
def test_a_picture_of_a_tile_in_strips_where_it_does_not_fit(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    made = graphs(models["sana-tiny"], "onnxruntime")
    latent, folder = latents()[..., :4, :4], models["sana-tiny"][0]
    calls, expected = counted(made), whole(made, latent)
    weights = sum((folder / name).stat().st_size for name in ("decoder.onnx", "decoder.data"))
    # see test_tiles_where_the_head_does_not_fit
    needed = 4 * -(-64 * 672 // 32**2) * TILE**2
    for missing in (0, 1):
        made.close()
        if loaded:
            made.load("decoder")
        calls.clear()
        memory = weights + needed - missing
        monkeypatch.setattr(
            engine_decoder,
            "available_memory",
            lambda memory=memory: memory - weights * ("decoder" in made.loaded),
        )
        found = EngineDecoder(made).decode(latent)
        assert set(calls) == (set(PARTS) if missing else {"decoder"})
        # the same sums, see test_strips_have_no_seams
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)
    assert made.loaded == ()


def test_engines_of_one_way_are_in_memory(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphs(models["sana-tiny"], "onnxruntime")
    decoder, together = EngineDecoder(made), set()
    decoder.load(TILE, TILE)
    assert made.loaded == ("decoder",)
    run = made.run

    def watched(name: str, **inputs: Any) -> dict[str, Floats]:
        found = run(name, **inputs)
        together.update(made.loaded)
        # the head has made room for the strips
        assert name == "decoder_head" or "decoder_head" not in made.loaded
        return found

    monkeypatch.setattr(made, "run", watched)
    decoder.decode(latents())
    assert together == set(PARTS) and made.loaded == ()
    made.close()
    # nothing stays of it for a model of larger pictures
    decoder.load(2 * TILE, TILE)
    assert made.loaded == ()


def test_engines_of_strips_go_where_one_fails(models: dict[str, tuple[Path, Any]]) -> None:
    made = graphs(models["sana-tiny"], "onnxruntime")
    run = made.run

    def failing(name: str, **inputs: Any) -> dict[str, Floats]:
        if name == "decoder_tail_2":
            raise OutOfMemory("no memory")
        return run(name, **inputs)

    made.run = failing  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory):
        EngineDecoder(made).decode(latents())
    assert made.loaded == ()


def free(monkeypatch: pytest.MonkeyPatch, found: int | None) -> None:
    monkeypatch.setattr(engine_decoder, "available_memory", lambda: found)


def test_tiles_where_the_head_does_not_fit(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = graphs(models["sana-tiny"], "onnxruntime")
    calls, cells = counted(made), SIZE[0] * SIZE[1]
    folder, _ = models["sana-tiny"]
    weights = sum((folder / name).stat().st_size for name in ("decoder.onnx", "decoder.data"))
    fixed = weights + 3 * 4 * 32**2 * cells
    # 4352 values for each cell, see `decoder_parts`
    free(monkeypatch, 4 * 4352 * cells + fixed)
    EngineDecoder(made).decode(latents())
    assert set(calls) == set(PARTS)
    calls.clear()
    free(monkeypatch, 4 * 4352 * cells + fixed - 1)
    # a pixel at the peak: 2304 values for each cell of the first tail, four times 2176 of the second, ...
    seen: list[int] = []
    choose_tile = engine_decoder.choose_tile

    def noted(*size: int, pixel_bytes: int, **options: Any) -> int | None:
        seen.append(pixel_bytes)
        return choose_tile(*size, pixel_bytes=pixel_bytes, **options)

    monkeypatch.setattr(engine_decoder, "choose_tile", noted)
    # as if pictures were of many tiles
    monkeypatch.setattr("sana_edge.engines.tiles.DEFAULT_TILE", 64)
    EngineDecoder(made).decode(latents())
    assert set(calls) == {"decoder"} and calls["decoder"] > 1
    peak = max(4352, 2304, 4 * 2176, 16 * 1152, 64 * 672)
    assert seen == [4 * -(-peak // 32**2)]
    free(monkeypatch, fixed)
    with pytest.raises(OutOfMemory, match="decoding 192x224 pixels does not fit") as caught:
        EngineDecoder(made).decode(latents())
    assert "smaller size" in caught.value.hint


def test_where_strips_cannot_be(models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    old = graphs(models["sana-tiny"], "onnxruntime", decoder_parts=())
    calls, expected = counted(old), EngineDecoder(old).decode(latents())
    assert set(calls) == {"decoder"} and calls["decoder"] > 1
    other = graphs(models["sana-tiny"], "onnxruntime")
    kind = other.kind
    # it has engines of the usual graphs alone
    other.kind = TensorRT("cuda", "fp32", "", Settings())
    decoder = EngineDecoder(other)
    other.kind = kind
    decoder.load(2 * TILE, TILE)
    assert other.loaded == ("decoder",)
    assert np.array_equal(decoder.decode(latents()), expected)


def test_memory_for_strips() -> None:
    # the fixture has replaced the name in the module, not this one
    assert strip_bytes(None) == 1 << 30
    assert [strip_bytes(gigabytes << 30) for gigabytes in (0, 4, 6, 100)] == [
        256 << 20,
        1 << 30,
        3 << 29,
        2 << 30,
    ]


@pytest.mark.parametrize(
    ("side", "gigabytes", "least", "most"),
    [(2048, 2, 1.09, 1.16), (4096, 2, 1.25, 1.37), (2048, 1, 1.22, 1.37), (4096, 1, 1.49, 1.5)],
)
def test_what_strips_of_the_public_decoder_compute_again(
    side: int, gigabytes: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures beside `engine_decoder._MOST_BYTES`."""
    monkeypatch.undo()
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    with torch.device("meta"):
        config = AutoencoderConfig(encoder_block_types=blocks, decoder_block_types=blocks)
        head, *others = decoder_parts(Autoencoder(config, encoder=False))
    assert head.scale == 4 and np.prod([part.scale for part in others]) == 8
    counts: dict[str, int] = {}

    def run(x: Floats, part: Any) -> Floats:
        counts[part.name] = counts.get(part.name, 0) + x.shape[2]
        sides = x.shape[2] * part.scale, x.shape[3] * part.scale
        # as wide and high, of one value
        return np.broadcast_to(np.float32(0), (1, 1, *sides))

    tails = [
        engine_strips.Tail(partial(run, part=part), part.halo or 0, part.scale, part.values)
        for part in others
    ]
    cells = side // 32
    engine_strips.decode_strips(
        np.zeros((1, 1, cells, cells), np.float32),
        partial(run, part=head),
        tails,
        strip_bytes=gigabytes << 30,
    )
    heights = [cells * 4, cells * 8, cells * 16]
    found = [counts[part.name] / height for part, height in zip(others, heights, strict=True)]
    assert (round(min(found), 2), round(max(found), 2)) == (least, most)


def test_tiles_that_are_asked_for(models: dict[str, tuple[Path, Any]]) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    made, sides = graphs(models["sana-tiny"], "onnxruntime"), []
    expected, decoder, calls = whole(made, latents()), EngineDecoder(made), counted(made)
    tiled = decoder.decode(latents(), tile=160, on_tiled=sides.append)
    assert sides == [160] and set(calls) == {"decoder"} and calls["decoder"] == 4
    assert not np.array_equal(tiled, expected)
    # a tile that is no smaller than the picture, and none: the sums of strips are those of the whole
    for tile in (32 * max(SIZE), 0):
        found = decoder.decode(latents(), tile=tile, on_tiled=sides.append)
        assert error(found, expected)[0] < 100 * 2**-24
    old = EngineDecoder(graphs(models["sana-tiny"], "onnxruntime", decoder_parts=()))
    assert np.array_equal(old.decode(latents(), tile=0, on_tiled=sides.append), expected)
    assert sides == [160]
    old.decode(latents(), on_tiled=sides.append)
    assert sides == [160, TILE]


def test_no_tiles_where_memory_is_short(
    models: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    free(monkeypatch, 1 << 20)
    with pytest.raises(OutOfMemory, match="without tiles needs about") as caught:
        EngineDecoder(graphs(models["sana-tiny"], "onnxruntime")).decode(latents(), tile=0)
    assert caught.value.needed > caught.value.free
