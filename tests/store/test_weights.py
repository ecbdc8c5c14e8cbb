"""Reading and writing weights: what diffusers writes, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.store.folder import component_variant, needed_files, weight_entries
from sana_edge.store.weights import StoredState, load_into, load_state, needs_clamp, save_state

STEM = "diffusion_pytorch_model"


def denoiser(seed: int = 0) -> SanaTransformer2DModel:
    torch.manual_seed(seed)
    return SanaTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=32,
        cross_attention_dim=64,
        caption_channels=24,
        sample_size=4,
    )


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(state) == sorted(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("shard", ["10GB", "100KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("variant", [None, "fp16", "bf16"])
def test_what_diffusers_writes(tmp_path: Path, shard: str, variant: str | None) -> None:
    dtype = {None: torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[variant]
    model = denoiser().to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard, variant=variant)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    assert_equal(load_state(tmp_path, variant=variant), model.state_dict())
    # the only variant there is needs no name
    assert_equal(load_state(tmp_path), model.state_dict())


def test_variants_side_by_side(tmp_path: Path) -> None:
    plain, half = denoiser(1), denoiser(2).half()
    plain.save_pretrained(tmp_path, max_shard_size="100KB")
    half.save_pretrained(tmp_path, variant="fp16")
    assert_equal(load_state(tmp_path), plain.state_dict())
    assert_equal(load_state(tmp_path, variant="fp16"), half.state_dict())
    with pytest.raises(CheckpointError, match="has no bf16 weights") as caught:
        load_state(tmp_path, variant="bf16")
    assert caught.value.hint == "there are: fp16, without a variant"


def test_no_weights_without_a_variant(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        denoiser().save_pretrained(tmp_path, variant=variant)
    with pytest.raises(CheckpointError, match="has no weights without a variant") as caught:
        load_state(tmp_path)
    assert caught.value.hint == "there are: bf16, fp16"


def test_single_file_beside_shards_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    denoiser(1).save_pretrained(tmp_path, max_shard_size="100KB")
    save_file(denoiser(2).state_dict(), tmp_path / f"{STEM}.safetensors")
    theirs = SanaTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert_equal(load_state(tmp_path), theirs)


@pytest.mark.parametrize("index", ["index.fp16.json", "fp16.index.json"], ids=["new", "old"])
def test_names_of_indexes(index: str) -> None:
    assert weight_entries([f"{STEM}.safetensors.{index}"]) == {"fp16": f"{STEM}.safetensors.{index}"}


def test_transformers_takes_the_single_file() -> None:
    names = ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors"]
    assert weight_entries(names) == {None: "model.safetensors"}


def test_component_variant() -> None:
    both = [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors"]
    assert component_variant(both, None) == "fp16"
    assert component_variant([*both, f"{STEM}.bf16.safetensors"], None) == "bf16"
    assert component_variant(both, "fp16") == "fp16"
    assert component_variant(both, "bf16") is None
    assert component_variant(both[1:], "bf16") == "fp16"


def test_needed_files_skip_the_other_variants() -> None:
    shards = [f"text_encoder/model{v}-0000{i}-of-00002.safetensors" for v in ("", ".fp16") for i in (1, 2)]
    names = [
        *("README.md", "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json"),
        *("tokenizer/tokenizer.json", "tokenizer/tokenizer.model", "transformer/config.json"),
        *shards,
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.safetensors.index.fp16.json",
        f"transformer/{STEM}.bin",
        f"transformer/{STEM}.safetensors",
    ]
    assert needed_files(names, "fp16") == [
        *("model_index.json", "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"),
        *("transformer/config.json", f"transformer/{STEM}.safetensors", "text_encoder/config.json"),
        *shards[2:],
        "text_encoder/model.safetensors.index.fp16.json",
    ]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    denoiser().save_pretrained(folder, max_shard_size="100KB")
    return folder


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "model")
    gone = sorted(folder.glob("*-00002-of-*"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"lacks the shard {gone.name}"):
        load_state(folder)


def test_shards_that_do_not_fit_together(sharded: Path, tmp_path: Path) -> None:
    """What two of them have; and without their index."""
    folder = shutil.copytree(sharded, tmp_path / "model")
    first, second, *_ = sorted(folder.glob("*-of-*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor * 0}, second)
    for read in (load_state, StoredState):
        with pytest.raises(CheckpointError, match=f"{second.name} has {name}, which another shard"):
            read(folder)
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match="shards, but not their index"):
        load_state(folder)


def test_what_has_to_be_converted_first(tmp_path: Path) -> None:
    """Weights and their average in one file; FP8 with scales."""
    state = {name: tensor.contiguous() for name, tensor in denoiser().state_dict().items()}
    both = {f"{prefix}.{name}": tensor + 0 for prefix in ("model", "ema") for name, tensor in state.items()}
    save_file(both, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match="holds several networks") as caught:
        load_state(tmp_path)
    assert "sana-edge convert" in caught.value.hint
    name = next(name for name in state if name.endswith("to_q.weight"))
    for other in ("scale_weight", "weight_scale"):
        scale = {name.replace("weight", other): torch.ones(1)}
        fp8 = {name: state[name].to(torch.float8_e4m3fn)}
        save_file({**state, **fp8, **scale}, tmp_path / f"{STEM}.safetensors")
        for read in (load_state, StoredState):
            with pytest.raises(CheckpointError, match="FP8 weights with scales") as caught:
                read(tmp_path)
            assert "sana-edge convert" in caught.value.hint


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.safetensors"}}']
)
def test_damaged_index(sharded: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(sharded, tmp_path / "model")
    index = next(folder.glob("*.index.json"))
    index.write_text(content)
    with pytest.raises(CheckpointError, match=index.name):
        load_state(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    file = tmp_path / f"{STEM}.safetensors"
    save_state(denoiser().state_dict(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=rf"cannot read .*{STEM}\.safetensors \({file.stat().st_size} bytes\)"
    ):
        load_state(tmp_path)


@pytest.mark.parametrize("start", [0, 8, 40])
def test_corrupt_header(tmp_path: Path, start: int) -> None:
    file = tmp_path / f"{STEM}.safetensors"
    save_state(denoiser().state_dict(), file)
    data = bytearray(file.read_bytes())
    data[start : start + 16] = b"\xff" * 16
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"cannot read .*{STEM}"):
        load_state(tmp_path)


@pytest.mark.parametrize("name", [f"{STEM}.bin", "Sana_600M_1024px.pth", "model.ckpt"])
def test_pickles_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"only pickled weights .*{name}") as caught:
        load_state(tmp_path)
    assert "sana-edge convert" in caught.value.hint


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no \.safetensors weights"):
        load_state(tmp_path)
    with pytest.raises(CheckpointError, match="nothing is missing"):
        load_state(tmp_path / "nothing")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))


def test_load_into_takes_the_tensors(tmp_path: Path) -> None:
    state = {key: tensor.bfloat16() for key, tensor in network().state_dict().items()}
    with torch.device("meta"):
        module = network()
    load_into(module, state, where="here")
    assert module[0].weight.dtype == torch.bfloat16
    assert module[0].weight.data_ptr() == state["0.weight"].data_ptr()
    assert module[0].weight.requires_grad


def test_load_into_names_what_does_not_fit() -> None:
    state = network().state_dict()
    state["2.weight"] = state.pop("1.weight")
    state["0.bias"] = torch.zeros(6)
    with pytest.raises(CheckpointError) as caught:
        load_into(network(), state, where="vae")
    assert caught.value.message == (
        "vae does not fit its config: 1 missing keys (1.weight); 1 unexpected keys (2.weight); "
        "1 wrong shapes (0.bias is (6,), expected (5,))"
    )


def test_load_into_counts_many_keys() -> None:
    with pytest.raises(CheckpointError, match=r"5 unexpected keys \(x0, x1, x2, \.\.\.\)"):
        load_into(
            network(), {**network().state_dict(), **{f"x{i}": torch.zeros(1) for i in range(5)}}, where="a"
        )


def test_save_state_keeps_every_tensor(tmp_path: Path) -> None:
    table = torch.arange(24.0).view(4, 6)
    state = {
        "whole": table,
        "same": table,
        "transposed": table.t(),
        "half": table[:2],
        "bf16": table.bfloat16(),
    }
    save_state(state, tmp_path / "new" / "a.safetensors", {"note": "x"})
    assert_equal(load_file(tmp_path / "new" / "a.safetensors"), state)
    header = (tmp_path / "new" / "a.safetensors").read_bytes()
    metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    assert metadata == {"format": "pt", "note": "x"}
    assert os.listdir(tmp_path / "new") == ["a.safetensors"]


def test_save_state_is_whole_or_not_at_all(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "a.safetensors"
    save_state({"a": torch.zeros(3)}, file)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(SanaError, match=r"cannot write .*a\.safetensors"):
            save_state({"a": torch.ones(100_000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_equal(load_state_file(file), {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(SanaError, match="cannot write"):
        save_state({"a": torch.zeros(3)}, file / "b.safetensors")


def load_state_file(file: Path) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("dtype", "qk_norm", "clamp"),
    [
        (torch.float16, None, True),
        (torch.float32, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, "rms_norm_across_heads", False),
        (torch.float32, "rms_norm_across_heads", False),
    ],
)
def test_needs_clamp(dtype: torch.dtype, qk_norm: str | None, clamp: bool) -> None:
    assert needs_clamp(DenoiserConfig(qk_norm=qk_norm), {"a": torch.zeros(1, dtype=dtype)}) == clamp


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "transformer.module."])
def test_prefixes_in_a_components_folder(tmp_path: Path, prefix: str) -> None:
    """As `save_pretrained` of a compiled or wrapped model writes them."""
    model = denoiser()
    save_file({f"{prefix}{k}": t for k, t in model.state_dict().items()}, tmp_path / f"{STEM}.safetensors")
    assert_equal(load_state(tmp_path), model.state_dict())
    assert_equal(dict(StoredState(tmp_path)), model.state_dict())


def test_weights_that_have_to_be_converted(tmp_path: Path) -> None:
    save_file({"model.x_embedder.proj.weight": torch.zeros(2)}, tmp_path / f"{STEM}.safetensors")
    for read in (load_state, StoredState):
        with pytest.raises(CheckpointError, match="a SANA denoiser in its authors' names") as caught:
            read(tmp_path)
        assert f"sana-edge convert {tmp_path}" in caught.value.hint


def test_another_container_under_the_name(tmp_path: Path) -> None:
    torch.save({"a.b": torch.zeros(2)}, tmp_path / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match="it is a checkpoint of torch"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("F4", 4), ("F6_E2M3", 6), ("BOOL", 8), ("Q8", 8), ("U16", 16), ("I64", 64), ("C64", 64)],
)
def test_numbers_that_no_weight_has(tmp_path: Path, dtype: str, bits: int) -> None:
    content = bytes(16 * bits // 8)
    entry = {"dtype": dtype, "shape": [4, 4], "data_offsets": [0, len(content)]}
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + content)
    with pytest.raises(CheckpointError):
        load_into(nn.Linear(4, 4, bias=False), load_state(tmp_path), where="here")
    with pytest.raises(CheckpointError):
        load_into(nn.Linear(4, 4, bias=False), StoredState(tmp_path), where="here")


def test_a_header_of_blanks_is_refused(tmp_path: Path) -> None:
    """It is read anew with each tensor."""
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    length, blanks = int.from_bytes(content[:8], "little"), 9 << 20
    whole = (length + blanks).to_bytes(8, "little") + content[8 : 8 + length] + b" " * blanks + content[-4:]
    (tmp_path / "model.safetensors").write_bytes(whole)
    for read in (load_state, StoredState):
        with pytest.raises(CheckpointError, match=r"its header has \d+ bytes, at most 8388608 are read"):
            read(tmp_path)


def test_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    save_file({f"a.{number}": torch.zeros(0) for number in range(5000)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="has more than 4096 tensors"):
        StoredState(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode alone")
def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """As a folder of an old machine may have: safetensors takes UTF-8."""
    folder = tmp_path / os.fsdecode(b"T\xe9l\xe9chargements")
    folder.mkdir()
    save_file({"weight": torch.arange(3.0)}, tmp_path / "one.safetensors")
    (tmp_path / "one.safetensors").rename(folder / "model.safetensors")
    assert load_state(folder)["weight"].tolist() == [0, 1, 2]
    stored = StoredState(folder)
    assert stored["weight"].tolist() == [0, 1, 2] and stored.shape("weight") == (3,)
