from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store import hub, manifest
from sana_edge.store.hub import ResolvedModel

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import numpy_helper  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from sana_edge.export.onnx import export  # noqa: E402
from sana_edge.export.settings import Settings  # noqa: E402
from sana_edge.export.verify import compare as comparing  # noqa: E402
from sana_edge.export.verify.agreement import Agreement  # noqa: E402
from sana_edge.export.verify.compare import compare  # noqa: E402
from sana_edge.export.verify.runner import GraphRunner  # noqa: E402

TAILS = tuple(f"decoder_tail_{n}" for n in range(4))
GRAPHS = (*manifest.GRAPHS, "decoder_head", *TAILS)


def exported(model: str, folder: Path, **settings: Any) -> Path:
    export(model, folder, Settings(verify=False, **settings), offline=True)
    return folder


@pytest.fixture(scope="module")
def graphs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(str(tiny_folder), tmp_path_factory.mktemp("exported") / "tiny")


@pytest.fixture
def copy(graphs: Path, tmp_path: Path) -> Path:
    """An exported folder to damage."""
    return Path(shutil.copytree(graphs, tmp_path / "tiny"))


@pytest.fixture
def model(tiny_folder: Path) -> ResolvedModel:
    return hub.resolve(str(tiny_folder), offline=True)


def check(found: dict[str, Any], graphs: Iterable[str] = GRAPHS) -> None:
    """What a comparison says of graphs that are right."""
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["graphs"]) == set(graphs)
    for worst in found["graphs"].values():
        assert set(worst) == {"error", "max", "limit"}
        assert 0 <= worst["error"] <= worst["limit"]
    assert found["picture"]["psnr"] >= found["picture"]["limit"]


def test_graphs_do_what_the_modules_do(graphs: Path, model: ResolvedModel) -> None:
    found = compare(graphs, model, threads=1)
    check(found)
    assert found["size"] == [128, 128]
    # a module's parity, ten times that of the limit, which is for engines and networks of any depth
    assert all(worst["error"] <= 1e-5 for worst in found["graphs"].values())
    assert found["picture"]["psnr"] >= 60


def test_sprint_with_guidance_as_an_input(tiny_sprint_folder: Path, tmp_path: Path) -> None:
    folder = exported(str(tiny_sprint_folder), tmp_path / "sprint")
    found = compare(folder, hub.resolve(str(tiny_sprint_folder)), threads=1)
    assert found["picture"]["psnr"] >= 60
    assert all(worst["error"] <= 1e-5 for worst in found["graphs"].values())


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit_graphs_are_held_to_less(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    folder = exported(str(tiny_folder), tmp_path / dtype, dtype=dtype)
    found = compare(folder, hub.resolve(str(tiny_folder)), threads=1)
    check(found)
    # it did compute in 16 bit
    assert found["graphs"]["denoiser"]["error"] > 1e-5


def test_graphs_of_one_size(tiny_folder: Path, tmp_path: Path, model: ResolvedModel) -> None:
    folder = exported(str(tiny_folder), tmp_path / "fixed", size=(160, 96))
    found = compare(folder, model, threads=1)
    check(found, manifest.GRAPHS)
    assert found["size"] == [160, 96]


def test_of_one_large_size_a_corner_is_decoded(
    tiny_folder: Path, tmp_path: Path, model: ResolvedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, sizes = exported(str(tiny_folder), tmp_path / "fixed", size=(1056, 64)), set()
    run = GraphRunner.run

    def noted(self: GraphRunner, name: str, **inputs: Any) -> Any:
        if name in ("denoiser_folded", "decoder", "decoder_head"):
            sizes.add((name, inputs.get("latent", inputs.get("x")).shape[2:]))
        return run(self, name, **inputs)

    monkeypatch.setattr(GraphRunner, "run", noted)
    check(compare(folder, model, threads=1))
    assert sizes == {("denoiser_folded", (2, 33)), ("decoder", (2, 8)), ("decoder_head", (2, 8))}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_bundled_int8_package(tmp_path: Path, dtype: str) -> None:
    folder = exported("sana-tiny", tmp_path / "int8", int8=True, dtype=dtype)
    found = compare(folder, hub.resolve("sana-tiny", int8=True), threads=1)
    check(found)
    assert set(found["unrounded"]) == set(GRAPHS) - {"text_encoder"}
    if dtype == "fp32":
        assert all(worst["error"] <= 1e-5 for worst in found["unrounded"].values())
    # two digits of an activation, or 16 bit
    assert 1e-6 < found["graphs"]["text_encoder"]["error"] <= found["graphs"]["text_encoder"]["limit"]


def described_in(folder: Path) -> manifest.Manifest:
    """The manifest, without a look at the sizes of the other files."""
    return manifest.Manifest.from_dict(json.loads((folder / manifest.FILE).read_text()), where=str(folder))


@pytest.mark.slow
def test_a_wrong_int8_weight_does_not_hide_in_rounding(tmp_path: Path) -> None:
    folder, model = exported("sana-tiny", tmp_path / "int8", int8=True), hub.resolve("sana-tiny", int8=True)
    described, path = manifest.read(folder), folder / "denoiser.onnx"
    proto = onnx.load(path, load_external_data=False)
    scales = next(t for t in proto.graph.initializer if t.name.endswith("qkv/weight_scale"))
    values = numpy_helper.to_array(scales, str(folder)).copy()
    values[:8] *= 1.5
    scales.CopyFrom(numpy_helper.from_array(values, scales.name))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(SanaError, match=r"^denoiser\.onnx: velocity .* at most 1\.00e-04"):
        compare(folder, model, described, threads=1)


def damage(path: Path, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    """Change the matrix of a graph that has the most values, without its data file, which others share."""
    proto = onnx.load(path, load_external_data=False)
    read = {name for node in proto.graph.node if node.op_type in ("MatMul", "Conv") for name in node.input}
    stored = [t for t in proto.graph.initializer if t.name in read]
    tensor = max(stored, key=lambda one: (int(np.prod(one.dims)), one.name))
    values = numpy_helper.to_array(tensor, str(path.parent))
    tensor.CopyFrom(numpy_helper.from_array(change(values.copy()), tensor.name))
    path.write_bytes(proto.SerializeToString())


def one_column(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    values[..., -1] *= -1
    return values


@pytest.mark.parametrize("name", GRAPHS)
def test_a_damaged_weight_names_its_graph(copy: Path, model: ResolvedModel, name: str) -> None:
    damage(copy / f"{name}.onnx", one_column)
    with pytest.raises(SanaError, match=rf"^{name}\.onnx: .* relative error is \d\.\d\de") as caught:
        compare(copy, model, described_in(copy), threads=1)
    assert caught.value.hint


def test_values_that_are_not_finite(copy: Path, model: ResolvedModel) -> None:
    damage(copy / "decoder.onnx", lambda values: values * np.float32(np.nan))
    with pytest.raises(SanaError, match=r"^decoder\.onnx: .* nan"):
        compare(copy, model, described_in(copy), threads=1)


def test_a_changed_instruction_is_found(copy: Path, model: ResolvedModel) -> None:
    path = copy / manifest.INSTRUCTION
    stored = load_file(path)
    save_file({**stored, "keys": stored["keys"][::-1].copy()}, path)
    with pytest.raises(SanaError, match=r"^text_encoder\.onnx"):
        compare(copy, model, described_in(copy), threads=1)
    save_file({name: stored[name] for name in ("ids", "hidden", "keys")}, path)
    with pytest.raises(CheckpointError, match=r"instruction\.safetensors: values is missing"):
        compare(copy, model, described_in(copy), threads=1)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"cannot read .*instruction\.safetensors"):
        compare(copy, model, described_in(copy), threads=1)


def test_another_model_is_found(graphs: Path, tiny_sprint_folder: Path) -> None:
    with pytest.raises(SanaError, match=r"^(text_encoder|text_projection)\.onnx"):
        compare(graphs, hub.resolve(str(tiny_sprint_folder)), threads=1)


def test_a_cut_graph_is_named(copy: Path, model: ResolvedModel) -> None:
    described = described_in(copy)
    path = copy / "denoiser.onnx"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match=r"denoiser\.onnx cannot be run"):
        compare(copy, model, described, threads=1)


def test_the_command(graphs: Path, copy: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert comparing.main([str(graphs), "--model", str(tiny_folder), "--threads", "1"]) == 0
    check(json.loads(capsys.readouterr().out))
    shutil.rmtree(copy)
    assert comparing.main([str(copy), "--model", str(tiny_folder)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and str(copy) in said.err and "Traceback" not in said.err


def pairs() -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    right = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    yield right[..., :-1], right
    yield right * 1.01, right
    far = right.copy()
    far[1, 2, 3] += 0.1
    yield far, right
    yield np.where(right > 2, np.inf, right), right


@pytest.mark.parametrize(("found", "right"), list(pairs()), ids=["shape", "scale", "one", "infinite"])
def test_what_disagrees(found: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    with pytest.raises(SanaError, match=r"^denoiser\.onnx: velocity"):
        Agreement("fp32", False).check("denoiser", {"velocity": found}, velocity=right)
    with pytest.raises(SanaError, match=r"^denoiser\.onnx: noise has shape None"):
        Agreement("fp32", False).check("denoiser", {"velocity": found}, noise=right)


def test_the_worst_is_kept() -> None:
    agreement, right = Agreement("bf16", False), np.ones((2, 2), np.float32)
    for share in (1e-3, 1e-2, 1e-4):
        agreement.check("decoder", {"pixels": right * (1 + share)}, pixels=right)
    zeros = np.zeros((1, 3), np.float32)
    agreement.check("decoder", {"pixels": zeros}, pixels=zeros)
    assert agreement.graphs["decoder"]["error"] == pytest.approx(1e-2, rel=1e-4)
    assert agreement.graphs["decoder"]["max"] == pytest.approx(1e-2, rel=1e-4)


def test_pictures() -> None:
    right = np.full((8, 8, 3), 100, np.uint8)
    assert Agreement("fp32", False).picture(right, right) == {"psnr": 99.0, "limit": 50.0}
    # 20 log10(255 / 10) = 28.1 dB
    with pytest.raises(SanaError, match=r"PSNR is 28\.1 dB, at least 35\.0 dB"):
        Agreement("fp32", True).picture(right + 10, right)
    assert Agreement("fp32", True).picture(right + 10, right, 33.0)["limit"] == 27.0
