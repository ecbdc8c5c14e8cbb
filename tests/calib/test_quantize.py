"""`sana-edge quantize`: the package, with and without calibration, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# scripts there import each other by their plain names
from sana_edge.bench.random_model import write_model
from sana_edge.calib import package_component
from sana_edge.calib.quantize import quantize
from sana_edge.calib.settings import Settings, calibration_folder
from sana_edge.calib.statistics import Statistics
from sana_edge.calib.statistics_store import StatisticsStore
from sana_edge.cli.main import main
from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.pipeline import Sana
from sana_edge.progress import bar
from sana_edge.store import hub, package
from sana_edge.store.folder import read_json
from sana_edge.store.package_tensors import is_scale
from sana_edge.store.weights import StoredState, load_state
from sana_edge.torch_runtime.load import load_decoder, load_denoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
PROMPTS = "a cat on a mat\na red house\n"
# 4 tokens, 2 prompts, 2 steps, and no pictures to compare
QUICK: dict[str, Any] = {"steps": 2, "size": (64, 64), "pictures": 0}


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return str(path)


def ignore(name: str, sqnr: float) -> None:
    """Of no interest here."""


def copied(folder: Path, tmp_path: Path, name: str = "model") -> Path:
    return Path(shutil.copytree(folder, tmp_path / name))


def changed(folder: Path, component: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / component / WEIGHTS)
    change(state)
    save_file(state, folder / component / WEIGHTS, {"format": "pt"})


def stored_state(folder: Path, component: str) -> Mapping[str, Tensor]:
    return StoredState(folder / component)


def assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_streaming_is_quantizing_in_memory(tiny_folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    folder = copied(tiny_folder, tmp_path)
    for name in ("transformer", "vae"):
        changed(folder, name, lambda state: state.update({key: x.to(dtype) for key, x in state.items()}))
    model, cpu = hub.resolve(str(folder)), torch.device("cpu")
    denoiser, _ = load_denoiser(model, device=cpu, dtype="fp32", int8=True)
    decoder = load_decoder(model, device=cpu, dtype=torch.float32, int8=True)
    config = DenoiserConfig.from_dict(read_json(folder / "transformer" / "config.json"))
    streamed = dict(package_component.quantized_denoiser(config, stored_state(folder, "transformer"), ignore))
    vae = AutoencoderConfig.from_dict(read_json(folder / "vae" / "config.json"))
    streamed_vae = dict(package_component.quantized_decoder(vae, stored_state(folder, "vae"), ignore))
    half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    assert_equal(streamed, dict(package_component.stored(denoiser.to_diffusers(), half)))
    assert_equal(streamed_vae, dict(package_component.stored(decoder.state_dict(), half)))
    floats = [x for name, x in {**streamed, **streamed_vae}.items() if x.dtype != torch.int8]
    assert {x.dtype for x in floats} == {half, torch.float32}
    assert all(is_scale(name) for name, x in streamed.items() if x.dtype == torch.float32)


def test_without_calibration_it_is_quantizing_while_loading(tiny_folder: Path, tmp_path: Path) -> None:
    report = quantize(str(tiny_folder), tmp_path / "package", Settings(calibrate=False))
    options: dict[str, Any] = {"steps": 2, "size": (64, 96), "seed": 3}
    with Sana.load(str(tiny_folder), int8=True) as direct, Sana.load(str(tmp_path / "package")) as packed:
        pictures = [sana.generate("a cat on a mat", **options).pixels for sana in (direct, packed)]
    assert (pictures[0] == pictures[1]).all()
    assert report.calibrated is False
    assert len(report.layers) == len({layer.name for layer in report.layers})
    # 8 bits over a range of about 3.5 standard deviations: 20 log10(127 sqrt(12) / 3.5) = 42 dB
    assert all(35 < layer.sqnr < 55 for layer in report.layers)
    assert report.comparisons == [] and report.runs == {}
    assert "was not run" in report.notes[0]


def test_the_terms_go_with_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "notes.txt").write_text("not terms")
    quantize(str(folder), tmp_path / "package", Settings(calibrate=False))
    assert (tmp_path / "package" / "LICENSE.txt").read_text() == "terms"
    assert not (tmp_path / "package" / "notes.txt").exists()


def test_a_package_holds_all_that_a_model_needs(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "package"
    report = quantize(str(tiny_folder), output, Settings(calibrate=False))
    assert sorted(path.name for path in output.parent.iterdir()) == ["package"]
    assert sorted(path.name for path in output.iterdir()) == [
        *("model_index.json", "report.json", "report.png", "scheduler"),
        *("text_encoder", "tokenizer", "transformer", "vae"),
    ]
    for name in ("transformer", "vae", "text_encoder"):
        made = package.read(output / name)
        assert made is not None
        package.verify(output / name, made)
        assert made.source["checksum"] == package.checksum(tiny_folder / name)
        assert made.calibration is None
    encoder = [t for name, t in load_state(output / "vae").items() if name.startswith("encoder.")]
    assert any(tensor.dtype == torch.int8 for tensor in encoder)
    assert json.loads((output / "report.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    sizes = {name: size.int8 for name, size in report.sizes.items()}
    assert sizes["denoiser"] == sum(tensor.nbytes for tensor in load_state(output / "transformer").values())
    floats = load_state(tiny_folder / "vae")
    decoder = sum(tensor.nbytes for name, tensor in floats.items() if name.startswith("decoder."))
    assert report.sizes["decoder"].float == decoder


def test_calibration_smooths_keeps_and_scales(tiny_folder: Path, tmp_path: Path, prompts: str) -> None:
    settings = Settings(prompts=prompts, activations="tensor", keep=2, alpha=0.5, **QUICK)
    report = quantize(str(tiny_folder), tmp_path / "package", settings)
    kept = [layer for layer in report.layers if layer.kept]
    assert len(kept) == 4
    made = {name: package.read(tmp_path / "package" / name) for name in ("transformer", "vae")}
    denoiser, decoder = made["transformer"], made["vae"]
    assert denoiser is not None and decoder is not None
    assert denoiser.activations == "tensor"
    assert denoiser.calibration is not None
    assert {"checksum", "prompts", "prompt_set", "steps", "alpha"} <= set(denoiser.calibration)
    assert denoiser.calibration["prompts"] == 2 and denoiser.calibration["alpha"] == 0.5
    state = load_state(tmp_path / "package" / "transformer")
    assert len(denoiser.kept) >= 2 and len(decoder.kept) >= 2
    assert all(state[f"{name}.weight"].dtype == torch.float16 for name in denoiser.kept)
    smoothing = state["transformer_blocks.0.smoothing"]
    assert not torch.equal(smoothing, torch.ones_like(smoothing))
    layer = next(layer for layer in report.layers if layer.name == "denoiser.blocks.1.cross_q")
    if not layer.kept:
        scale = state["transformer_blocks.1.attn2.to_q.input_scale"]
        assert float(scale) == pytest.approx(layer.input_scale)
    with Sana.load(str(tmp_path / "package")) as sana:
        assert sana.generate("a cat", steps=2, size=(64, 64), seed=1).pixels.std() > 0
    assert not calibration_folder(tmp_path / "package").exists()


def test_all_layers_can_stay_in_16_bit(tiny_folder: Path, tmp_path: Path, prompts: str) -> None:
    output = tmp_path / "package"
    report = quantize(str(tiny_folder), output, Settings(prompts=prompts, keep=1000, alpha=0, **QUICK))
    assert all(layer.kept for layer in report.layers)
    for part in ("transformer", "vae"):
        # the encoder is not calibrated, and no layer of it counts
        state = {k: v for k, v in load_state(output / part).items() if not k.startswith("encoder.")}
        assert not any(tensor.dtype == torch.int8 for tensor in state.values())
    options: dict[str, Any] = {"steps": 1, "size": (64, 64), "seed": 1}
    with Sana.load(str(tiny_folder)) as full, Sana.load(str(output)) as kept:
        pictures = [sana.generate("a cat", **options).pixels.astype(int) for sana in (full, kept)]
    # fp16 rounds weights by up to 2^-11 and the text encoder is INT8: far below the 42 dB of INT8 networks
    assert abs(pictures[0] - pictures[1]).max() <= 3


def test_the_clamp_is_that_of_the_float_model(
    tiny_folder: Path, tiny_sprint_folder: Path, tmp_path: Path
) -> None:
    for folder, clamp in ((tiny_folder, True), (tiny_sprint_folder, False)):
        output = tmp_path / folder.name
        quantize(str(folder), output, Settings(calibrate=False))
        for path in (folder, output):
            loaded, _ = load_denoiser(hub.resolve(str(path)), device=torch.device("cpu"), dtype="fp32")
            assert loaded.clamp is clamp


def test_a_random_model_of_full_layout_is_quantized(tmp_path: Path) -> None:
    write_model(tmp_path / "random", "tiny", dtype=torch.float16, text_layers=1, text_width=48, force=False)
    quantize(str(tmp_path / "random"), tmp_path / "package", Settings(calibrate=False))
    with Sana.load(str(tmp_path / "package")) as sana:
        assert sana.generate("a cat", steps=1, size=(64, 64), seed=1).pixels.shape == (64, 64, 3)


def test_an_interrupted_calibration_goes_on(tiny_folder: Path, tmp_path: Path, prompts: str) -> None:
    settings = Settings(prompts=prompts, **QUICK)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    quantize(str(tiny_folder), whole, settings)
    seen: list[int] = []

    def interrupt(name: str, done: int, count: int) -> None:
        if name == "observe":
            # in the middle of the second of two prompts
            if done == 3:
                raise KeyboardInterrupt
            seen.append(done)

    with pytest.raises(KeyboardInterrupt):
        quantize(str(tiny_folder), resumed, settings, progress=interrupt)
    assert not resumed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        calibration_folder(resumed).name,
        "prompts.txt",
        "whole",
    ]
    again: list[int] = []
    report = quantize(
        str(tiny_folder),
        resumed,
        settings,
        progress=lambda name, done, _: again.append(done) if name == "observe" else None,
    )
    assert seen == [1, 2] and again == [3, 4]
    assert "1 of 2 prompts were observed before" in report.notes[0]
    for name, activations in (("transformer", "token"), ("vae", "tensor")):
        assert package.checksum(whole / name) == package.checksum(resumed / name)
        made = package.read(whole / name)
        assert made is not None and made.activations == activations
    assert not calibration_folder(resumed).exists()
    assert str(tmp_path) not in (resumed / "report.json").read_text()


def test_the_command_can_be_interrupted(
    tiny_folder: Path,
    tmp_path: Path,
    prompts: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["--prompts", prompts, "--steps", "2", "--size", "64x64", "--pictures", "0"]
    command = ["quantize", str(tiny_folder), "--output", str(tmp_path / "package"), *options]
    with monkeypatch.context() as patch:
        save = StatisticsStore.save

        def interrupted(store: StatisticsStore, statistics: Statistics) -> None:
            save(store, statistics)
            raise KeyboardInterrupt

        patch.setattr(StatisticsStore, "save", interrupted)
        assert main(command) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert not (tmp_path / "package").exists()
    assert main(command) == 0
    assert "1 of 2 prompts were observed before" in capsys.readouterr().out


def test_what_could_not_be_measured_is_noted(
    tiny_folder: Path, tmp_path: Path, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    settings = Settings(prompts=prompts, steps=1, size=(64, 64), pictures=1)
    report = quantize(str(tiny_folder), tmp_path / "package", settings)
    assert report.runs == {}
    assert [note for note in report.notes if "not measured" in note] == report.notes
    assert len(report.notes) == 2


@pytest.mark.slow
def test_the_report_compares_pictures_and_costs(tiny_folder: Path, tmp_path: Path, prompts: str) -> None:
    settings = Settings(prompts=prompts, steps=2, size=(64, 64), pictures=2)
    report = quantize(str(tiny_folder), tmp_path / "package", settings)
    assert [comparison.plan.seed for comparison in report.comparisons] == [2, 3]
    assert set(report.runs) == {"float", "int8"}
    assert all(run.seconds > 0 and run.peak_memory for run in report.runs.values())
    steps = report.steps()
    # weights and activations of 8 bits: each about 42 dB, and guidance makes that of the velocity larger
    assert all(0 < step["velocity_error"] < 0.2 for step in steps)
    assert report.picture_numbers()["psnr"]["worst"] > 20
    assert json.loads((tmp_path / "package" / "report.json").read_text())["pictures"]["worst"] in (0, 1)


def test_a_channel_of_zeros_stays_zero(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    name = "transformer_blocks.1.ff.conv_inverted"
    changed(folder, "transformer", lambda state: state[f"{name}.weight"][7].zero_())
    quantize(str(folder), tmp_path / "package", Settings(calibrate=False))
    state = load_state(tmp_path / "package" / "transformer")
    assert float(state[f"{name}.weight_scale"][7]) == 1
    assert not state[f"{name}.weight"][7].any()
    with Sana.load(str(tmp_path / "package")) as sana:
        sana.generate("a cat", steps=1, size=(64, 64), seed=1)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "transformer_blocks.1.attn2.to_q.weight"),
        ("transformer", "caption_norm.weight"),
        ("vae", "decoder.up_blocks.2.1.conv1.weight"),
        ("text_encoder", "layers.1.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(
    tiny_folder: Path, tmp_path: Path, part: str, name: str, value: float
) -> None:
    folder = copied(tiny_folder, tmp_path)
    file = folder / part / ("model.safetensors" if part == "text_encoder" else WEIGHTS)
    state = load_file(file)
    state[name].view(-1)[5] = value
    save_file(state, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        quantize(str(folder), tmp_path / "package", Settings(calibrate=False))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_calibration_names_a_weight_that_is_not_finite(
    tiny_folder: Path, tmp_path: Path, prompts: str
) -> None:
    folder = copied(tiny_folder, tmp_path)
    name = "transformer_blocks.1.attn2.to_q"
    changed(folder, "transformer", lambda state: state[f"{name}.weight"].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(SanaError, match=name):
        quantize(str(folder), tmp_path / "package", Settings(prompts=prompts, **QUICK))
    assert not (tmp_path / "package").exists()


def test_a_package_is_not_quantized_again(tiny_folder: Path, tmp_path: Path) -> None:
    quantize(str(tiny_folder), tmp_path / "package", Settings(calibrate=False))
    for settings in (Settings(), Settings(calibrate=False)):
        with pytest.raises(InvalidInput, match="already quantized"):
            quantize(str(tmp_path / "package"), tmp_path / "again", settings)
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


def test_a_damaged_model_leaves_nothing_behind(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    changed(folder, "transformer", lambda state: state.update(extra=state.pop("proj_out.weight")))
    with pytest.raises(CheckpointError, match=r"proj_out\.weight"):
        quantize(str(folder), tmp_path / "package", Settings(calibrate=False))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "1.5"], "alpha is 1.5"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--alpha", "much"], "alpha is 'much'"),
        (["--keep-fp16", "-1"], "keep-fp16 is -1"),
        (["--keep-fp16", "some"], "keep-fp16 is 'some'"),
        (["--keep-fp16", "1.5"], "keep-fp16 is '1.5'"),
        (["--steps", "0"], "steps is 0"),
        (["--size", "65x64"], "not a multiple of 32"),
        (["--guidance", "-1"], "guidance is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--pictures", "-1"], "pictures is -1"),
        (["--no-calibration", "--prompts", "x"], "prompts is for calibration"),
        (["--no-calibration", "--alpha", "0.5"], "needs calibration"),
        (["--no-calibration", "--keep-fp16", "2"], "needs calibration"),
        (["--no-calibration", "--activations", "tensor"], "need calibration"),
        (["--prompts", "/no/such/file"], "no prompt file"),
    ],
)
def test_bad_arguments(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    output = tmp_path / "package"
    assert main(["quantize", str(tiny_folder), "--output", str(output), *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") <= 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no prompts"), (b"# a\n\n", "no prompts"), (b"\x89PNG\0\1", "not a text")]
)
def test_bad_prompts(tiny_folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        quantize(str(tiny_folder), tmp_path / "package", Settings(prompts=str(file)))
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_taken_output_is_found_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "package").touch()
    # the model does not exist either, which would show later
    with pytest.raises(InvalidInput, match="exists"):
        quantize("no-such-model", tmp_path / "package")
    with pytest.raises(SanaError, match="cannot write"):
        quantize("no-such-model", tmp_path / "package" / "below")
    with pytest.raises(InvalidInput, match="no prompt file"):
        quantize("no-such-model", tmp_path / "new", Settings(prompts="/no/such/file"))


def test_force_does_not_replace_the_float_model(tiny_folder: Path, tmp_path: Path) -> None:
    folder = copied(tiny_folder, tmp_path)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InvalidInput, match="where the float model is"):
        quantize(str(folder), folder, Settings(calibrate=False), force=True)
    assert sorted(folder.rglob("*")) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_prints_the_table_and_the_folder(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "package"
    command = ["quantize", str(tiny_folder), "--output", str(output), "--no-calibration", "--quiet"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[-1] == str(output)
    assert any("weights, all" in line for line in lines)
    assert main(command) == 1
    assert main([*command, "--force"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, quiet, shown in (
        (Terminal(), False, True),
        (Terminal(), True, False),
        (io.StringIO(), False, False),
    ):
        monkeypatch.setattr("sys.stderr", stream)
        with bar(quiet) as progress:
            progress("load", 0, 0)
            # as after an interruption: half is done
            for done in range(5, 9):
                progress("observe", done, 8)
        assert bool(stream.getvalue()) is shown
        if shown:
            assert "observe" in stream.getvalue() and "/8" in stream.getvalue()
