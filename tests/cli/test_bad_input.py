"""Each wrong input is an error that names the value and says what to do, and leaves no file behind."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_edge import InvalidInput, Sana
from sana_edge.cli.main import main
from sana_edge.request.request import Request

Capture = pytest.CaptureFixture[str]

BAD_REQUESTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty-prompt": ({"prompt": ""}, "prompt is empty", "say what"),
    "blank-prompt": ({"prompt": " \n\t\u3000"}, "prompt is empty", "say what"),
    "prompt-none": ({"prompt": None}, "prompt is None", "string"),
    "prompt-list": ({"prompt": ["a"]}, r"prompt is \['a'\]", "string"),
    "negative-none": ({"negative_prompt": None}, "negative prompt is None", "string"),
    "size-odd": (
        {"size": (1000, 520), "exact_size": True},
        "1000x520 is not a multiple of 32",
        "try 992x512 or 1024x544",
    ),
    "size-one-side": ({"size": (64, 65), "exact_size": True}, "64x65 is not", "try 64x64 or 64x96"),
    "size-zero": ({"size": (0, 64)}, "0x64 is too small", "at least 1"),
    "size-negative": ({"size": (64, -64)}, "64x-64 is too small", "at least 1"),
    "size-enormous": ({"size": (64, 8224)}, "64x8224 is too large", "at most 8192"),
    "size-float": ({"size": (64.0, 64)}, r"size is \(64.0, 64\)", "pixels"),
    "size-number": ({"size": 64}, "size is 64", "pixels"),
    "size-three": ({"size": (64, 64, 3)}, "size is", "pixels"),
    "steps-zero": ({"steps": 0}, "steps is 0", "from 1 to 1000"),
    "steps-negative": ({"steps": -1}, "steps is -1", "from 1 to 1000"),
    "steps-many": ({"steps": 1001}, "steps is 1001", "from 1 to 1000"),
    "steps-fraction": ({"steps": 2.5}, "steps is 2.5", "whole number"),
    "steps-bool": ({"steps": True}, "steps is True", "whole number"),
    "guidance-nan": ({"guidance": float("nan")}, "guidance is nan", "from 0 to 1000"),
    "guidance-inf": ({"guidance": float("inf")}, "guidance is inf", "from 0 to 1000"),
    "guidance-negative": ({"guidance": -0.5}, "guidance is -0.5", "from 0 to 1000"),
    "guidance-large": ({"guidance": 1000.5}, "guidance is 1000.5", "from 0 to 1000"),
    "guidance-huge": ({"guidance": 10**400}, "guidance is a huge number", "from 0 to 1000"),
    "seed-huge": ({"seed": 10**5000}, "seed is a huge number", "from 0 to"),
    "size-huge": ({"size": (10**5000, 64)}, "size a huge numberx64 is too large", "at most 8192"),
    "guidance-text": ({"guidance": "high"}, "guidance is 'high'", "from 0 to 1000"),
    "seed-negative": ({"seed": -1}, "seed is -1", "from 0 to"),
    "seed-large": ({"seed": 2**63}, f"seed is {2**63}", f"to {2**63 - 1}"),
    "seed-overflow": ({"seed": 2**63 - 1, "images": 2}, "seed is", f"to {2**63 - 2}"),
    "images-zero": ({"images": 0}, "images is 0", "from 1"),
    "images-negative": ({"images": -3}, "images is -3", "from 1"),
    "shift-zero": ({"flow_shift": 0}, "flow shift is 0", "above 0"),
    "shift-bool": ({"flow_shift": True}, "flow shift is True", "above 0"),
    "guidance-bool": ({"guidance": True}, "guidance is True", "from 0 to 1000"),
    "guidance-complex": ({"guidance": 1j}, "guidance is 1j", "from 0 to 1000"),
    "tile-odd": ({"tile": 1000}, "tile is 1000", "or 0 for none"),
    "tile-one-cell": ({"tile": 32}, "tile is 32", "from 64 to 8192"),
    "tile-bool": ({"tile": True}, "tile is True", "multiple of 32"),
    "steps-numpy": ({"steps": np.float32(2.5)}, "steps is 2.5", "whole number"),
    "seed-numpy-bool": ({"seed": np.bool_(True)}, "seed is True", "from 0 to"),
    "shift-nan": ({"flow_shift": float("nan")}, "flow shift is nan", "above 0"),
    "shift-huge": ({"flow_shift": 10**400}, "flow shift is a huge number", "at most 100"),
    "shift-text": ({"flow_shift": "3"}, "flow shift is '3'", "above 0"),
    "instruction-list": ({"instruction": ["a"]}, r"instruction is \['a'\]", "string"),
    "instruction-long": ({"instruction": "a" * 20_001}, "instruction has 20001 characters", "at most"),
    "sampler": ({"sampler": "ddim"}, "unknown sampler 'ddim'", "flow-dpm, flow-euler, scm"),
}


@pytest.mark.parametrize(("options", "message", "hint"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_requests(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        Request(**{"prompt": "a house", **options})
    assert hint in caught.value.hint


def test_extreme_values_that_are_fine() -> None:
    Request("x", seed=2**63 - 1, steps=1000, guidance=0.0, size=(32, 8192))
    Request("🏠", seed=0, steps=1, guidance=1000, images=10_000)


@pytest.mark.parametrize("options", [{"images": 0}, {"steps": 0}, {"guidance": float("nan")}], ids=str)
def test_generate_and_stream_refuse_before_any_work(tiny_folder: Path, options: dict[str, Any]) -> None:
    with Sana.load(str(tiny_folder)) as sana:
        with pytest.raises(InvalidInput):
            sana.generate("a house", **options)
        with pytest.raises(InvalidInput):
            sana.stream("a house", **options)
        assert sana.generate("a house", steps=1)


def test_samplers_that_do_not_suit_the_model(tiny_folder: Path, tiny_sprint_folder: Path) -> None:
    with Sana.load(str(tiny_folder)) as sana, pytest.raises(InvalidInput, match="sampler scm") as caught:
        sana.generate("a house", sampler="scm")
    assert caught.value.hint == "choose flow-dpm or flow-euler"
    with Sana.load(str(tiny_sprint_folder)) as sprint, pytest.raises(InvalidInput, match="sampler flow-dpm"):
        sprint.generate("a house", sampler="flow-dpm")


@pytest.mark.parametrize("option", ["device", "dtype"])
def test_unknown_device_and_dtype(tiny_folder: Path, option: str) -> None:
    with pytest.raises(InvalidInput, match=f"unknown {option} 'abacus'") as caught:
        Sana.load(str(tiny_folder), **{option: "abacus"})
    assert "choose auto" in caught.value.hint


def run(*arguments: str, model: Path | str = "sana-tiny") -> int:
    return main(["generate", "--prompt", "a house", "--steps", "1", "--model", str(model), *arguments])


def assert_refused(code: int, capsys: Capture, message: str, hint: str = "") -> None:
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and message in lines[0]
    assert len(lines) <= 2
    if hint:
        assert lines[1].startswith("hint:  ") and hint in lines[1]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory that must be empty at the end, too."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    yield cwd
    assert os.listdir(cwd) == []


CLI_VALUES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "empty-prompt": (("--prompt", ""), "the prompt is empty", "say what"),
    "size": (
        ("--exact-size", "--size", "1000x1000"),
        "1000x1000 is not a multiple of 32",
        "992x992 or 1024x1024",
    ),
    "size-zero": (("--size", "0x0"), "0x0 is too small", "at least 1"),
    "size-negative": (("--size=-64x64",), "-64x64 is too small", "at least 1"),
    "size-negative-apart": (("--size", "-64x64"), "-64x64 is too small", "at least 1"),
    "size-negative-height": (("--size", "-64x-64"), "-64x-64 is too small", "at least 1"),
    "size-enormous": (("--size", "99999999x64"), "too large", "at most 8192"),
    "steps": (("--steps", "0"), "steps is 0", "from 1 to 1000"),
    "guidance-nan": (("--guidance", "nan"), "guidance is nan", "4.5 is usual"),
    "guidance-inf": (("--guidance=-inf",), "guidance is -inf", "4.5 is usual"),
    "seed": (("--seed", "-7"), "seed is -7", "from 0"),
    "images": (("--images", "0"), "images is 0", "from 1"),
    "model": (("--model", "sana-tony"), "unknown model 'sana-tony'", "models list"),
    "model-folder": (("--model", "./nowhere"), "no folder ./nowhere", "diffusers layout"),
    "model-empty": (("--model", ""), "unknown model ''", "models list"),
    "output-folder": (("--output", "missing/a.png"), "cannot write missing/a.png", "create the folder"),
    "output-in-a-file": (
        ("--output", f"{__file__}/a.png"),
        "Not a directory",
        "a part of the path is a file",
    ),
    "output-suffix": (("--output", "a.gif"), "a.gif does not end in .png, .jpg", ".webp"),
}


@pytest.mark.parametrize(("arguments", "message", "hint"), CLI_VALUES.values(), ids=CLI_VALUES)
def test_command_line_values(
    place: Path, capsys: Capture, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    assert_refused(run(*arguments), capsys, message, hint)


USAGE: dict[str, tuple[tuple[str, ...], str]] = {
    "sampler": (("--sampler", "ddim"), "invalid choice: 'ddim' (choose from"),
    "device": (("--device", "abacus"), "invalid choice: 'abacus'"),
    "dtype": (("--dtype", "int3"), "invalid choice: 'int3'"),
    "backend": (("--backend", "abacus"), "invalid choice: 'abacus'"),
    "size": (("--size", "large"), "'large' is not WIDTHxHEIGHT"),
    "steps": (("--steps", "many"), "invalid int value: 'many'"),
    "unknown": (("--stepps", "3"), "unrecognized arguments: --stepps"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_usage(place: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (2, "")
    assert message in err


def test_cuda_that_is_missing(place: Path, capsys: Capture, tiny_folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert_refused(run("--device", "cuda", model=tiny_folder), capsys, "cuda cannot be used", "cpu")


def test_fp16_on_the_cpu(place: Path, capsys: Capture, tiny_folder: Path) -> None:
    code = run("--device", "cpu", "--dtype", "fp16", model=tiny_folder)
    assert_refused(code, capsys, "fp16 is not supported on the CPU", "fp32 or bf16")


TRANSFORMER = Path("transformer/diffusion_pytorch_model.safetensors")
VAE = Path("vae/diffusion_pytorch_model.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def reshape(path: Path) -> None:
    state = load_file(path)
    key = next(key for key, value in state.items() if value.ndim > 1)
    state[key] = state[key][:-1].clone()
    save_file(state, path)


def drop_key(path: Path) -> None:
    state = load_file(path)
    del state[sorted(state)[0]]
    save_file(state, path)


def pickled(path: Path) -> None:
    with open(path.with_suffix(".bin"), "wb") as file:
        pickle.dump({}, file)
    path.unlink()


DAMAGE: dict[str, tuple[str | Path, Callable[[Path], Any], str]] = {
    "no-index": ("model_index.json", Path.unlink, "model_index.json"),
    "no-config": ("transformer/config.json", Path.unlink, "transformer/config.json"),
    "no-tokenizer": ("tokenizer/tokenizer.json", Path.unlink, "tokenizer.json"),
    "no-scheduler": ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json"),
    "no-weights": (TRANSFORMER, Path.unlink, "no .safetensors weights"),
    "truncated": (TRANSFORMER, truncate, "cannot read"),
    "truncated-vae": (VAE, truncate, "cannot read"),
    "truncated-text": ("text_encoder/model.safetensors", truncate, "cannot read"),
    "corrupt": (TRANSFORMER, lambda path: path.write_bytes(b"\xff" * 5000), "cannot read"),
    "empty": (VAE, lambda path: path.write_bytes(b""), "cannot read"),
    "shapes": (TRANSFORMER, reshape, "expected"),
    "missing-key": (TRANSFORMER, drop_key, "lack"),
    "missing-key-text": ("text_encoder/model.safetensors", drop_key, "missing"),
    "pickle": (TRANSFORMER, pickled, "pickled weights"),
    "config-no-json": ("vae/config.json", lambda path: path.write_text("{"), "cannot read"),
    "config-value": (
        "vae/config.json",
        lambda path: path.write_text('{"latent_channels": "x"}'),
        "latent_channels",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_model_folders(
    place: Path,
    capsys: Capture,
    tiny_folder: Path,
    name: str | Path,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    folder = place.parent / "model"
    shutil.copytree(tiny_folder, folder)
    damage(folder / name)
    assert_refused(run(model=folder), capsys, message)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("a.png", ("--output", "a.png")), ("sana-5.png", ("--images", "2", "--seed", "4"))],
    ids=["named", "one-of-two"],
)
def test_existing_output_is_refused_before_the_model_is_loaded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    name: str,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"mine")
    assert_refused(run(*arguments, model="./no-such-model"), capsys, f"{name} already exists", "--force")
    assert (tmp_path / name).read_bytes() == b"mine"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    output = str(tmp_path / "closed" / "a.png")
    assert_refused(run("--output", output), capsys, "Permission denied", "a folder that you may write to")


def test_full_disk(place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run(model=tiny_folder), capsys, "No space left on device", "disk is full")


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(5, "Input/output error"), ValueError("a\nb")], ids=repr
)
def test_unforeseen_errors_are_one_line(
    place: Path, capsys: Capture, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "randn", fail)
    expected = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
    assert_refused(run(model=tiny_folder), capsys, expected)
