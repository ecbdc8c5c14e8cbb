"""Each part of a picture's way through engines against torch's, and what they refuse."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sana_edge import Sana
from sana_edge.cli.main import main
from sana_edge.decoding import shrink
from sana_edge.engines import choose, decoder, memory, sessions
from sana_edge.engines.runtime import EngineRuntime
from sana_edge.engines.tensorrt import cache
from sana_edge.engines.text import ProjectedText, padding_mask, side_by_side
from sana_edge.errors import CheckpointError, InvalidInput, OutOfMemory, SanaError
from sana_edge.export.settings import Settings
from sana_edge.request import loading
from sana_edge.request.plan import Plan
from sana_edge.request.request import Request
from sana_edge.store import hub, manifest
from sana_edge.system import budget
from sana_edge.torch_runtime.runtime import TorchRuntime

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")

HERE = Path(__file__).parent
PROMPT = "a red house left of a yellow star"
CPU = torch.device("cpu")
# of fp32 networks in another order of the same sums, as for parity with diffusers
LIMIT = 1e-5


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(tiny_folder, tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture(scope="module")
def sprint(tiny_sprint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(tiny_sprint_folder, tmp_path_factory.mktemp("exported") / "sprint")


@pytest.fixture(scope="module")
def fixed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _exported(tiny_folder, tmp_path_factory.mktemp("exported") / "fixed", size=(96, 64))


def _exported(model: Path, folder: Path, **settings: Any) -> Path:
    onnx_export.export(str(model), folder, Settings(verify=False, **settings))
    return folder


@pytest.fixture(scope="module")
def ours(exported: Path) -> EngineRuntime:
    return EngineRuntime.load(exported, backend="onnxruntime", device="cpu")


@pytest.fixture(scope="module")
def theirs(tiny_folder: Path) -> TorchRuntime:
    return TorchRuntime.load(hub.resolve(str(tiny_folder)), device=CPU, dtype="fp32")


def planned(**options: Any) -> Plan:
    options = {"seed": 7, "steps": 3, "size": (96, 64), **options}
    return Request(PROMPT, **options).plan(128, options.get("sampler", "flow-dpm"))


def relative(value: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    assert value.shape == reference.shape and value.dtype == np.float32
    return float(np.linalg.norm(value - reference) / np.linalg.norm(reference))


CASES: dict[str, dict[str, Any]] = {
    "folded": {},
    "unguided": {"guidance": 1.0},
    "shorter negative": {"negative_prompt": "a fish"},
    "longer negative": {"negative_prompt": "blurred green fish, " * 12},
    "another instruction": {"instruction": "An oil painting of ", "negative_prompt": "a fish"},
    "no instruction": {"instruction": ""},
    "shift": {"flow_shift": 4.0},
    "strong": {"guidance": 30.0, "negative_prompt": "two cats"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_velocities_equal_torch(ours: EngineRuntime, theirs: TorchRuntime, options: dict[str, Any]) -> None:
    plan, found = planned(**options), []
    assert options.get("guidance") == 1.0 or plan.guided
    for either in (ours, theirs):
        context, notes = either.read(plan)
        sampler, tables = either.schedule(plan)
        predict, more = either.predict(plan, tables, context)
        assert (notes, more) == (plan.size_notes, ())
        x = np.random.default_rng(1).standard_normal((1, 32, 2, 3), np.float32)
        latent = x if either is ours else torch.from_numpy(x)
        found.append([np.asarray(predict(sampler.model_input(latent, i), i)) for i in range(plan.steps)])
    for step, (a, b) in enumerate(zip(*found, strict=True)):
        # of u + g (c - u) the error may be g times that of a prediction
        assert relative(a, b) <= LIMIT * max(1, plan.guidance), step
    assert relative(found[0][0], found[0][2]) > 0.01


def test_sprint_embeds_the_guidance(sprint: Path, tiny_sprint_folder: Path) -> None:
    theirs = TorchRuntime.load(hub.resolve(str(tiny_sprint_folder)), device=CPU, dtype="fp32")
    ours = EngineRuntime.load(sprint, backend="onnxruntime", device="cpu")
    results = {}
    for guidance in (1.5, 6.0):
        plan, found = planned(guidance=guidance, sampler="scm", steps=2), []
        for either in (ours, theirs):
            _, tables = either.schedule(plan)
            predict, _ = either.predict(plan, tables, either.read(plan)[0])
            x = np.random.default_rng(1).standard_normal((1, 32, 2, 3), np.float32)
            found.append(np.asarray(predict(x if either is ours else torch.from_numpy(x), 1)))
        assert relative(*found) <= LIMIT
        results[guidance] = found[0]
    assert relative(results[1.5], results[6.0]) > 0.001


def test_noise_and_schedule_equal_torch(ours: EngineRuntime, theirs: TorchRuntime) -> None:
    plan = planned(seed=2**40, images=3)
    for picture in (0, 2):
        draw, expected = ours.noise(plan, picture), theirs.noise(plan, picture)
        for _ in range(2):
            # see test_noise.py
            assert np.abs(draw() - expected().numpy()).max() <= 5e-6
    assert ours.schedule(plan)[0].coefficients == theirs.schedule(plan)[0].coefficients


def test_decoding_equals_torch(ours: EngineRuntime, theirs: TorchRuntime) -> None:
    latent = np.random.default_rng(2).standard_normal((1, 32, 3, 5), np.float32)
    picture, expected = ours.decode(latent), theirs.decode(torch.from_numpy(latent))
    assert picture.shape == (96, 160, 3) and picture.flags.c_contiguous
    assert np.abs(picture.astype(int) - expected).max() <= 1 and expected.std() > 10
    large = np.random.default_rng(3).standard_normal((1, 32, 9, 20), np.float32)
    small, expected = ours.preview(large), theirs.preview(torch.from_numpy(large))
    assert max(small.shape) <= 256
    assert np.abs(small.astype(int) - expected).max() <= 1
    # the public autoencoder's map, by its scale
    mapped = ours.preview(large, linear=True)
    assert mapped.shape == (58, 128, 3)
    assert np.array_equal(mapped, theirs.preview(torch.from_numpy(large), linear=True))


def test_larger_than_a_tile_equals_torch(
    exported: Path, theirs: TorchRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "DEFAULT_TILE", 64)
    latent = np.random.default_rng(5).standard_normal((1, 32, 3, 5), np.float32)
    expected = theirs.decode(torch.from_numpy(latent)).astype(int)
    ours = EngineRuntime.load(exported, backend="onnxruntime", device="cpu")
    assert np.abs(ours.decode(latent) - expected).max() <= 1
    # a folder of an earlier version
    folder = Path(shutil.copytree(exported, tmp_path / "old"))
    described = json.loads((folder / manifest.FILE).read_text())
    names = {part["graph"] for part in described.pop("decoder_parts")}
    described["graphs"] = {key: graph for key, graph in described["graphs"].items() if key not in names}
    for name in names:
        del described["files"][f"{name}.onnx"]
        (folder / f"{name}.onnx").unlink()
    (folder / manifest.FILE).write_text(json.dumps(described))
    old = EngineRuntime.load(folder, backend="onnxruntime", device="cpu")
    picture = old.decode(latent)
    # seams
    assert picture.shape == expected.shape and np.abs(picture - expected).max() > 1


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_shrinking_equals_torch(factor: int) -> None:
    latent = np.random.default_rng(4).standard_normal((1, 3, 7, 10), np.float32)
    expected = F.avg_pool2d(torch.from_numpy(latent), factor, ceil_mode=True).numpy()
    # a mean of at most 49 numbers, rounded once here and at each addition there
    assert np.abs(shrink(latent, factor) - expected).max() <= 49 * 2**-24


def test_texts_side_by_side() -> None:
    text = [
        ProjectedText(
            np.full((2, 1, 3, 4, length), value, np.float32),
            np.full((2, 1, 3, length, 4), value, np.float32),
            np.full((2, 1, 1, 5), value, np.float32),
        )
        for length, value in ((2, 1.0), (5, 2.0))
    ]
    both = side_by_side(*text)
    assert both.keys.shape == (2, 2, 3, 4, 5) and both.values.shape == (2, 2, 3, 5, 4)
    assert both.keys[0, 0, 0, 0].tolist() == [1, 1, 0, 0, 0] and both.keys[0, 1, 0, 0].tolist() == [2] * 5
    assert both.values[1, 0, 2, :, 3].tolist() == [1, 1, 0, 0, 0]
    assert padding_mask(2, 5)[:, 0, 0].tolist() == [[0, 0, *[float(np.float32(-1e30))] * 3], [0] * 5]


def test_only_one_denoiser_stays_and_released_engines_return(exported: Path) -> None:
    engine = EngineRuntime.load(exported, backend="onnxruntime", device="cpu")
    assert set(engine.graphs.loaded) == {"text_encoder", "text_projection", "denoiser_folded", "decoder"}
    context, _ = engine.read(planned(guidance=1.0))
    plan = planned(guidance=1.0)
    _, tables = engine.schedule(plan)
    predict, _ = engine.predict(plan, tables, context)
    assert "denoiser" in engine.graphs.loaded and "denoiser_folded" not in engine.graphs.loaded
    x = np.ones((1, 32, 2, 3), np.float32)
    before = predict(x, 0)
    engine.release()
    assert not engine.graphs.loaded
    assert np.array_equal(predict(x, 0), before) and engine.graphs.loaded == ("denoiser",)


def test_a_large_text_encoder_makes_room(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plan = EngineRuntime.load(exported, backend="onnxruntime", device="cpu"), planned()
    files = manifest.read(exported).files
    size = files["text_encoder.onnx"].bytes + files["text_encoder.data"].bytes
    for free, stays in ((None, True), (4 * size, True), (4 * size - 1, False), (None, True)):
        monkeypatch.setattr(sessions, "available_memory", lambda free=free: free)
        context, _ = engine.read(plan)
        assert ("text_encoder" in engine.graphs.loaded) == stays
        if free is None:
            expected = context
        # the next prompt gets it back
        assert np.array_equal(context.prompt.keys, expected.prompt.keys)
    # of a GPU's memory nothing is known
    monkeypatch.setattr(sessions, "available_memory", lambda: 0)
    engine.graphs.kind = dataclasses.replace(engine.graphs.kind, device="cuda")
    engine.read(plan)
    assert "text_encoder" in engine.graphs.loaded


def test_one_engine_at_a_time_where_memory_is_short(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same numbers; previews leave the denoiser where it is."""
    plan, x = planned(guidance=1.0), np.ones((1, 32, 2, 3), np.float32)

    def picture(*loaded: set[str]) -> tuple[Any, ...]:
        engine, found, seen = EngineRuntime.load(exported, backend="onnxruntime", device="cpu"), [], []
        for _ in range(2):
            context, _ = engine.read(plan)
            seen.append(set(engine.graphs.loaded))
            _, tables = engine.schedule(plan)
            predict, _ = engine.predict(plan, tables, context)
            for _ in range(2):
                found += [predict(x, 0), engine.preview(x)]
                seen.append(set(engine.graphs.loaded))
                found.append(engine.decode(x))
                seen.append(set(engine.graphs.loaded))
        if loaded:
            assert [graphs & {"text_encoder", "denoiser", "decoder"} for graphs in seen] == [*loaded] * 2
        return tuple(found)

    monkeypatch.setattr(sessions, "available_memory", lambda: None)
    plenty = picture()
    monkeypatch.setattr(sessions, "available_memory", lambda: 1)
    # the preview's decoder goes when the text encoder or the denoiser is loaded
    steps = [{"denoiser", "decoder"}, {"decoder"}] * 2
    short = picture(set(), *steps)
    assert all(np.array_equal(*pair) for pair in zip(plenty, short, strict=True))


def test_little_is_loaded_where_memory_is_short(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [EngineRuntime.load(exported, backend="onnxruntime", device="cpu").graphs.bytes_of(name)
             for name in ("text_encoder", "denoiser", "decoder")]  # fmt: skip
    enough = sum(sizes) + 4 * max(sizes)
    for free, loaded in ((enough, 4), (enough - 1, 1)):
        monkeypatch.setattr(sessions, "available_memory", lambda free=free: free)
        engine = EngineRuntime.load(exported, backend="onnxruntime", device="cpu")
        assert len(engine.graphs.loaded) == loaded
    # both texts are read before the first is projected
    monkeypatch.setattr(sessions, "available_memory", lambda: 1)
    engine.read(planned())
    assert engine.graphs.loaded == ("text_projection",)


def test_openvino_leaves_an_embedding_table_in_its_file(exported: Path) -> None:
    found = {
        name: EngineRuntime.load(exported, backend=name, device="cpu").graphs
        for name in ("onnxruntime", "openvino")
    }
    table = found["openvino"].described.text_table_bytes
    assert table > 0
    onnxruntime, openvino = (graphs.bytes_of("text_encoder") for graphs in found.values())
    assert onnxruntime - openvino == table
    assert len({graphs.bytes_of("denoiser") for graphs in found.values()}) == 1


def test_a_budget(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the process: what it leaves is what is free."""
    monkeypatch.setattr(budget, "used_memory", lambda device=None: 900_000_000)
    with pytest.raises(OutOfMemory, match=r"alone, 0\.0 MB of 0\.9 GB are left") as caught:
        EngineRuntime.load(exported, backend="onnxruntime", device="cpu", memory=900_000_000)
    assert "--memory 900MB` says what would fit" in caught.value.hint
    engine = EngineRuntime.load(exported, backend="onnxruntime", device="cpu", memory=940_000_000)
    free = engine.graphs.free(1 << 40)
    assert free == 40_000_000
    engine.check_plan(planned(size=(64, 64)))
    with pytest.raises(OutOfMemory, match=r"2048x2048 needs more than .* GB, 0\.0 GB are free"):
        engine.check_plan(planned(size=(2048, 2048)))


def test_a_folder_for_one_size(fixed: Path) -> None:
    engine = EngineRuntime.load(fixed, backend="onnxruntime", device="cpu")
    assert engine.native_size == (96, 64)
    engine.check_plan(planned(size=(96, 64)))
    with pytest.raises(InvalidInput, match="exported for 96x64 alone, not for 64x96") as caught:
        engine.check_plan(planned(size=(64, 96)))
    command = "`sana-edge export MODEL --size 64x96 --output DIR`"
    assert caught.value.hint == f"choose size 96x64, or export again: {command}; without --size for any"
    latent = np.random.default_rng(6).standard_normal((1, 32, 2, 3), np.float32)
    # the decoder knows no smaller latent
    assert engine.preview(latent).shape == (64, 96, 3)


def test_what_the_files_of_a_graph_take(ours: EngineRuntime, exported: Path) -> None:
    """Of those that read the weights of another graph their own file alone."""

    def size(*names: str) -> int:
        return sum((exported / name).stat().st_size for name in names)

    for name in ("text_encoder", "denoiser", "decoder"):
        assert ours.graphs.bytes_of(name) == size(f"{name}.onnx", f"{name}.data")
    for name in ("text_projection", "denoiser_folded", "decoder_head", "decoder_tail_0"):
        assert ours.graphs.bytes_of(name) == size(f"{name}.onnx")


@pytest.fixture
def built(exported: Path, trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported folder with engines in the user's cache, for 128x128 to 512x512."""
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    assert main(["build", str(exported), "--quiet", "--max", "512x512"]) == 0
    return exported


@pytest.fixture
def uncollected() -> Iterator[None]:
    """What refers to itself stays."""
    gc.disable()
    yield
    gc.enable()


def assert_nothing_is_left(cuda: Any) -> None:
    state = cuda.state
    assert (state.memory, state.streams, state.graphs) == ({}, set(), {})


def test_closing_during_a_stream_gives_the_gpus_memory_back_at_its_end(built: Path, cuda: Any) -> None:
    sana = Sana.load(str(built), backend="tensorrt")
    with closing(sana.stream(PROMPT, seed=7, steps=3)) as steps:
        next(steps)
        sana.close()
        assert cuda.state.memory and cuda.state.streams
        last = [*steps][-1]
    assert last.image is not None and cuda.state.launches > 0
    assert_nothing_is_left(cuda)
    # the step is still here, and its preview loads a decoder
    assert last.preview().shape == (128, 128, 3) and cuda.state.memory
    del last, steps
    assert_nothing_is_left(cuda)


def test_what_nobody_closes_goes_with_the_last_reference(built: Path, cuda: Any, uncollected: None) -> None:
    sana = Sana.load(str(built), backend="tensorrt")
    sana.generate(PROMPT, seed=7, steps=3)
    sana.generate(PROMPT, seed=7, steps=3, negative_prompt="blurred")
    assert cuda.state.memory and cuda.state.streams and cuda.state.graphs
    del sana
    assert_nothing_is_left(cuda)


def test_engines_of_a_load_that_failed_are_freed(built: Path, cuda: Any) -> None:
    entries = cache.entries(cache.engine_folder())
    path = next(entry.path for entry in entries if entry.key.graph == "decoder")
    # of its own size, so that only loading tells
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    with pytest.raises(SanaError, match="is damaged") as caught:
        EngineRuntime.load(built, backend="tensorrt")
    assert caught.traceback
    assert_nothing_is_left(cuda)


def test_a_size_that_engines_were_not_built_for_costs_nothing(built: Path, trt: Any) -> None:
    refused = pytest.raises(InvalidInput, match=r"size 640x128 is outside of .*, 128x128 to 512x512")
    with Sana.load(str(built), backend="tensorrt") as sana:
        engine = sana._runtime
        assert isinstance(engine, EngineRuntime)
        with refused:
            sana.stream(PROMPT, size=(640, 128))
        # as behind an error
        engine.release()
        with refused:
            sana.stream(PROMPT, size=(640, 128), negative_prompt="blurred")
        assert trt.state.executions == 0 and engine.graphs.loaded == ()
        sana.stream(PROMPT, size=(512, 512)).close()


def test_a_picture_that_cannot_fit(ours: EngineRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 100_000_000)
    with pytest.raises(OutOfMemory, match=r"8192x8192 needs more than .* GB, 0.1 GB are free"):
        ours.check_plan(planned(size=(8192, 8192)))
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    ours.check_plan(planned(size=(8192, 8192)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(
    ours: EngineRuntime, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent = np.zeros((1, 32, 1, 1), np.float32)
    latent[0, 3] = value
    with pytest.raises(SanaError, match="the latent has values that are not finite") as caught:
        ours.decode(latent)
    assert "lower guidance" in caught.value.hint
    monkeypatch.setattr(ours._decoder, "decode", lambda *_, **__: np.full((1, 3, 32, 32), value, np.float32))
    with pytest.raises(SanaError, match="the decoded picture has values that are not finite"):
        ours.decode(np.zeros((1, 32, 1, 1), np.float32))


def test_int8_of_a_float_folder(exported: Path) -> None:
    with pytest.raises(InvalidInput, match="is an exported float model") as caught:
        EngineRuntime.load(exported, int8=True)
    assert "--int8 --output DIR` makes an INT8 one" in caught.value.hint


@pytest.mark.parametrize("file", ["denoiser.onnx", "decoder.data", manifest.INSTRUCTION, manifest.TOKENIZER])
def test_files_that_do_not_match_the_manifest(exported: Path, tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "changed"))
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError, match="has checksum") as caught:
        EngineRuntime.load(folder, backend="onnxruntime")
    assert "sana-edge export" in caught.value.hint
    (folder / file).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, .* says"):
        EngineRuntime.load(folder, backend="onnxruntime")


def test_what_can_be_asked_for_is_what_engines_know() -> None:
    assert set(loading.BACKENDS) == {*loading.TORCH_BACKENDS, *choose.NAMES}
    assert set(loading.DEVICES) == set(choose.DEVICES)
