"""Building TensorRT engines without TensorRT: against a stand-in that is made of the real bindings' names.

What TensorRT itself does is not tested anywhere; see `fake_tensorrt.py` for what these tests can see.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_export
import fake_tensorrt
import pytest
import tensorrt_table

from sana_edge.cli import main as cli
from sana_edge.cli.main import main
from sana_edge.config import SamplerConfig
from sana_edge.engines.tensorrt import backend
from sana_edge.engines.tensorrt import cache as engine_cache
from sana_edge.engines.tensorrt import cuda as cuda_memory
from sana_edge.engines.tensorrt.engine import logger_class
from sana_edge.engines.tensorrt.profiles import Sizes, choose_sizes, graph_profiles
from sana_edge.errors import InvalidInput, MissingDependency, SanaError, UnsupportedDevice
from sana_edge.export import build, tensorrt
from sana_edge.store.manifest import GRAPHS, Source

INPUTS = fake_export.INPUTS
WHEELS = "SANA_EDGE_TENSORRT_WHEELS"


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(params=fake_tensorrt.TABLES["tensorrt"], ids=lambda table: table["version"])
def table(request: pytest.FixtureRequest) -> Any:
    """Each version of the bindings."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported folder."""
    return Path(fake_export.write_folder(tmp_path / "onnx"))


def test_a_build_asks_the_real_api_for_a_strongly_typed_network(
    folder: Path, cache: Path, trt: Any, cuda: Any
) -> None:
    entries = fake_export.built(folder, cache, trt, cuda, workspace=1.5)
    assert [entry.key.graph for entry in entries] == list(GRAPHS)
    # the flag has another number in TensorRT 11
    assert set(trt.state.created) == {1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)}
    assert trt.state.pool == {"WORKSPACE": 3 << 29}
    assert trt.state.cleared == {"REFIT"}
    # of the last graph, the decoder: both up to a tile, tuned for different sizes
    assert [profile["latent"] for profile in trt.state.profiles] == [
        *([(1, 4, 1, 1), (2, 4, 8, 8), (2, 4, 32, 32)], [(1, 4, 1, 1), (2, 4, 32, 32), (2, 4, 32, 32)])
    ]
    assert trt.state.built == len(GRAPHS)
    names = sorted(path.name for path in cache.iterdir())
    endings = sorted(name.rpartition(".")[2] for name in names)
    assert endings == [*5 * ["engine"], *5 * ["json"], "timing"]
    fake_export.built(folder, cache, trt, cuda, workspace=1.5)
    assert trt.state.built == len(GRAPHS)
    # other options are another engine
    fake_export.built(folder, cache, trt, cuda, workspace=2)
    assert trt.state.built == 2 * len(GRAPHS)
    assert len(list(cache.iterdir())) == len(names)


def test_models_without_guidance_have_no_folded_engine(folder: Path) -> None:
    exported = fake_export.write_manifest(folder, sampler=SamplerConfig(kind="scm"))
    assert "denoiser_folded" not in exported.used_graphs
    # their own files, and the weights that they share
    for graph in ("denoiser", "denoiser_folded", "text_projection"):
        assert build.needed_bytes(exported, graph) > 1300
    assert build.needed_bytes(exported, "decoder") < 1000


def test_timings_are_kept_and_damaged_ones_replaced(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    cache.mkdir()
    here = cuda_memory.machine(cuda, trt.__version__)
    timing = cache / build.timing_name(here)
    timing.write_bytes(b"damaged")
    fake_export.built(folder, cache, trt, cuda)
    assert trt.state.timings == [b"", b"+", b"++", b"+++", b"++++"]
    assert timing.read_bytes() == b"+++++"


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("build", "could not build text_encoder.onnx: Error Code 10: no implementation$"),
        ("profile", "refuses"),
    ],
)
def test_a_failed_build_leaves_nothing_and_the_old_engines_stay(
    folder: Path, cache: Path, trt: Any, cuda: Any, fails: str, message: str
) -> None:
    entries = fake_export.built(folder, cache, trt, cuda)
    trt.state.fails.add(fails)
    with pytest.raises(SanaError, match=message):
        fake_export.built(folder, cache, trt, cuda, force=True)
    assert len(list(cache.iterdir())) == 2 * len(GRAPHS) + 1
    for entry in entries:
        assert engine_cache.is_whole(entry)
    shutil.rmtree(cache)
    with pytest.raises(SanaError, match=message):
        fake_export.built(folder, cache, trt, cuda)
    assert list(cache.iterdir()) == []


def test_a_disk_without_space_is_refused_before_the_build(
    folder: Path, cache: Path, trt: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**10, 10**10, 100))
    with pytest.raises(
        SanaError, match=r"has 0.0 GB free, an engine of this graph may need 0.0 GB"
    ) as refused:
        fake_export.built(folder, cache, trt, cuda)
    assert "--output" in refused.value.hint and trt.state.built == 0


def test_a_damaged_onnx_file_names_the_node(folder: Path, cache: Path, trt: Any, cuda: Any) -> None:
    (folder / "decoder.onnx").write_text("[")
    fake_export.write_manifest(folder)
    with pytest.raises(SanaError, match=r"cannot read .*decoder.onnx: /blocks.0/MatMul: unsupported"):
        fake_export.built(folder, cache, trt, cuda)
    fake_export.write_graph(folder / "decoder.onnx", "pixels", "scale")
    fake_export.write_manifest(folder)
    with pytest.raises(SanaError, match="has the inputs pixels, scale, its manifest says latent, scale"):
        fake_export.built(folder, cache, trt, cuda)


@pytest.mark.alone
def test_ctrl_c_ends_the_build_at_the_next_step_and_leaves_nothing(
    folder: Path, cache: Path, trt: Any, cuda: Any
) -> None:
    steps, ended = [], []

    def on_step(number: int) -> None:
        steps.append(number)
        # TensorRT calls from its own threads, which never see the signal
        assert threading.current_thread() is not threading.main_thread()
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3 if number >= 2 else 0)
        ended.append(number)

    trt.state.on_step, trt.state.steps = on_step, 40
    with pytest.raises(KeyboardInterrupt):
        fake_export.built(folder, cache, trt, cuda)
    # it has ended, and not only been left alone
    assert steps[:3] == [0, 1, 2] and ended == steps and len(steps) < 10
    assert list(cache.iterdir()) == []


def test_progress_is_reported(folder: Path, tmp_path: Path, trt: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    profiles = graph_profiles("denoiser", INPUTS, choose_sizes(256, None, None, None), 32, 9)
    tensorrt.build(
        *(trt, folder / "denoiser.onnx", profiles),
        workspace=None,
        timing=tmp_path / "timing",
        progress=lambda *given: seen.append(given),
    )
    assert seen == [("Building", done, 5) for done in range(6)]


def test_precisions_are_those_of_the_export(folder: Path) -> None:
    exported = fake_export.write_manifest(folder, dtype="bf16")
    tensorrt.check_precision(exported, "bf16", (8, 0))
    with pytest.raises(InvalidInput, match="--fp16: the exported graphs compute in bf16") as refused:
        tensorrt.check_precision(exported, "fp16", (8, 9))
    assert refused.value.hint == "`sana-edge export sana-tiny --dtype fp16 --output DIR`"
    with pytest.raises(InvalidInput, match="--int8: the exported graphs are not INT8") as refused:
        tensorrt.check_precision(exported, "int8", (8, 9))
    assert refused.value.hint == "`sana-edge export sana-tiny --dtype bf16 --int8 --output DIR`"
    # of a folder only its name is known
    mine = fake_export.write_manifest(folder, dtype="bf16", source=Source("my-model", {}), size=(512, 256))
    with pytest.raises(UnsupportedDevice) as unable:
        tensorrt.check_precision(mine, None, (7, 5))
    assert unable.value.hint == "`sana-edge export MODEL --dtype fp16 --size 512x256 --output DIR`"
    tensorrt.check_precision(fake_export.write_manifest(folder, quantization="w8a8"), "int8", (8, 9))
    with pytest.raises(
        UnsupportedDevice, match=r"bf16, which needs compute capability 8.0, this GPU has 7.5"
    ):
        tensorrt.check_precision(exported, None, (7, 5))
    with pytest.raises(UnsupportedDevice, match=r"Turing.* has 6\.1") as unable:
        tensorrt.check_precision(exported, None, (6, 1))
    name, *command = shlex.split(unable.value.hint.split("`")[1])
    # a command that there is, with options that it has
    chosen = cli._parser().parse_args(command)
    assert name == "sana-edge" and (chosen.model, chosen.device) == ("DIR", "cpu")
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(InvalidInput, match="workspace is"):
            tensorrt.check_workspace(wrong)


def test_fixed_exports_have_one_size(folder: Path) -> None:
    exported = fake_export.write_manifest(folder, size=(512, 256))
    assert build.picture_sizes(exported, None, None, None) == (Sizes(*3 * [(512, 256)]),)
    with pytest.raises(InvalidInput, match="know only the size 512x256") as refused:
        build.picture_sizes(exported, None, None, (1024, 1024))
    command = "sana-edge export sana-tiny --dtype fp16 --size dynamic --output DIR"
    assert refused.value.hint == f"for others: `{command}`"


def test_old_versions_are_refused(trt: Any) -> None:
    # 10.0 to 10.5 do not know the opset of bf16 graphs
    for dtype in ("fp32", "fp16", "bf16"):
        if dtype != "bf16" or trt.__version__ != "10.0.1":
            assert backend.check_version(trt, dtype) == trt.__version__
        with pytest.raises(UnsupportedDevice, match=rf"TensorRT 8.6.1 is too old, {dtype} graphs need 10\."):
            backend.check_version(SimpleNamespace(__version__="8.6.1"), dtype)
    between = SimpleNamespace(__version__="10.5.0")
    assert [backend.check_version(between, dtype) for dtype in ("fp32", "fp16")] == 2 * ["10.5.0"]
    with pytest.raises(UnsupportedDevice, match=r"10.5.0 is too old, bf16 graphs need 10\.6"):
        backend.check_version(between, "bf16")


def test_the_command_builds_and_prints_paths(
    folder: Path, tmp_path: Path, trt: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "engines"
    assert main(["build", str(folder), "--output", str(output), "--max", "512x512", "--fp16"]) == 0
    printed = capsys.readouterr()
    paths = printed.out.splitlines()
    assert len(paths) == len(GRAPHS) and all(Path(path).is_file() for path in paths)
    assert "decoder: built" in printed.err and "--trust-engine" in printed.err
    assert main(["build", str(folder), "--quiet"]) == 0
    assert str(engine_cache.engine_folder()) in (quiet := capsys.readouterr()).out and not quiet.err
    assert main(["build", str(folder), "--int8"]) == 1
    assert "not INT8" in capsys.readouterr().err
    fake_export.write_graph(folder / "decoder.onnx", "latent", "scalE")
    assert main(["build", str(folder)]) == 1
    assert "decoder.onnx has checksum" in capsys.readouterr().err


@pytest.mark.parametrize("options", ["", "--max 512x512 --workspace 1.5", "--min 256x512 --opt 512x512"])
def test_the_command_to_rebuild_makes_the_same_engines(
    folder: Path, tmp_path: Path, trt: Any, options: str
) -> None:
    output = tmp_path / "engines"
    assert main(["build", str(folder), "--output", str(output), "--quiet", *options.split()]) == 0
    entries = engine_cache.entries(output)
    for entry in entries:
        assert main([*shlex.split(entry.rebuild())[1:], "--quiet"]) == 0
    # they are there already
    assert trt.state.built == len(entries) == len(GRAPHS)
    assert engine_cache.entries(output) == entries
    assert main([*shlex.split(entries[0].rebuild(force=True))[1:], "--quiet"]) == 0
    assert trt.state.built == 2 * len(GRAPHS)
    assert engine_cache.entries(output) == entries


def test_without_the_packages_a_hint_names_the_extra(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("tensorrt"):
        pytest.skip("tensorrt is installed here")
    assert main(["build", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "tensorrt" in error and "pip install 'sana-edge[tensorrt]'" in error
    with pytest.raises(MissingDependency):
        cuda_memory.load("tensorrt")


def test_engines_need_no_torch() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'diffusers']));"
    modules = "sana_edge.engines.tensorrt.backend, sana_edge.export.build, sana_edge.cli.build"
    subprocess.run([sys.executable, "-c", f"{blocked} import {modules}"], check=True)


def test_the_table_is_that_of_the_packages() -> None:
    wheels = sorted(Path(os.environ.get(WHEELS, "/nowhere")).glob("tensorrt_cu1*_bindings-*.whl"))
    known = {table["version"]: table for table in fake_tensorrt.TABLES["tensorrt"]}
    for table in map(tensorrt_table.table, wheels):
        assert table == known.get(table["version"], table)
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    assert tensorrt_table.cuda_table() == fake_tensorrt.TABLES["cuda"]


def test_the_stand_in_refuses_what_the_real_module_would(trt: Any, cuda: Any) -> None:
    builder = trt.Builder(logger_class(trt)())
    for wrong in (
        lambda: builder.create_network("1"),
        lambda: builder.create_network(1, 2),
        lambda: builder.build_cuda_engine(),
        lambda: trt.BuilderFlag.STRONGLY_TYPED,
        lambda: trt.Builder("log"),
        lambda: setattr(builder.create_builder_config(), "max_workspace_size", 1),
        lambda: cuda.cudaMalloc(1, 2),
        lambda: cuda.cudaMallocAsync(1),
    ):
        with pytest.raises((TypeError, AttributeError)):
            wrong()
