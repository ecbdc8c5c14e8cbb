"""What files and folders are said to be, as people have them: the words are in the errors of all commands."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sana_edge import Sana
from sana_edge.cli.main import main
from sana_edge.errors import CheckpointError, ModelNotFound, SanaError
from sana_edge.store import hub
from sana_edge.store.folder import read_json
from sana_edge.store.identify import identify, lora_files
from sana_edge.store.weights import load_state

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567\n"
PORTAL = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
ZEROS = torch.zeros(2, 2)


def saved(state: object, *, old: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def tensors(*names: str) -> bytes:
    from safetensors.torch import save

    return save({name: ZEROS.clone() for name in names})


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("a.txt", "a")
    return file.getvalue()


NVLABS = {"state_dict": {"x_embedder.proj.weight": ZEROS}, "epoch": 3}
FILES: dict[str, tuple[bytes, str, str]] = {
    "empty.pth": (b"", "an empty file", "download it again"),
    "lfs.safetensors": (LFS, "a Git LFS pointer, not the file", "git lfs pull"),
    "annex.pth": (b"/annex/objects/SHA256E-s12--ab.pth\n", "a git-annex pointer", "git annex get"),
    "portal.safetensors": (PORTAL, "a web page", "asks for a login"),
    "message.safetensors": (
        b'{"error": "Repository not found"}',
        "server's message (Repository not",
        "again",
    ),
    "xml.pth": (b"<?xml version='1.0'?><Error/>", "an XML message", "again"),
    "denied.pth": (b"Invalid username or password.", "a text file (Invalid username", "again"),
    "zeros.safetensors": (bytes(5000), "zeros", "again"),
    "model.gguf": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file", ".safetensors or .pth"),
    "packed.gz": (gzip.compress(b"a"), "an archive", "unpack"),
    "packed.zip": (archive(), "a zip archive", "unpack"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "a picture", ""),
    "half.safetensors.part": (b"abc", "an unfinished download", "again"),
    "cut.pth": (saved(NVLABS)[:-200], "cut off", "again"),
    "cut.safetensors": (tensors("a.b")[:-4], "cut off at", "again"),
    "short.safetensors": (tensors("a.b")[:20], "damaged safetensors", "again"),
    "graph.onnx": (b"\x08\x08\x12\x05torch", "an ONNX graph", "sana-edge export"),
    "nvlabs.pth": (saved(NVLABS), "a SANA denoiser in its authors' names", "sana-edge convert"),
    "old.pth": (saved(NVLABS, old=True), "a SANA denoiser in its authors' names", "sana-edge convert"),
    "compiled.safetensors": (
        tensors("module._orig_mod.transformer_blocks.0.ff.conv_inverted.weight"),
        "a SANA denoiser in diffusers' names",
        "sana-edge convert",
    ),
    "ae.safetensors": (tensors("decoder.project_in.main.conv.weight"), "a SANA autoencoder", "convert"),
    "text.safetensors": (
        tensors("model.layers.0.pre_feedforward_layernorm.weight"),
        "a Gemma-2 text encoder",
        "text_encoder/",
    ),
    "lora.safetensors": (tensors("transformer.blocks.0.attn.to_q.lora_A.weight"), "a LoRA", "merge it"),
    "peft.safetensors": (
        tensors("x_embedder.proj.weight", "blocks.0.attn.qkv.lora_B.default.weight"),
        "LoRA layers that are not merged",
        "merge it",
    ),
    "control.safetensors": (tensors("controlnet_blocks.0.weight"), "a ControlNet", "layout"),
    "svdq.safetensors": (tensors("transformer_blocks.0.qkv.qweight"), "another program quantized", "float"),
    "flux.safetensors": (tensors("double_blocks.0.img_attn.qkv.weight"), "its first tensor is double", ""),
    "unknown.bin": (bytes(range(1, 255)), "a file of an unknown kind", ""),
    "model_index.json": (b'{"_class_name": "SanaPipeline"}', "a JSON description", "give its folder"),
}


@pytest.mark.parametrize(("name", "content"), [(n, c[0]) for n, c in FILES.items()], ids=FILES)
def test_files(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    found, (_, words, hint) = identify(path), FILES[name]
    assert words in found.words
    assert hint in found.hint
    with pytest.raises(ModelNotFound, match="is no whole model: it is") as caught:
        hub.resolve(str(path))
    assert found.words in caught.value.message and caught.value.hint
    with pytest.raises(SanaError) as loading:
        Sana.load(path, backend="onnxruntime")
    assert found.words in loading.value.message


def test_special_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert identify(tmp_path / "fifo").words == "no regular file"
    assert identify(tmp_path / "none").words == "missing"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert identify(tmp_path / "loop").words in ("missing", "unreadable (Too many levels of symbolic links)")


def test_nothing_of_a_pickle_runs(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a.pth").write_bytes(pickle.dumps({"x_embedder.proj.weight": Malicious()}))
    assert "SANA denoiser" in identify(tmp_path / "a.pth").words
    assert not (tmp_path / "ran").exists()


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("files", "words", "hint"),
    [
        ((), "an empty folder", "diffusers layout"),
        (("manifest.json", "decoder.onnx"), "an exported folder", "the model that it was made of"),
        (("decoder.onnx",), "without their manifest.json", "copy the whole"),
        (("transformer/config.json",), "transformer/ alone", "--base"),
        (("vae/config.json",), "vae/ alone", "--base"),
        (("vae/a", "transformer/a"), "a part of a model (transformer/, vae/)", "whole"),
        (("config.json", "diffusion_pytorch_model.safetensors"), "one component", "the folder above"),
        (("adapter_config.json", "adapter_model.safetensors"), "the folder of a LoRA", "merge"),
        (("pytorch_lora_weights.safetensors",), "the folder of a LoRA", "merge"),
        (("checkpoints/epoch_1.pth",), "no model folder", "diffusers layout"),
        (("epoch_1.pth",), "a folder of checkpoints (epoch_1.pth)", "sana-edge convert"),
        (("refs/main", "snapshots/a/b"), "a repository of the download cache", "repository's name"),
        (("mine/model_index.json",), "a folder with model folders in it", "mine"),
    ],
)
def test_folders(tmp_path: Path, files: tuple[str, ...], words: str, hint: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    found = identify(touch(folder, *files))
    assert words in found.words and hint in found.hint
    if "manifest.json" not in files:
        with pytest.raises(CheckpointError) as caught:
            hub.resolve(str(folder))
        assert found.words in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize("command", ["generate", "quantize", "export", "models", "convert"])
def test_every_command_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/sana.pth").write_bytes(LFS)
    name = "weights/sana.pth"
    arguments = {
        "generate": ["--prompt", "a", "--model", name],
        "models": ["pull", name],
        "convert": [name, "--output", "out"],
    }
    assert main([command, *arguments.get(command, [name, "--output", "out"])]) == 1
    error = capsys.readouterr().err
    assert "it is a Git LFS pointer, not the file itself\nhint:  `git lfs pull`" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name",
    [
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ],
)
@pytest.mark.parametrize(("content", "words"), [(LFS, "Git LFS pointer"), (PORTAL, "web page")])
def test_files_of_a_model(tiny_folder: Path, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        Sana.load(folder)
    assert name in caught.value.message
    assert caught.value.hint != "download the model again"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_byte_order_marks(tiny_folder: Path, tmp_path: Path, encoding: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    for path in folder.glob("*/*config.json"):
        path.write_text(path.read_text("utf-8"), encoding=encoding)
    assert read_json(folder / "vae/config.json") == read_json(tiny_folder / "vae/config.json")
    with Sana.load(folder) as sana:
        assert sana.native_size == (128, 128)


def test_weights_of_another_name(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    place = folder / "transformer"
    weights = place / "diffusion_pytorch_model.safetensors"
    weights.rename(place / "sana_finetuned.safetensors")
    save_file({"a.lora_A.weight": ZEROS}, place / "pytorch_lora_weights.safetensors")
    Sana.load(folder).close()
    assert sorted(load_state(place)) == sorted(load_state(tiny_folder / "transformer"))
    assert lora_files(folder) == [place / "pytorch_lora_weights.safetensors"]
    (place / "sana_finetuned.safetensors").rename(place / "floral.safetensors")
    Sana.load(folder).close()
    (place / "floral.safetensors").rename(place / "sana_finetuned.safetensors")
    shutil.copy(place / "sana_finetuned.safetensors", place / "sana_older.safetensors")
    with pytest.raises(CheckpointError, match=r"several weights \(sana_finetuned.safetensors, ") as caught:
        Sana.load(folder)
    assert caught.value.hint.endswith("diffusion_pytorch_model.safetensors")


def test_converted_without_a_base(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder / "transformer", tmp_path / "out/transformer")
    assert json.loads((tmp_path / "out/transformer/config.json").read_text())
    with pytest.raises(CheckpointError, match="transformer/ alone, as `sana-edge convert` writes") as caught:
        Sana.load(tmp_path / "out")
    assert "--base" in caught.value.hint
