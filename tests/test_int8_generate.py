"""INT8 for users: `--int8`, packages written and loaded, how close to float, and packages that are wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sana_edge import CheckpointError, OutOfMemory, Sana, read_metadata
from sana_edge.calib.package_component import write_config, write_weights
from sana_edge.cli.main import main
from sana_edge.image_metrics import psnr
from sana_edge.nets.text_weights import quantize_text_state
from sana_edge.store import catalogue, hub, package
from sana_edge.store.folder import read_json
from sana_edge.store.hub import ResolvedModel
from sana_edge.store.known_models import BUNDLED
from sana_edge.store.package import KEY, Quantization
from sana_edge.store.package_tensors import is_scale, to_16_bit
from sana_edge.torch_runtime import load, memory
from sana_edge.torch_runtime.device import DTYPES
from sana_edge.torch_runtime.load import load_decoder, load_denoiser

Capture = pytest.CaptureFixture[str]
PROMPT = "a red house left of a yellow star"
CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"
NOTE = "quantized while loading, without calibration"


def stored(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor if is_scale(name) else to_16_bit(tensor) for name, tensor in state.items()}


def write_package(source: Path, target: Path, *, clamp: bool | None = None) -> Path:
    """What `Sana.load(source, int8=True)` has in memory, as a package."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("transformer", "vae", "text_encoder"))
    model = ResolvedModel(source, "source")
    denoiser, dtype = load_denoiser(model, device=CPU, dtype="auto", int8=True)
    decoder = load_decoder(model, device=CPU, dtype=DTYPES[dtype], int8=True)
    clamp = denoiser.clamp if clamp is None else clamp
    states = {
        "transformer": (denoiser.to_diffusers(), Quantization("token", clamp=clamp)),
        "vae": (decoder.state_dict(), Quantization("token")),
        "text_encoder": (dict(quantize_text_state(source / "text_encoder")), Quantization("token")),
    }
    for name, (state, quantization) in states.items():
        config = read_json(source / name / "config.json")
        write_weights(target / name, stored(state).items())
        write_config(target / name, config, quantization)
    return target


@pytest.fixture(scope="module")
def tiny_package(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tiny_folder, tmp_path_factory.mktemp("packages") / "tiny-int8")


@pytest.fixture
def copy(tiny_package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_package, tmp_path / "copy")


def generate(model: Path | str, *arguments: str) -> int:
    return main(["generate", "--prompt", PROMPT, "--steps", "2", "--model", str(model), *arguments])


def picture(model: Path | str, *, int8: bool = False, steps: int = 2, seed: int = 7) -> Any:
    with Sana.load(str(model), device="cpu", int8=int8) as sana:
        return sana.generate(PROMPT, seed=seed, steps=steps)


def test_int8_while_loading_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(tiny_folder, "--int8", "--seed", "3", "--images", "2", "--json") == 0
    out, err = capsys.readouterr()
    assert err.count(NOTE) == 1 and "sana-edge quantize" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["seed"] for line in lines] == [3, 4]
    for line in lines:
        assert len(line["notes"]) == 1 and line["notes"][0].startswith(NOTE)
        assert read_metadata(line["path"])["quantization"] == line["quantization"] == "w8a8, per token"
    assert generate(tiny_folder, "--int8", "--seed", "3", "--quiet", "--output", "again.png") == 0
    assert capsys.readouterr().err == ""
    assert Path("again.png").read_bytes() == Path(lines[0]["path"]).read_bytes()


def test_float_pictures_do_not_speak_of_it(tiny_folder: Path) -> None:
    assert "quantization" not in picture(tiny_folder).metadata


def test_the_library_says_it_in_its_log(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sana_edge"):
        made = picture(tiny_folder, int8=True)
    assert len(made.notes) == 1 and made.notes[0] in caplog.text


@pytest.mark.parametrize("int8", [False, True])
def test_a_package_is_int8_with_or_without_asking(tiny_package: Path, tiny_folder: Path, int8: bool) -> None:
    made = picture(tiny_package, int8=int8)
    assert made.notes == () and made.metadata["quantization"] == "w8a8, per token"
    assert np.array_equal(made.pixels, picture(tiny_folder, int8=True).pixels)
    # that it is not the float picture shows that something was INT8
    assert not np.array_equal(made.pixels, picture(tiny_folder).pixels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_packages_of_16_bit_models(
    tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "computes_bf16", lambda: True)
    source = shutil.copytree(tiny_folder, tmp_path / "half")
    for name in ("transformer", "vae"):
        file = source / name / WEIGHTS
        save_file({key: value.to(dtype) for key, value in load_file(file).items()}, file)
    made = picture(write_package(source, tmp_path / "package"))
    assert made.metadata["dtype"] == ("fp32" if dtype == torch.float16 else "bf16")
    assert np.array_equal(made.pixels, picture(source, int8=True).pixels)


def test_a_sprint_package(tiny_sprint_folder: Path, tmp_path: Path) -> None:
    made = picture(write_package(tiny_sprint_folder, tmp_path / "package"))
    assert np.array_equal(made.pixels, picture(tiny_sprint_folder, int8=True).pixels)


@pytest.mark.parametrize("clamp", [False, True])
def test_the_clamp_survives_packaging(tiny_folder: Path, tmp_path: Path, clamp: bool) -> None:
    folder = write_package(tiny_folder, tmp_path / "package", clamp=clamp)
    with Sana.load(str(folder), device="cpu") as sana:
        assert sana._runtime is not None and sana._runtime.denoiser.clamp == clamp


def test_what_runs_once_stays_in_16_bit(tiny_package: Path) -> None:
    model = ResolvedModel(tiny_package, "tiny")
    denoiser, dtype = load_denoiser(model, device=CPU, dtype="auto")
    assert dtype == "fp32"
    state = denoiser.state_dict()
    for name in ("modulate", "caption_expand", "caption_mix", "time.expand", "blocks.1.cross_kv"):
        assert state[f"{name}.weight"].dtype == torch.float16, name
    for name in ("qkv", "out", "cross_q", "cross_out", "expand", "project"):
        assert state[f"blocks.1.{name}.weight"].dtype == torch.int8, name
    # what every step computes with is cast once, not in every step
    assert state["blocks.1.depthwise.weight"].dtype == state["head.weight"].dtype == torch.float32


def test_sana_tiny_in_int8_is_close_to_float() -> None:
    """At least 35 dB: measured 41 to 46 dB (6 to 20 steps, three seeds), and an error twice as large is 6 dB.

    Below 60 dB, or nothing was quantized: a difference of one level in every tenth value is 58 dB.
    """
    folder = str(BUNDLED / "sana-tiny")
    with Sana.load(folder, device="cpu") as exact, Sana.load(folder, device="cpu", int8=True) as int8:
        for seed in (7, 8):
            made = int8.generate(PROMPT, seed=seed, steps=6)
            assert 35 <= psnr(made.pixels, exact.generate(PROMPT, seed=seed, steps=6).pixels) < 60
        assert int8.generate(PROMPT, seed=8, steps=6).png() == made.png()


def test_a_size_that_cannot_fit_is_refused(tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sana.load(str(tiny_package), device="cpu", dtype="bf16") as sana:
        monkeypatch.setattr(memory, "available_memory", lambda _: 100_000_000)
        with pytest.raises(OutOfMemory, match="8192x8192 needs about"):
            sana.stream(PROMPT, size=(8192, 8192))
        assert sana.generate(PROMPT, steps=1).metadata["dtype"] == "bf16"


def test_a_bundled_name_takes_its_package(
    tiny_folder: Path, tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "small")
    shutil.copytree(tiny_folder, tmp_path / "alone")
    shutil.copytree(tiny_package, tmp_path / "small-int8")
    monkeypatch.setattr(catalogue, "BUNDLED", tmp_path)
    assert hub.resolve("small").path == tmp_path / "small"
    for name in ("small", "small-int8"):
        found = hub.resolve(name, int8=True)
        assert (found.path, found.name) == (tmp_path / "small-int8", "small-int8")
    assert hub.resolve("alone", int8=True).path == tmp_path / "alone"
    assert main(["models"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[:3]] == ["alone", "small", "small-int8"]
    made = picture("small", int8=True)
    assert (made.metadata["model"], made.notes) == ("small-int8", ())


def edit_config(folder: Path, component: str, **changes: Any) -> None:
    path = folder / component / "config.json"
    content = read_json(path)
    content[KEY] = {**content[KEY], **changes}
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, component: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors, with a checksum that fits what is there then."""
    state = load_file(folder / component / WEIGHTS)
    change(state)
    save_file(state, folder / component / WEIGHTS)
    edit_config(folder, component, checksum=package.checksum(folder / component))


def assert_refused(folder: Path, capsys: Capture, message: str, hint: str = "") -> None:
    assert generate(folder, "--output", str(folder.parent / "never.png")) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert message in err.splitlines()[0] and hint in err
    assert not (folder.parent / "never.png").exists()


TO_OUT = "transformer_blocks.1.attn1.to_out.0"
CONV = "decoder.up_blocks.2.1.conv1"


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_a_package_of_a_newer_version(copy: Path, capsys: Capture, component: str) -> None:
    edit_config(copy, component, version=2)
    assert_refused(copy, capsys, f"{component}/config.json: {KEY}: version is 2", "upgrade sana-edge")


def test_another_method(copy: Path, capsys: Capture) -> None:
    edit_config(copy, "transformer", quant_method="bitsandbytes")
    assert_refused(copy, capsys, "quant_method is 'bitsandbytes'", "float model")


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_damaged_weights(copy: Path, capsys: Capture, component: str) -> None:
    file = copy / component / WEIGHTS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert_refused(copy, capsys, f"the weights in {copy / component} have checksum", "quantize")


def test_int8_weights_without_a_word_in_the_config(copy: Path, capsys: Capture) -> None:
    path = copy / "transformer" / "config.json"
    content = read_json(path)
    del content[KEY]
    path.write_text(json.dumps(content))
    assert_refused(copy, capsys, f"{copy / 'transformer'} has INT8 weights", "quantize")


def test_a_transformer_that_does_not_say_whether_to_clamp(copy: Path, capsys: Capture) -> None:
    edit_config(copy, "transformer", clamp=None)
    assert_refused(copy, capsys, "transformer/config.json: quantization_config lacks clamp")


CHANGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "missing-scale": (
        "transformer", lambda s: s.pop(f"{TO_OUT}.weight_scale"), f"{TO_OUT}.weight_scale is missing"
    ),
    "zero-scale": (
        "transformer",
        lambda s: s[f"{TO_OUT}.weight_scale"][3].zero_(),
        f"{TO_OUT}.weight_scale has values that",
    ),
    "negative-scale": (
        "vae", lambda s: s[f"{CONV}.weight_scale"][3].neg_(), f"{CONV}.weight_scale has values that"
    ),
    "nan-scale": (
        "vae", lambda s: s[f"{CONV}.weight_scale"].fill_(torch.nan), f"{CONV}.weight_scale has NaN"
    ),
    "shape": (
        "transformer",
        lambda s: s.update({f"{TO_OUT}.weight": s[f"{TO_OUT}.weight"][:, :-1].clone()}),
        f"{TO_OUT}.weight is",
    ),
    "scale-shape": (
        "transformer",
        lambda s: s.update({f"{TO_OUT}.weight_scale": torch.ones(1)}),
        f"{TO_OUT}.weight_scale is",
    ),
    "conv-shape": (
        "vae", lambda s: s.update({f"{CONV}.weight": s[f"{CONV}.weight"][:-1].clone()}), f"{CONV}.weight is"
    ),
    "conv-scale-shape": (
        "vae", lambda s: s.update({f"{CONV}.weight_scale": torch.ones(1)}), f"{CONV}.weight_scale is"
    ),
    "float-weight": (
        "transformer",
        lambda s: s.update({f"{TO_OUT}.weight": s[f"{TO_OUT}.weight"].half()}),
        f"{TO_OUT}.weight is float16",
    ),
    "unread": ("transformer", lambda s: s.update(extra=torch.ones(1).half()), "extra"),
    "unread-vae": ("vae", lambda s: s.update({"decoder.extra": torch.ones(1).half()}), "decoder.extra"),
}  # fmt: skip


@pytest.mark.parametrize(("component", "change", "message"), CHANGES.values(), ids=CHANGES)
def test_tensors_that_do_not_fit(
    copy: Path,
    capsys: Capture,
    component: str,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    edit_weights(copy, component, change)
    assert_refused(copy, capsys, message)


@pytest.mark.parametrize(
    ("component", "kept", "message"),
    [
        ("transformer", [TO_OUT], f"{TO_OUT}.weight is int8, but config.json keeps it"),
        ("vae", [CONV], f"{CONV}.weight is int8, but config.json keeps it"),
        ("transformer", ["patch_embed.proj"], "config.json keeps patch_embed.proj, which no package has"),
        ("transformer", ["transformer_blocks.0.attn1.to_q"], "keeps only transformer_blocks.0.attn1.to_q"),
    ],
)
def test_a_kept_list_that_does_not_match(
    copy: Path, capsys: Capture, component: str, kept: list[str], message: str
) -> None:
    edit_config(copy, component, kept=kept)
    assert_refused(copy, capsys, message)


@pytest.mark.parametrize(
    ("component", "tensor"),
    [
        ("transformer", "transformer_blocks.1.ff.conv_point.weight"),
        # never INT8
        ("transformer", "transformer_blocks.0.ff.conv_depth.bias"),
        ("vae", f"{CONV}.weight"),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_float_weights_that_are_not_finite(
    tiny_folder: Path, tmp_path: Path, capsys: Capture, component: str, tensor: str, value: float
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "broken")
    file = folder / component / WEIGHTS
    state = load_file(file)
    state[tensor].flatten()[5] = value
    save_file(state, file)
    assert generate(folder, "--int8", "--output", str(tmp_path / "a.png")) == 1
    message = f"{file}: {tensor} has NaN or infinite values"
    assert message in capsys.readouterr().err.splitlines()[0]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        Sana.load(str(folder), int8=True)


def calibrate(state: dict[str, Tensor]) -> None:
    """Add input scales, of q, k and v to the first only."""
    for name in [name for name in state if name.endswith(".weight_scale")]:
        if not name.endswith(("to_k.weight_scale", "to_v.weight_scale")):
            state[name.replace("weight_scale", "input_scale")] = torch.tensor(0.05)


def test_static_activations_are_read(tiny_package: Path, copy: Path, capsys: Capture) -> None:
    edit_config(copy, "transformer", activations="tensor")
    assert_refused(copy, capsys, "input_scale is missing")
    edit_weights(copy, "transformer", calibrate)
    made = picture(copy)
    assert made.metadata["quantization"] == "w8a8, per tensor"
    assert not np.array_equal(made.pixels, picture(tiny_package).pixels)
    # with the same tensors and one scale per token again, the calibrated ones are not used
    edit_config(copy, "transformer", activations="token")
    assert np.array_equal(picture(copy).pixels, picture(tiny_package).pixels)
