"""One network out of what trainings and programs save: nesting, prefixes, averages, and objects beside it."""

from __future__ import annotations

import argparse
import collections
import copy
import io
import pickle
import random
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sana_edge.errors import CheckpointError, InvalidInput
from sana_edge.store.checkpoint import read_checkpoint
from sana_edge.store.weights import StoredState, load_state

NAMES = ("x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "pos_embed")


def network(value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full((3, 4), value + i) for i, name in enumerate(NAMES)}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def write(folder: Path, content: Any, **options: Any) -> Path:
    torch.save(content, folder / "a.pth", **options)
    return folder / "a.pth"


def assert_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def training(**more: Any) -> dict[str, Any]:
    """As NVlabs' trainer saves, random states included."""
    rng = {
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": [torch.get_rng_state()],
        "step": np.float64(3.5),
    }
    moments = {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}
    return {
        "state_dict": network(),
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(work_dir=Path("runs"), lr=np.float32(1e-4)),
        "rng_state": rng,
        **more,
    }


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_a_training_checkpoint(tmp_path: Path, old: bool) -> None:
    content = training(state_dict_ema=network(2.0))
    file = write(tmp_path, content, _use_new_zipfile_serialization=not old)
    found = read_checkpoint(file)
    assert_state(found.state, network(2.0))
    (note,) = found.notes
    assert note == "the EMA weights are taken (state_dict_ema); --weights raw takes state_dict"
    raw = read_checkpoint(file, "raw")
    assert_state(raw.state, network())
    assert raw.notes == ("the raw weights are taken (state_dict); --weights ema takes state_dict_ema",)


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    file = write(tmp_path, training())
    assert read_checkpoint(file).notes == ()
    with pytest.raises(InvalidInput, match="has no ema weights") as caught:
        read_checkpoint(file, "ema")
    assert "choose raw" in caught.value.hint
    file = write(tmp_path, {"ema": network()})
    assert "there are no others" in read_checkpoint(file).notes[0]
    with pytest.raises(InvalidInput, match="has no raw weights"):
        read_checkpoint(file, "raw")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "_orig_mod.",
        "model.",
        "base_model.",
        "base_model.model.",
        "model.diffusion_model.",
        "module._orig_mod.model.",
        "_fsdp_wrapped_module.",
        "net.transformer.",
    ],
)
@pytest.mark.parametrize("keys", [(), ("state_dict",), ("ema",), ("model",), ("generator", "model")], ids=str)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes(tmp_path: Path, prefix: str, keys: tuple[str, ...], suffix: str) -> None:
    content: Any = under(prefix, network())
    if suffix == ".pth":
        for key in reversed(keys):
            content = {key: content, "step": 7}
        file = write(tmp_path, content)
    else:
        file = tmp_path / "a.safetensors"
        save_file(under(f"{'.'.join(keys)}." if keys else "", content), file)
    assert_state(read_checkpoint(file).state, network())


def test_wrappers_inside_of_names(tmp_path: Path) -> None:
    inside = {name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in network().items()}
    assert_state(read_checkpoint(write(tmp_path, inside)).state, network())


def test_the_taught_network_is_taken(tmp_path: Path) -> None:
    content = {"fake_score": network(5.0), "generator": network(), "teacher": {"model": network(6.0)}}
    found = read_checkpoint(write(tmp_path, content))
    assert_state(found.state, network())
    assert found.notes[0].startswith("generator is taken of several networks of this kind; left out: ")


def test_counters_beside_a_bare_state(tmp_path: Path) -> None:
    content = {**network(), "epoch": 3, "global_step": torch.tensor(7), "rng": torch.get_rng_state()}
    assert_state(read_checkpoint(write(tmp_path, content)).state, network())


def test_an_average_inside_of_the_same_dictionary(tmp_path: Path) -> None:
    content = {**under("model.", network()), **under("model_ema.", network(2.0))}
    file = write(tmp_path, {"state_dict": content})
    assert_state(read_checkpoint(file).state, network(2.0))
    assert_state(read_checkpoint(file, "raw").state, network())


def test_one_file_with_the_autoencoder(tmp_path: Path) -> None:
    vae = {"vae.decoder.project_in.conv.weight": torch.zeros(2)}
    found = read_checkpoint(write(tmp_path, {**under("model.diffusion_model.", network()), **vae}))
    assert_state(found.state, network())
    assert found.notes == ("its autoencoder is not taken, only its denoiser",)


def test_objects_of_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packages that are not installed, stood in for by something that does nothing."""
    module = types.ModuleType("omegaconf.dictconfig")
    more: dict[str, object] = {"counts": collections.defaultdict(list, a=[1])}
    for name, bases in (("DictConfig", ()), ("EasyDict", (dict,))):
        kind = type(name, bases, {"__module__": module.__name__})
        setattr(module, name, kind)
        more[name] = kind()
    more["DictConfig"].__dict__["content"] = more["EasyDict"]
    more["EasyDict"]["lr"] = 1e-4  # type: ignore[index]
    more["EasyDict"].__dict__["lr"] = 1e-4
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    file = write(tmp_path, training(**more))
    monkeypatch.undo()
    assert_state(read_checkpoint(file).state, network())


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("old", [False, True], ids=["zip", "legacy"])
def test_code_is_refused(tmp_path: Path, old: bool) -> None:
    content = training(callback=Runs(tmp_path / "ran"))
    file = write(tmp_path, content, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.pth") as caught:
        read_checkpoint(file)
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message
    assert "it holds builtins.exec, which is no tensor" in caught.value.message
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle(tmp_path: Path) -> None:
    file = io.BytesIO()
    pickle.dump({"x_embedder.proj.weight": [1.0]}, file)
    (tmp_path / "a.pth").write_bytes(file.getvalue())
    with pytest.raises(CheckpointError, match=r"a\.pth"):
        read_checkpoint(tmp_path / "a.pth")


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_fp8_is_read_as_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 7).to(dtype)
    save_file({"a": weight, "b": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    for state in (load_state(tmp_path), StoredState(tmp_path)):
        assert state["a"].dtype == torch.float32 and torch.equal(state["a"], weight.float())
        assert state["b"].dtype == torch.bfloat16


def test_scaled_fp8(tmp_path: Path) -> None:
    """Files whose weights are to be multiplied by scales beside them."""
    state: dict[str, Tensor] = network()
    weight = torch.randn(6, 2).to(FLOAT8[0])
    state["blocks.0.attn.qkv.weight"] = weight
    extra = {"blocks.0.attn.qkv.scale_weight": torch.tensor(0.5), "scaled_fp8": torch.zeros(2)}
    save_file({**state, **extra}, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors").state
    assert sorted(found) == sorted(state)
    assert torch.equal(found["blocks.0.attn.qkv.weight"], (weight.float() * 0.5).bfloat16())


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)], ids=str)
def test_scaled_fp8_by_its_newer_names(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """One scale, or one for each row, called as a package's are."""
    state: dict[str, Tensor] = network()
    weight, name = torch.randn(6, 2).to(FLOAT8[0]), "blocks.0.attn.qkv"
    scale = torch.rand(shape) + 0.5
    extra = {f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(2.0)}
    extra |= {f"{name}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}
    save_file({**state, f"{name}.weight": weight, **extra}, tmp_path / "a.safetensors")
    found = read_checkpoint(tmp_path / "a.safetensors").state
    assert sorted(found) == sorted(state)
    rows = scale.reshape(-1, 1)
    assert torch.equal(found[f"{name}.weight"], (weight.float() * rows).bfloat16())


def test_scales_of_blocks_are_refused(tmp_path: Path) -> None:
    weight, name = torch.randn(6, 2).to(FLOAT8[0]), "blocks.0.attn.qkv"
    extra = {f"{name}.weight": weight, f"{name}.weight_scale": torch.ones(3, 2)}
    save_file({**network(), **extra}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"is \[6, 2\] in FP8, its scale \[3, 2\]") as caught:
        read_checkpoint(tmp_path / "a.safetensors")
    assert "16 bit" in caught.value.hint


def test_no_sana(tmp_path: Path) -> None:
    for content in ({"unet.conv_in.weight": torch.zeros(1)}, {}, [1, 2], torch.zeros(3)):
        with pytest.raises(CheckpointError, match="holds no SANA denoiser and no DC-AE"):
            read_checkpoint(write(tmp_path, content))
    lora = {"x_embedder.proj.weight": torch.zeros(2), "blocks.0.attn.qkv.lora_A.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="LoRA layers that are not merged") as caught:
        read_checkpoint(write(tmp_path, lora))
    assert "merge it" in caught.value.hint


def test_a_whole_model_has_parts(tiny_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="several parts") as caught:
        read_checkpoint(tiny_folder)
    assert caught.value.hint == f"give one: {tiny_folder / 'transformer'}"


def test_the_content_tells_the_container(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "a.safetensors")
    save_file(network(), tmp_path / "b.ckpt")
    for name in ("a.safetensors", "b.ckpt"):
        assert_state(read_checkpoint(tmp_path / name).state, network())


ODD: dict[str, tuple[object, str]] = {
    "meta": (torch.empty(3, 4, device="meta"), "without values"),
    "sparse": (torch.eye(4).to_sparse(), "sparse_coo"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("tensor", "message"), ODD.values(), ids=ODD)
def test_tensors_that_are_not_plain(tmp_path: Path, tensor: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(write(tmp_path, {**network(), "blocks.0.odd": tensor}))


def test_keys_that_are_no_names(tmp_path: Path) -> None:
    odd = {1: torch.ones(2), None: torch.ones(2), ("a",): {"b": torch.ones(2)}, 2.5: 3}
    assert_state(read_checkpoint(write(tmp_path, {**network(), **odd})).state, network())


def test_a_bit_that_flipped(tmp_path: Path) -> None:
    file = write(tmp_path, network())
    content = bytearray(file.read_bytes())
    # of a weight's value
    content[content.index(torch.full((3,), 1.0).numpy().tobytes()) + 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"its part .*data/0 is damaged: Bad CRC-32"):
        read_checkpoint(file)


def test_a_file_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        file = write(tmp_path, network())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_state(read_checkpoint(file).state, network())


def test_a_part_that_is_compressed(tmp_path: Path) -> None:
    file = write(tmp_path, network())
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed: save it again"):
        read_checkpoint(tmp_path / "b.pth")


def test_one_value_that_stands_for_many(tmp_path: Path) -> None:
    """Of which a converted model would have to write each."""
    path = tmp_path / "small.pth"
    torch.save({"x_embedder.proj.weight": torch.zeros(1).expand(100_000, 100_000)}, path)
    with pytest.raises(CheckpointError, match="more than 4 times the file"):
        read_checkpoint(path)


def test_parts_that_lie_in_one_another(tmp_path: Path) -> None:
    """A file of some megabytes would be read for hours."""
    path = write(tmp_path, {"x": torch.zeros(1000)})
    with zipfile.ZipFile(path) as archive:
        part = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [copy.copy(part) for _ in range(100)]
        archive._didModify = True  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="lie in one another"):
        read_checkpoint(path)


@pytest.mark.parametrize("step", [b"N0", b"\x8c\x000"], ids=["none", "text"])
def test_a_pickle_of_a_million_steps(tmp_path: Path, step: bytes) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"\x80\x04" + step * (1 << 20) + b"N.")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert "more than 1048576 steps" in caught.value.message


def test_an_archive_of_too_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana_edge.store.headers._PARTS", 10)
    path = write(tmp_path, {f"x.{number}": torch.zeros(1) for number in range(20)})
    with pytest.raises(CheckpointError, match="more than 10 parts"):
        read_checkpoint(path)
