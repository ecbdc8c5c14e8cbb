"""The package's format: what its config may say, checksums, and tensors that do not agree with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_edge.calib.package_component import write_config, write_weights
from sana_edge.errors import CheckpointError
from sana_edge.int8 import quant
from sana_edge.store import package
from sana_edge.store.package import Quantization
from sana_edge.store.package_tensors import check_tensors, to_16_bit

WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYERS = [("attn.to_q", "attn.to_k"), ("out",), ("head",)]
Q = Quantization(
    activations="token",
    kept=("head",),
    calibration={"prompts": 3, "alpha": "auto"},
    source={"name": "tiny", "checksum": "0" * 64},
    clamp=True,
)


def state() -> dict[str, Tensor]:
    """Two INT8 layers, the first of two modules and with a calibrated input; the rest in 16 bit."""
    tensors = {"norm.weight": torch.randn(4).half(), "head.weight": torch.randn(3, 4).bfloat16()}
    for name in ("attn.to_q", "attn.to_k", "out"):
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = quant.quantize_weight(torch.randn(5, 4))
        tensors[f"{name}.bias"] = torch.randn(5).half()
    tensors["attn.to_q.input_scale"] = torch.tensor(0.25)
    return tensors


def described(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps({**dataclasses.replace(Q, checksum="a" * 64).to_dict(), **changes}))


def test_to_dict_and_back() -> None:
    for quantization in (Q, Quantization(activations="tensor")):
        quantization = dataclasses.replace(quantization, checksum="a" * 64)
        text = json.dumps(quantization.to_dict())
        assert Quantization.from_dict(json.loads(text), where="x") == quantization
        assert ("clamp" in text) == (quantization.clamp is not None)
        assert json.loads(text)["quant_method"] == "sana-edge-w8a8"


WRONG: dict[str, tuple[Any, str, str]] = {
    "no-object": ([], r"is \[\], expected an object", "damaged"),
    "method": (described(quant_method="gptq"), "quant_method is 'gptq', only 'sana-edge-w8a8'", "float"),
    "no-method": ({}, "quant_method is None", "float"),
    "newer": ({"quant_method": package.METHOD, "version": 2}, "version is 2, .* to 1", "upgrade sana-edge"),
    "version-text": (described(version="1"), "version is '1'", "damaged"),
    "version-bool": (described(version=True), "version is True", "damaged"),
    "version-zero": (described(version=0), "version is 0", "damaged"),
    "activations": (described(activations="row"), "activations is 'row', expected 'token' or", "damaged"),
    "activations-list": (described(activations=[]), r"activations is \[\]", "damaged"),
    "kept-text": (described(kept="all"), "kept is 'all', expected a list of names", "damaged"),
    "kept-number": (described(kept=[1]), r"kept is \[1\]", "damaged"),
    "calibration": (described(calibration=[]), r"calibration is \[\], expected an object or null", "damaged"),
    "source": (described(source=None), "source is None, expected an object", "damaged"),
    "clamp": (described(clamp=1), "clamp is 1, expected true or false", "damaged"),
    "checksum": (described(checksum="abc"), "checksum is 'abc', expected 64", "damaged"),
    "checksum-null": (described(checksum=None), "checksum is None", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message", "hint"), WRONG.values(), ids=WRONG)
def test_wrong_configs(data: Any, message: str, hint: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^m/config\.json: quantization_config.*{message}") as caught:
        Quantization.from_dict(data, where="m/config.json")
    assert hint in caught.value.hint


@pytest.mark.parametrize("key", ["version", "activations", "kept", "calibration", "source", "checksum"])
def test_missing_keys(key: str) -> None:
    data = described()
    del data[key]
    with pytest.raises(CheckpointError, match=f"lacks {key}|version is None"):
        Quantization.from_dict(data, where="m/config.json")


def test_keys_of_others_are_ignored() -> None:
    assert Quantization.from_dict(described(comment="x"), where="").kept == ("head",)


def written(folder: Path) -> Quantization:
    write_weights(folder, state().items())
    write_config(folder, {"num_layers": 2}, Q)
    found = package.read(folder)
    assert found is not None
    return found


def test_write_read_verify(tmp_path: Path) -> None:
    folder = tmp_path / "transformer"
    found = written(folder)
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2
    assert found == dataclasses.replace(Q, checksum=found.checksum)
    assert found.checksum == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    package.verify(folder, found)
    assert load_file(folder / WEIGHTS).keys() == state().keys()
    assert package.is_package(tmp_path) and not package.is_package(folder)


def test_a_damaged_checksum_is_refused_by_name(tmp_path: Path) -> None:
    found = written(tmp_path / "vae")
    file = tmp_path / "vae" / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'vae'} have checksum .* says") as caught:
        package.verify(tmp_path / "vae", found)
    assert "sana-edge quantize" in caught.value.hint


def test_the_checksum_covers_all_shards_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in "bac":
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    (tmp_path / "config.json").write_bytes(b"x")
    whole = b"".join((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert package.checksum(tmp_path) == hashlib.sha256(whole).hexdigest()


def test_a_float_component_has_no_quantization(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert package.read(tmp_path / "transformer") is None and not package.is_package(tmp_path)


def test_tensors_that_fit() -> None:
    check_tensors(state(), Q, LAYERS, where="m")
    static = {**state(), "out.input_scale": torch.tensor(1.0)}
    check_tensors(static, dataclasses.replace(Q, activations="tensor"), LAYERS, where="m")


def changed(**changes: Tensor | None) -> dict[str, Tensor]:
    tensors = {**state(), **{key.replace("__", "."): value for key, value in changes.items()}}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def one_scale(value: float) -> Tensor:
    return torch.tensor([1.0, 1.0, value, 1.0, 1.0])


TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "missing-weight": ({"out__weight": None}, "out.weight is missing"),
    "missing-scale": ({"out__weight_scale": None}, "out.weight_scale is missing"),
    "zero": ({"out__weight_scale": one_scale(0)}, "out.weight_scale has 0.0, expected numbers above 0"),
    "negative": ({"out__weight_scale": one_scale(-2)}, "out.weight_scale has -2.0"),
    "nan": ({"attn.to_k__weight_scale": one_scale(torch.nan)}, "attn.to_k.weight_scale has nan"),
    "infinite": ({"out__weight_scale": one_scale(torch.inf)}, "out.weight_scale has inf"),
    "input": ({"attn.to_q__input_scale": torch.tensor(0.0)}, "attn.to_q.input_scale has 0.0"),
    "scale-in-16-bit": ({"out__weight_scale": torch.ones(5).half()}, "out.weight_scale is float16, expected"),
    "float-weight": ({"out__weight": torch.ones(5, 4).half()}, "out.weight is float16, .* does not keep it"),
    "uint8": ({"out__weight": torch.ones(5, 4, dtype=torch.uint8)}, "out.weight is uint8"),
    "kept-in-int8": ({"head__weight": torch.ones(3, 4).char()}, "head.weight is int8, .* keeps it"),
    "float8": ({"norm__weight": torch.ones(4).to(torch.float8_e4m3fn)}, "norm.weight is float8_e4m3fn"),
    "int8-elsewhere": ({"norm__weight": torch.ones(4).char()}, "norm.weight is int8, expected 16 bit"),
    "stray-scale": ({"norm__weight_scale": torch.ones(4)}, "norm.weight_scale belongs to no INT8 module"),
    "second-input-scale": ({"attn.to_k__input_scale": torch.ones(())}, "attn.to_k.input_scale belongs to no"),
}


@pytest.mark.parametrize(("changes", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(changes: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: {message}"):
        check_tensors(changed(**changes), Q, LAYERS, where="m")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": ()}, "head.weight is bfloat16, but config.json does not keep it"),
        ({"kept": ("head", "out")}, "out.weight is int8, but config.json keeps it"),
        ({"kept": ("head", "norm")}, "config.json keeps norm, which no package has in INT8"),
        ({"kept": ("head", "attn.to_k")}, "of attn.to_q, attn.to_k config.json keeps only attn.to_k"),
        ({"activations": "tensor"}, "out.input_scale is missing"),
    ],
    ids=["too-short", "too-long", "stranger", "half-a-layer", "not-calibrated"],
)
def test_configs_that_do_not_fit_the_tensors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^m: {message}"):
        check_tensors(state(), dataclasses.replace(Q, **changes), LAYERS, where="m")


def test_to_16_bit() -> None:
    for value, dtype in (
        (1.0, torch.float16),
        (0.0, torch.float16),
        (1e5, torch.bfloat16),
        (1e-6, torch.bfloat16),
    ):
        assert to_16_bit(torch.tensor([value, value / 2])).dtype == dtype
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        tensor = torch.ones(3, dtype=dtype)
        assert to_16_bit(tensor) is tensor


def test_a_hole_behind_the_weights_is_not_read(tmp_path: Path) -> None:
    """A terabyte, which takes no room on the disk."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    package.digest([path])
    for size in (1 << 40, path.stat().st_size - 1):
        os.truncate(path, size)
        with pytest.raises(CheckpointError, match="more or less than its header says"):
            package.digest([path])


@pytest.mark.parametrize("depth", [1, 940, 980])
def test_nested_values_are_shown_in_a_line(depth: int) -> None:
    """Python reads lists that it can hardly write."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    good = {**Q.to_dict(), "checksum": "0" * 64}
    for data in (value, *({**good, key: value} for key in ("quant_method", "version", "kept", "checksum"))):
        with pytest.raises(CheckpointError) as caught:
            Quantization.from_dict(data, where="config.json")
        assert len(caught.value.message) < 200
