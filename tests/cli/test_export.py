"""`sana-edge export`: the folder, whole or not at all, and what is refused before any work."""

# ruff: noqa: E402 (what is not installed skips the file before it is imported)

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

for module in ("onnx", "onnxruntime"):
    pytest.importorskip(module, reason=f"{module} is not installed")

import onnx
import torch
from safetensors.torch import load_file, save_file

import sana_edge.export.onnx as exporting
from sana_edge import Sana
from sana_edge.calib.quantize import quantize
from sana_edge.calib.settings import Settings as Calibration
from sana_edge.cli.main import main
from sana_edge.config import AutoencoderConfig
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.export.settings import Settings
from sana_edge.export.source import describe
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.quantize import decoder_targets
from sana_edge.store import hub, manifest, manifest_files, package
from sana_edge.store.folder import PREVIEW_MAP, read_json
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.manifest import GRAPHS, Manifest
from sana_edge.store.preview_map import read_map
from sana_edge.system import scratch

Capture = pytest.CaptureFixture[str]

READ = {
    *(f"{name}.onnx" for name in GRAPHS),
    *("text_encoder.data", "denoiser.data", "decoder.data"),
    *("instruction.safetensors", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
    PREVIEW_MAP,
}


# of the decoders here; those of the public models have fewer tails
PARTS = ("decoder_head", *(f"decoder_tail_{n}" for n in range(4)))


def run(model: Path | str, output: Path, *arguments: str) -> int:
    return main(["export", str(model), "--output", str(output), *arguments])


def quick(model: Path | str, output: Path, *arguments: str) -> int:
    return run(model, output, "--no-verify", *arguments)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where nothing may be left."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert os.listdir(folder) == []


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of the README."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    assert run("sana-tiny", folder, "--int8") == 0
    return folder


@pytest.fixture(scope="module")
def float_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    assert quick(tiny_folder, folder) == 0
    return folder


def test_sana_tiny_in_int8(int8_folder: Path) -> None:
    found = manifest.read(int8_folder)
    manifest_files.verify(int8_folder, found)
    assert set(found.files) == READ | {f"{name}.onnx" for name in PARTS} | {"tokenizer/domain.json"}
    # the same cheap previews
    assert read_map(int8_folder, 32) == read_map(BUNDLED / "sana-tiny", 32)
    assert set(found.graphs) == {*GRAPHS, *PARTS}
    assert found.name == found.source.model == "sana-tiny-int8"
    assert found.quantization == "w8a8, per tensor and token, calibrated"
    assert (found.dtype, found.native_size, found.size) == ("fp32", 256, None)
    assert (found.latent_channels, found.cell, found.guidance_embeds) == (32, 32, False)
    assert (found.sampler.kind, found.sampler.flow_shift) == ("flow-dpm", 3.0)
    path = BUNDLED / "sana-tiny-int8"
    assert found.source.checksums == {
        component: package.checksum(path / component) for component in ("transformer", "vae", "text_encoder")
    }
    assert found.verification is not None
    assert set(found.verification["graphs"]) == set(found.graphs)
    assert "Apache-2.0" in (int8_folder / "README.md").read_text()
    assert os.listdir(int8_folder.parent) == ["onnx"]
    # 11.6 M parameters: 8.5 M in INT8, and what runs once for a prompt or a schedule in fp32
    assert sum(file.bytes for file in found.files.values()) < 16e6


def test_weights_are_int8_and_the_rest_is_shared(int8_folder: Path) -> None:
    weights = {
        name: sum(
            initializer.data_type == onnx.TensorProto.INT8 and len(initializer.dims) > 1
            for initializer in load(int8_folder, name).graph.initializer
        )
        for name in GRAPHS
    }
    # six layers in each of eight blocks, of which a graph may split some; Gemma's seven in each of four; q, k
    # and v of a decoder are one
    config = AutoencoderConfig.from_dict(read_json(BUNDLED / "sana-tiny-int8" / "vae" / "config.json"))
    decoder = len(decoder_targets(Autoencoder(config, encoder=False)))
    assert weights["denoiser"] == weights["denoiser_folded"] >= 48
    assert (weights["text_encoder"], weights["decoder"]) == (28, decoder)
    places = {name: external(load(int8_folder, name)) for name in ("denoiser", "denoiser_folded")}
    assert places["denoiser"] == places["denoiser_folded"]
    # parts of a decoder have no weights of their own
    pieces = [external(load(int8_folder, name)) for name in PARTS]
    assert external(load(int8_folder, "decoder")) == set.union(*pieces)
    assert len({place[:2] for piece in pieces for place in piece}) == sum(map(len, pieces))


def load(folder: Path, name: str) -> onnx.ModelProto:
    return onnx.load(folder / f"{name}.onnx", load_external_data=False)


def external(model: onnx.ModelProto) -> set[tuple[str, ...]]:
    return {
        tuple(entry.value for entry in initializer.external_data)
        for initializer in model.graph.initializer
        if initializer.external_data
    }


def test_the_float_folder(float_folder: Path, tiny_folder: Path) -> None:
    found = manifest.read(float_folder)
    manifest_files.verify(float_folder, found)
    assert set(found.files) == READ | {f"{name}.onnx" for name in PARTS}
    described = [(part.graph, part.halo, part.scale) for part in found.decoder_parts]
    assert described == [*zip(PARTS, (None, 2, 2, 2, 3), (1, 2, 2, 2, 4), strict=True)]
    assert (found.name, found.quantization, found.verification) == (tiny_folder.name, None, None)
    assert found.native_size == 128
    assert (found.text.layers, found.text.kv_heads, found.text.head_dim) == (2, 2, 8)
    rows = json.loads((tiny_folder / "text_encoder" / "config.json").read_text())["vocab_size"]
    assert found.text_table_bytes in (2 * rows * found.text.channels, 4 * rows * found.text.channels)
    assert found.text_table_bytes < found.files["text_encoder.data"].bytes
    latent = ("float32", ("B", 32, "h", "w"))
    assert found.graphs["denoiser"].inputs["latent"] == found.graphs["denoiser"].outputs["velocity"] == latent
    assert found.graphs["text_encoder"].inputs["ids"] == ("int64", (1, "T"))
    assert list(found.graphs["text_projection"].outputs) == ["keys", "values", "constant"]
    for name in ("transformer", "vae", "text_encoder"):
        (weights,) = (tiny_folder / name).glob("*.safetensors")
        assert found.source.checksums[name] == package.digest([weights])
    # as readable as any other file, though some libraries make theirs private
    modes = {(float_folder / name).stat().st_mode & 0o777 for name in found.files}
    assert len(modes) == 1
    assert str(tiny_folder) not in (float_folder / manifest.FILE).read_text()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit(tiny_folder: Path, tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "onnx"
    assert quick(tiny_folder, folder, "--dtype", dtype) == 0
    assert manifest.read(folder).dtype == dtype
    wide = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    # fp16 is too narrow for the decoder
    expected = {"denoiser": wide, "decoder": onnx.TensorProto.FLOAT if dtype == "fp16" else wide}
    for name, element in expected.items():
        sizes: dict[int, int] = {}
        for tensor in load(folder, name).graph.initializer:
            count = torch.Size(tensor.dims).numel()
            sizes[tensor.data_type] = sizes.get(tensor.data_type, 0) + count
        assert max(sizes, key=sizes.__getitem__) == element, name


def test_one_size(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    assert quick(tiny_folder, folder, "--size", "128x64") == 0
    found = manifest.read(folder)
    assert found.size == (128, 64)
    assert found.graphs["denoiser_folded"].inputs["latent"] == ("float32", (1, 32, 2, 4))
    assert found.graphs["decoder"].inputs["latent"] == ("float32", (1, 32, 2, 4))
    # nothing is larger than a tile
    assert found.decoder_parts == () and set(found.files) == READ
    assert "128x64" in (folder / "README.md").read_text()


def test_a_size_that_is_decoded_in_strips(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    assert quick(tiny_folder, folder, "--size", "1056x64") == 0
    found = manifest.read(folder)
    assert found.graphs["denoiser"].inputs["latent"][1][2:] == (2, 33)
    # of previews, and of strips, which have heights of their own
    for name, (given,) in (("decoder", ["latent"]), ("decoder_head", ["x"]), ("decoder_tail_0", ["x"])):
        assert found.graphs[name].inputs[given][1][2:] == ("h", "w")
    assert found.graphs["decoder_head"].outputs["y"] == ("float32", (1, 32, "h", "w"))
    assert found.graphs["decoder_tail_3"].outputs["y"] == ("float32", (1, 3, "4*h", "4*w"))


def test_a_sprint_model(tiny_sprint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    assert quick(tiny_sprint_folder, folder) == 0
    found = manifest.read(folder)
    assert (found.sampler.kind, found.guidance_embeds) == ("scm", True)
    assert found.graphs["denoiser"].inputs["guidance"] == ("float32", (1,))


def test_the_terms_go_with_the_graphs(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "notes.txt").write_text("not terms")
    assert quick(folder, tmp_path / "onnx") == 0
    assert (tmp_path / "onnx" / "LICENSE.txt").read_text() == "terms"
    assert "LICENSE.txt" in (tmp_path / "onnx" / "README.md").read_text()
    assert not (tmp_path / "onnx" / "notes.txt").exists()
    # people may write into these
    (tmp_path / "onnx" / "README.md").write_text("mine")
    manifest.read(tmp_path / "onnx")


def test_what_is_printed(
    tiny_folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = {"denoiser": {"error": 2e-7}, "decoder": {"error": 3.04e-6}}
    found = {"graphs": graphs, "picture": {"psnr": 60.04}}
    monkeypatch.setattr(exporting, "_comparison", lambda: lambda folder, model, described: found)
    assert run(tiny_folder, tmp_path / "a") == 0
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'a'}\n"
    assert err.startswith("tiny, fp32: ") and err.count("\n") == 1
    assert "compared with the model: relative L2 at most 3.0e-06 (decoder), picture's PSNR 60.0 dB" in err
    assert manifest.read(tmp_path / "a").verification == found
    assert quick(tiny_folder, tmp_path / "b") == 0
    assert "not compared" in capsys.readouterr().err
    assert quick(tiny_folder, tmp_path / "c", "--quiet") == 0
    assert capsys.readouterr() == (f"{tmp_path / 'c'}\n", "")


def assert_refused(code: int, capsys: Capture, message: str, hint: str = "") -> None:
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and message in lines[0], err
    assert len(lines) <= 2, err
    if hint:
        assert lines[1].startswith("hint:  ") and hint in lines[1]


WRONG: dict[str, tuple[str, tuple[str, ...], str, str]] = {
    "model": ("sana-tony", (), "unknown model 'sana-tony'", "models list"),
    "model-folder": ("./nowhere", (), "no folder ./nowhere", "diffusers layout"),
    "model-empty": ("", (), "unknown model ''", "models list"),
    "size": ("sana-tiny", ("--size", "100x100"), "100x100 is not a multiple of 32", "try 96x96 or 128x128"),
    "size-zero": ("sana-tiny", ("--size", "0x64"), "0x64 is too small", "at least 32"),
    "size-negative": ("sana-tiny", ("--size", "-64x64"), "-64x64 is too small", "at least 32"),
    "size-enormous": ("sana-tiny", ("--size", "64x99999"), "too large", "at most 8192"),
    "offline": ("no/such-model", ("--offline",), "offline mode is on", "models pull"),
}


@pytest.mark.parametrize(("model", "arguments", "message", "hint"), WRONG.values(), ids=WRONG)
def test_wrong_values(
    place: Path, capsys: Capture, model: str, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    assert_refused(run(model, place / "onnx", *arguments), capsys, message, hint)


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "output": (("sana-tiny",), "--output"),
    "model": (("--output", "x"), "MODEL"),
    "dtype": (("sana-tiny", "--output", "x", "--dtype", "int3"), "invalid choice: 'int3'"),
    "size": (("sana-tiny", "--output", "x", "--size", "large"), "'large' is not WIDTHxHEIGHT"),
    "unknown": (("sana-tiny", "--output", "x", "--opsett", "3"), "unrecognized arguments"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_usage(capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_dtype() -> None:
    with pytest.raises(InvalidInput, match="unknown dtype 'int3'") as caught:
        Settings(dtype="int3")  # type: ignore[arg-type]
    assert "fp32, fp16, bf16" in caught.value.hint


def test_a_float_model_is_not_made_int8(place: Path, capsys: Capture, tiny_folder: Path) -> None:
    code = run(tiny_folder, place / "onnx", "--int8")
    assert_refused(code, capsys, "tiny is no INT8 package", "sana-edge quantize")


def test_int8_needs_calibrated_scales(
    place: Path, capsys: Capture, tiny_folder: Path, tmp_path: Path
) -> None:
    quantize(str(tiny_folder), tmp_path / "package", Calibration(calibrate=False))
    capsys.readouterr()
    for arguments in ((), ("--int8",)):
        code = run(tmp_path / "package", place / "onnx", *arguments)
        assert_refused(code, capsys, "has no calibrated scales", "without --no-calibration")


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated": (TRANSFORMER, lambda path: path.write_bytes(path.read_bytes()[:-1000]), "cannot read"),
    "empty": ("vae/diffusion_pytorch_model.safetensors", lambda path: path.write_bytes(b""), "cannot read"),
    "text": ("text_encoder/model.safetensors", lambda path: drop(path), "missing"),
    "config": ("vae/config.json", lambda path: path.write_text("{"), "cannot read"),
    "gemma": ("text_encoder/config.json", lambda path: path.write_text("{}"), "model_type None"),
    "tokenizer": ("tokenizer/tokenizer.json", lambda path: path.write_text("{"), "cannot be read"),
    "no-tokenizer": ("tokenizer/tokenizer.json", Path.unlink, "tokenizer.json"),
}


def drop(path: Path) -> None:
    state = load_file(path)
    del state[sorted(state)[0]]
    save_file(state, path)


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_models(
    place: Path,
    tmp_path: Path,
    capsys: Capture,
    tiny_folder: Path,
    name: str,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    damage(folder / name)
    assert_refused(run(folder, place / "onnx"), capsys, message)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_what_is_not_installed(
    place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("sana_edge.export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    code = run("sana-tiny", place / "onnx")
    assert_refused(code, capsys, f"this needs {missing}", "pip install 'sana-edge[export]'")


def test_only_the_comparison_needs_onnxruntime(tiny_folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None; from sana_edge.cli.main import main;"
        "sys.exit(main(['export', '--no-verify', *sys.argv[1:]]))"
    )
    arguments = [str(tiny_folder), "--output", str(tmp_path / "onnx")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest.read(tmp_path / "onnx")


def test_no_room(place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    assert_refused(run(tiny_folder, place / "onnx"), capsys, "0.0 GB are free", "make room")


def test_what_the_graphs_will_weigh(float_folder: Path, int8_folder: Path, tiny_folder: Path) -> None:
    for folder, model in ((float_folder, str(tiny_folder)), (int8_folder, "sana-tiny-int8")):
        found = manifest.read(folder)
        source = describe(hub.resolve(model), int8=False)
        size = sum(file.bytes for file in found.files.values())
        # the rest is a constant that is large beside these
        assert size < source.bytes_of_graphs("fp32") < size + (64 << 20)


def test_a_disk_that_fills_up(
    place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exporting, "stored_files", lambda *_, **__: full())
    assert_refused(quick(tiny_folder, place / "onnx"), capsys, "No space left", "free some space")


def test_outputs_that_are_taken(tmp_path: Path, capsys: Capture, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "other"}')
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    before = sorted(tmp_path.rglob("*"))
    for name, message in (
        ("file", "is not a folder"),
        ("link", "is not empty and no exported folder"),
        ("folder", "is not empty and no exported folder"),
        ("other", "is not empty and no exported folder"),
    ):
        for arguments in ((), ("--force",)):
            code = run(tiny_folder, tmp_path / name, *arguments)
            assert_refused(code, capsys, message, "another --output")
    code = run(tiny_folder, tmp_path / "file" / "onnx")
    assert_refused(code, capsys, "cannot write", "another folder")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(
    tmp_path: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "add_decoder", interrupt)
        assert quick(tiny_folder, folder) == 130
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(folder) == []
    capsys.readouterr()

    def meanwhile(*_: object, **__: object) -> None:
        (folder / "mine.txt").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(exporting.manifest, "write", meanwhile)
        assert_refused(quick(tiny_folder, folder), capsys, "is not empty and no exported folder")
    assert os.listdir(folder) == ["mine.txt"] and os.listdir(tmp_path) == ["empty"]
    (folder / "mine.txt").unlink()
    assert quick(tiny_folder, folder) == 0
    manifest.read(folder)
    assert os.listdir(tmp_path) == ["empty"]


def test_the_model_is_not_replaced(tmp_path: Path, capsys: Capture, tiny_folder: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    # a model folder that would pass for an exported one
    (folder / "manifest.json").write_text(json.dumps({"format": manifest.FORMAT}))
    assert_refused(quick(folder, folder, "--force"), capsys, "is where the model is", "another --output")
    assert (folder / "model_index.json").is_file()


def test_a_second_export_needs_force(
    float_folder: Path, tmp_path: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(float_folder, tmp_path / "onnx"))
    (folder / "old.txt").write_text("old")
    assert_refused(quick(tiny_folder, folder), capsys, f"{folder} exists", "--force")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "add_decoder", interrupt)
        assert quick(tiny_folder, folder, "--force") == 130
    # what was there is still there
    assert (folder / "old.txt").exists() and os.listdir(tmp_path) == ["onnx"]
    # a damaged one may be replaced, too
    (folder / "denoiser.onnx").unlink()
    assert quick(tiny_folder, folder, "--force") == 0
    assert not (folder / "old.txt").exists() and os.listdir(tmp_path) == ["onnx"]
    manifest.read(folder)


def test_what_cannot_be_replaced_comes_back(
    float_folder: Path, tmp_path: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(float_folder, tmp_path / "onnx"))
    (folder / "old.txt").write_text("old")
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    # where two folders cannot change places in one step
    monkeypatch.setattr(scratch, "exchange", lambda path, other: False)
    monkeypatch.setattr(os, "rename", refuse)
    assert_refused(quick(tiny_folder, folder, "--force"), capsys, "Permission denied", "permissions")
    assert (folder / "old.txt").exists() and os.listdir(tmp_path) == ["onnx"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "part",
    [
        *("add_text_encoder", "write_instruction", "add_denoiser_folded"),
        *("add_decoder", "add_decoder_part", "compare"),
    ],
)
def test_an_interrupted_export_leaves_nothing(
    place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    if part == "compare":
        monkeypatch.setattr(exporting, "_comparison", lambda: interrupt)
    else:
        monkeypatch.setattr(exporting, part, interrupt)
    assert run(tiny_folder, place / "onnx") == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_graphs_that_differ_are_not_kept(
    place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differ(*_: object) -> None:
        raise SanaError("decoder.onnx differs", "please report this")

    monkeypatch.setattr(exporting, "_comparison", lambda: differ)
    assert_refused(run(tiny_folder, place / "onnx"), capsys, "decoder.onnx differs", "report")


def test_the_parts_are_told(tiny_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    made = exporting.export(
        str(tiny_folder),
        tmp_path / "onnx",
        Settings(verify=False),
        progress=lambda part, done, count: told.append(part),
    )
    assert tuple(told) == exporting.PARTS[:-1]
    assert isinstance(made, Manifest) and manifest.read(tmp_path / "onnx") == made


def test_what_is_not_done_is_noted_in_the_folder(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    index = model / "model_index.json"
    index.write_text(index.read_text().replace('"SanaPipeline"', '"SanaPAGPipeline"'))
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, model / "my_lora.safetensors")
    assert quick(model, tmp_path / "graphs") == 0
    said = capsys.readouterr().err
    with Sana.load(tmp_path / "graphs", backend="onnxruntime", device="cpu") as sana:
        notes = sana.generate("a house", steps=1, seed=1).notes
    for words in ("made for SanaPAGPipeline", "my_lora.safetensors is a LoRA"):
        assert words in said and any(words in note for note in notes)
