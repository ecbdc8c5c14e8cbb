"""manifest.json: what is written is read again, and what is wrong is named, before an engine sees a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sana_edge.config import SamplerConfig
from sana_edge.errors import CheckpointError
from sana_edge.store import manifest, manifest_files, package
from sana_edge.store.manifest import (
    GRAPHS,
    INSTRUCTION,
    TOKENIZER,
    DecoderPart,
    Graph,
    Manifest,
    Source,
    StoredFile,
    TextShape,
)

HASH = "0123456789abcdef" * 4
LATENT = ("float32", ("B", 32, "h", "w"))


def made(files: dict[str, StoredFile], **changed: Any) -> Manifest:
    graphs = {name: Graph(f"{name}.onnx", {"latent": LATENT}, {"velocity": LATENT}) for name in GRAPHS}
    values: dict[str, Any] = {
        "sana_edge": "0.1",
        "name": "sana-tiny",
        "source": Source("sana-tiny", {"vae": HASH}),
        "dtype": "fp32",
        "quantization": None,
        "native_size": 256,
        "size": None,
        "latent_channels": 32,
        "cell": 32,
        "guidance_embeds": False,
        "sampler": SamplerConfig(flow_shift=3.0),
        "text": TextShape(channels=256, layers=2, kv_heads=2, head_dim=64),
        "graphs": graphs,
        "files": files,
        "verification": {"denoiser": {"max": 1e-6}},
    }
    return Manifest(**{**values, **changed})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, which no test may share."""
    path = tmp_path / "cache"
    monkeypatch.setenv("SANA_EDGE_CACHE", str(path))
    return path


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    """A whole folder whose graphs have a name (field 2) and no nodes."""
    path = tmp_path / "onnx"
    for name in (*(f"{graph}.onnx" for graph in GRAPHS), "denoiser.onnx.data", INSTRUCTION, TOKENIZER):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes((b"\x12" + bytes([len(name)]) + name.encode()) * 100)
    (path / INSTRUCTION).write_bytes(b"\x02" + bytes(7) + b"{}")
    manifest.write(made(manifest_files.stored_files(path)), path)
    return path


def test_read_is_what_was_written(folder: Path) -> None:
    found = manifest.read(folder)
    assert found == made(manifest_files.stored_files(folder))
    assert set(found.files) == {
        *(f"{graph}.onnx" for graph in GRAPHS),
        *("denoiser.onnx.data", INSTRUCTION, TOKENIZER),
    }
    assert found.graphs["denoiser"].inputs["latent"] == LATENT
    assert manifest.is_exported(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "manifest"))) == [
        "manifest.json"
    ]
    manifest_files.verify(folder, found)


def test_the_format_is_as_agreed(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    assert (data["format"], data["version"]) == ("sana-edge-onnx", 1)
    assert data["graphs"]["denoiser"] == {
        "file": "denoiser.onnx",
        "inputs": {"latent": ["float32", ["B", 32, "h", "w"]]},
        "outputs": {"velocity": ["float32", ["B", 32, "h", "w"]]},
    }
    assert data["files"]["denoiser.onnx"] == {
        "sha256": package.digest([folder / "denoiser.onnx"]),
        "bytes": 1500,
    }
    assert data["sampler"] == {
        "kind": "flow-dpm",
        "flow_shift": 3.0,
        "num_train_timesteps": 1000,
        "sigma_data": 0.5,
    }
    assert data["text"] == {"channels": 256, "layers": 2, "kv_heads": 2, "head_dim": 64}


def test_a_decoder_in_parts(folder: Path) -> None:
    # folders of earlier versions have none, and those of later ones can be read by earlier programs
    parts = [{"graph": "head", "halo": None, "scale": 4, "values": 99}]
    parts += [{"graph": "tail", "halo": 3, "scale": 8, "values": 7}]
    assert manifest.read(folder).decoder_parts == ()
    change(folder, drop("decoder_parts"))
    assert manifest.read(folder).decoder_parts == ()
    change(folder, with_parts(parts))
    found = manifest.read(folder)
    assert found.decoder_parts == (DecoderPart("head", None, 4, 99), DecoderPart("tail", 3, 8, 7))
    manifest.write(found, folder)
    assert json.loads((folder / "manifest.json").read_text())["decoder_parts"] == parts
    for index, key, value, message in (
        (0, "graph", "nose", r"decoder_parts\.0\.graph is 'nose', expected a key of graphs"),
        (1, "graph", "decoder", r"decoder_parts\.1\.graph is 'decoder', expected a graph of x to y"),
        (0, "halo", 3, r"decoder_parts\.0\.halo is 3, expected null"),
        (1, "halo", None, r"decoder_parts\.1\.halo is None, expected a number of rows"),
        (1, "halo", -1, r"decoder_parts\.halo is -1, expected a whole number from 0"),
        (1, "scale", 0, r"decoder_parts\.scale is 0, expected a whole number from 1 to 64"),
        (1, "scale", 10**6, r"decoder_parts\.scale is 1000000, expected a whole number from 1 to 64"),
        (1, "scale", 16, r"decoder_parts is 64, expected scales whose product is the cell, 32"),
        (0, "values", 1.5, r"decoder_parts\.values is 1\.5, expected a whole number"),
    ):
        wrong = [dict(part) for part in parts]
        wrong[index][key] = value
        change(folder, put("decoder_parts", wrong))
        with pytest.raises(CheckpointError, match=message):
            manifest.read(folder)


def with_parts(parts: list[dict[str, Any]]) -> Callable[[dict[str, Any]], object]:
    """Puts parts into a manifest, with a graph for each."""

    def edit(data: dict[str, Any]) -> None:
        data["decoder_parts"] = parts
        port = ["float32", [1, 3, "h", "w"]]
        for part in parts:
            graph = {"file": "decoder.onnx", "inputs": {"x": port}, "outputs": {"y": port}}
            data["graphs"][part["graph"]] = graph

    return edit


def test_later_versions_may_add_keys(folder: Path) -> None:
    change(folder, lambda data: data.update(later=1))
    change(folder, lambda data: data["text"].update(later=1))
    assert manifest.read(folder).text == TextShape(256, 2, 2, 64)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def put(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets the value of a key such as "text/layers"."""

    def edit(data: dict[str, Any]) -> None:
        *above, last = key.split("/")
        for name in above:
            data = data[name]
        data[last] = value

    return edit


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    def edit(data: dict[str, Any]) -> None:
        *above, last = key.split("/")
        for name in above:
            data = data[name]
        del data[last]

    return edit


def store(path: str) -> Callable[[dict[str, Any]], object]:
    return lambda data: data["files"].update({path: {"sha256": HASH, "bytes": 1}})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "format": (put("format", "other"), "format is 'other', only 'sana-edge-onnx'", "sana-edge export"),
    "no-format": (drop("format"), "format is None", "sana-edge export"),
    "newer": (put("version", 2), "version is 2, this sana-edge reads up to 1", "upgrade"),
    "version": (put("version", "1"), "version is '1', expected a whole number", "again"),
    "version-zero": (put("version", 0), "version is 0, expected 1 to 1", "again"),
    "version-bool": (put("version", True), "version is True, expected a whole number", "again"),
    "no-name": (drop("name"), "lacks name", "again"),
    "no-layers": (drop("text/layers"), "lacks text.layers", "again"),
    "name": (put("name", 3), "name is 3, expected a string", "again"),
    "dtype": (put("dtype", "int3"), "dtype is 'int3', expected one of fp32, fp16, bf16", "again"),
    "dtype-list": (put("dtype", ["fp32"]), r"dtype is \['fp32'\]", "again"),
    "size": (put("size", [256]), r"size is \[256\], expected a list of 2", "again"),
    "size-odd": (put("size", [256, 250]), r"size is \[256, 250\], expected multiples of 32", "again"),
    "size-word": (put("size", "dynamic"), "size is 'dynamic', expected a list of 2", "again"),
    "cell": (put("cell", 0), "cell is 0, expected a whole number from 1 to 1024", "again"),
    "native": (put("native_size", 256.5), "native_size is 256.5, expected a whole number", "again"),
    "huge": (put("native_size", -(10**4000)), "native_size is a huge number", "again"),
    "shift": (
        put("sampler/flow_shift", -1),
        "sampler.flow_shift is -1, expected a number from 0.01 to 100",
        "again",
    ),
    "shift-nan": (put("sampler/flow_shift", float("nan")), "sampler.flow_shift is nan", "again"),
    "sampler": (put("sampler/kind", "ddim"), "sampler.kind is 'ddim', expected one of flow-dpm", "again"),
    "text": (put("text", None), "text is None, expected an object", "again"),
    "heads": (put("text/kv_heads", 0), "text.kv_heads is 0", "again"),
    "guidance": (put("guidance_embeds", 1), "guidance_embeds is 1, expected true or false", "again"),
    "graphs": (put("graphs", []), r"graphs is \[\], expected an object", "again"),
    "no-graph": (drop("graphs/decoder"), r"graphs is \[.*\], expected also decoder", "again"),
    "graph-file": (
        put("graphs/decoder/file", "other.onnx"),
        "graphs.decoder.file is 'other.onnx', expected a key of files",
        "again",
    ),
    "graph-format": (
        put("graphs/decoder/file", TOKENIZER),
        f"graphs.decoder.file is '{TOKENIZER}', expected a name in .onnx",
        "again",
    ),
    "port": (
        put("graphs/decoder/inputs/latent", "float32"),
        "graphs.decoder.inputs.latent is 'float32', expected a list of 2",
        "again",
    ),
    "port-side": (
        put("graphs/decoder/inputs/latent", ["float32", [1.5]]),
        "graphs.decoder.inputs.latent is 1.5, expected a whole number",
        "again",
    ),
    "no-tokenizer": (lambda data: data["files"].pop(TOKENIZER), f"expected also {TOKENIZER}", "again"),
    "hash": (put("files/decoder.onnx/sha256", "0x1"), "files.decoder.onnx.sha256 is '0x1'", "again"),
    "bytes": (put("files/decoder.onnx/bytes", -1), "files.decoder.onnx.bytes is -1", "again"),
    "verification": (put("verification", "good"), "verification is 'good', expected an object", "again"),
    **{
        f"path-{number}": (store(path), "expected paths inside the folder", "again")
        for number, path in enumerate(
            (
                "../a",
                "/etc/passwd",
                "a/../../b",
                "C:\\a",
                "C:a",
                "a\\b",
                "a//b",
                "./a",
                "",
                ".",
                "manifest.json",
            )
        )
    },
}


@pytest.mark.parametrize(("edit", "message", "hint"), WRONG.values(), ids=WRONG)
def test_wrong_values(folder: Path, edit: Any, message: str, hint: str) -> None:
    change(folder, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest.read(folder)
    assert hint in caught.value.hint
    assert str(folder / "manifest.json") in caught.value.message
    assert len(caught.value.message) < 600


UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot read"),
    "truncated": (b'{"format": "sana-edge-onnx", "version"', "cannot read"),
    "binary": (b"\xff\xfe\x00", "cannot read"),
    "list": (b"[]", "format is missing"),
    "number": (b"9" * 5000, "cannot read"),
    "deep": (b"[" * 100_000, "cannot read"),
}


@pytest.mark.parametrize(("content", "message"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_manifests(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest.read(folder)
    assert str(folder / "manifest.json") in caught.value.message


def test_what_is_no_exported_folder(tmp_path: Path, folder: Path, tiny_folder: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path in (tmp_path / "file", tmp_path / "nowhere", Path("a" * 300)):
        assert not manifest.is_exported(path)
        with pytest.raises(CheckpointError, match="is not a folder") as caught:
            manifest.read(path)
        assert "sana-edge export" in caught.value.hint
    assert not manifest.is_exported(tiny_folder)
    with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
        manifest.read(tiny_folder)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def to_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["denoiser.onnx", "denoiser.onnx.data", TOKENIZER])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "is missing"),
        (truncate, r"has \d+ bytes, manifest.json says"),
        (to_folder, "is missing"),
    ],
    ids=["missing", "truncated", "folder"],
)
def test_files_that_are_not_whole(
    folder: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        manifest.read(folder)
    assert str(folder / name) in caught.value.message
    assert "sana-edge export" in caught.value.hint


def corrupt(path: Path, *, keep_time: bool = False) -> None:
    """Another content of the same size."""
    before = path.stat()
    path.write_bytes(b"\0" * before.st_size)
    times = (before.st_atime_ns, before.st_mtime_ns + (0 if keep_time else 10**9))
    os.utime(path, ns=times)


def test_a_file_that_is_not_what_was_written(folder: Path) -> None:
    corrupt(folder / "decoder.onnx")
    found = manifest.read(folder)
    manifest_files.verify(folder, found, ["denoiser.onnx", "denoiser.onnx.data"])
    with pytest.raises(CheckpointError, match=r"decoder.onnx has checksum [0-9a-f]{12}\.\.\.") as caught:
        manifest_files.verify(folder, found)
    assert "sana-edge export" in caught.value.hint


def test_a_good_file_is_read_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    digest = package.digest

    def counted(paths: list[Path]) -> str:
        read.extend(path.name for path in paths)
        return digest(paths)

    monkeypatch.setattr(package, "digest", counted)
    found = manifest.read(folder)
    manifest_files.verify(folder, found)
    assert len(read) == len(found.files)
    manifest_files.verify(folder, found)
    assert len(read) == len(found.files)
    assert {path.stat().st_size for path in (cache / "verified").iterdir()} == {0}
    read.clear()
    manifest_files.verify(folder, found, ["decoder.onnx"], again=True)
    assert read == ["decoder.onnx"]
    corrupt(folder / "decoder.onnx")
    with pytest.raises(CheckpointError):
        manifest_files.verify(folder, found)
    # still bad the second time
    with pytest.raises(CheckpointError):
        manifest_files.verify(folder, found)


def test_a_mark_belongs_to_one_content(folder: Path) -> None:
    found = manifest.read(folder)
    manifest_files.verify(folder, found)
    corrupt(folder / "decoder.onnx", keep_time=True)
    for again in (False, True):
        with pytest.raises(CheckpointError):
            manifest_files.verify(folder, found, again=again)
    other = made({**found.files, "decoder.onnx": StoredFile(HASH, found.files["decoder.onnx"].bytes)})
    with pytest.raises(CheckpointError):
        manifest_files.verify(folder, other)


@pytest.mark.parametrize("cache_is", ["a file", "nowhere"])
def test_without_a_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, cache_is: str) -> None:
    if cache_is == "a file":
        cache.write_text("in the way")
    else:
        monkeypatch.delenv("SANA_EDGE_CACHE")
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", _no_home)
    found = manifest.read(folder)
    manifest_files.verify(folder, found)
    corrupt(folder / "decoder.onnx", keep_time=True)
    with pytest.raises(CheckpointError, match=r"decoder\.onnx"):
        manifest_files.verify(folder, found)


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_what_is_wrong_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"graphs\.text_encoder\.file"):
        manifest.write(made({}), tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.write(made({}, verification={"max": float("nan")}), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("model", "argument"),
    [
        *(("sana-tiny", "sana-tiny"), ("sana-sprint-0.6b-1024", "sana-sprint-0.6b-1024")),
        *(("owner/name", "owner/name"), ("a/b; rm -r c", "'a/b; rm -r c'")),
        # of a folder only its name is known, which is no model's
        *(("my-model", "MODEL"), ("..", "MODEL"), ("", "MODEL"), ("a\0", "MODEL")),
    ],
)
def test_commands_name_models_that_there_are(model: str, argument: str) -> None:
    found = made({}, source=Source(model, {}), dtype="bf16", size=(512, 256))
    kept = "--dtype bf16 --size 512x256"
    assert found.export_command() == f"sana-edge export {argument} {kept} --output DIR"
    assert found.export_command(int8=True) == f"sana-edge export {argument} {kept} --int8 --output DIR"
    other = f"sana-edge export {argument} --dtype fp16 --size dynamic --output DIR"
    assert found.export_command(dtype="fp16", size="dynamic") == other
    assert manifest.export_command(dtype="fp32") == "sana-edge export MODEL --dtype fp32 --output DIR"


def test_reading_needs_no_torch(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sana_edge.store import manifest, manifest_files;"
        f"folder = Path({str(folder)!r}); manifest_files.verify(folder, manifest.read(folder));"
        "sys.exit(', '.join({'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
