"""What is taken, left out and said when a model folder is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from sana_edge import InvalidInput, Sana
from sana_edge.calib.quantize import quantize
from sana_edge.calib.settings import Settings
from sana_edge.cli.main import main
from sana_edge.errors import CheckpointError, ModelNotFound, OutOfMemory, SanaError
from sana_edge.nets.convert import convert
from sana_edge.noise.schedules import sampler_of
from sana_edge.prompt import CHI
from sana_edge.store import hub, package
from sana_edge.store.known_models import DECODERS, KnownModel
from sana_edge.torch_runtime import tiling

PROMPT = "a red house"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the tiny model's latents with an empty first stage, and another scaling factor."""
    from diffusers import AutoencoderDC

    torch.manual_seed(5)
    settings = dict(tiny.tiny_autoencoder().config)
    settings |= {"decoder_block_out_channels": (8, 8, 16, 16, 16, 32), "scaling_factor": 0.5}
    # as DC-AE-Lite's; from_config leaves out what it knows as a default
    settings |= {"decoder_conv_act_fn": "silu", "_use_default_values": []}
    place = tmp_path_factory.mktemp("lite") / "lite"
    AutoencoderDC.from_config(settings).save_pretrained(place)
    return place


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def draw(model: Path, **options: object) -> np.ndarray:
    generating = {"seed": 3, "steps": 2, "size": (64, 64), "exact_size": True}
    own = {name: options.pop(name) for name in ("flow_shift", "instruction") if name in options}
    with Sana.load(model, **options) as sana:  # type: ignore[arg-type]
        return sana.generate(PROMPT, **generating, **own).pixels  # type: ignore[arg-type]


def to_float8(folder: Path, dtype: torch.dtype) -> None:
    for path in folder.glob("*/*.safetensors"):
        state = {k: t.to(dtype) if t.ndim > 1 else t.bfloat16() for k, t in load_file(path).items()}
        save_file(state, path, {"format": "pt"})


def to_float(folder: Path) -> None:
    for path in folder.glob("*/*.safetensors"):
        save_file({k: t.float() for k, t in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_fp8_weights_draw_what_their_values_draw(folder: Path, dtype: torch.dtype, int8: bool) -> None:
    to_float8(folder, dtype)
    for path in (folder / "transformer", folder / "vae"):
        edit(path / "config.json", dtype="float8")
    found = draw(folder, int8=int8, dtype="fp32")
    to_float(folder)
    assert np.array_equal(found, draw(folder, int8=int8, dtype="fp32"))


def test_fp8_weights_are_quantized(folder: Path, tmp_path: Path) -> None:
    to_float8(folder, torch.float8_e4m3fn)
    packages = []
    for name in ("float8", "float"):
        quantize(str(folder), tmp_path / name, Settings(calibrate=False))
        packages.append(load_file(tmp_path / name / "transformer/diffusion_pytorch_model.safetensors"))
        to_float(folder)
    one, two = packages
    assert all(torch.equal(one[key], two[key]) for key in two)


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("SanaPAGPipeline", "made for SanaPAGPipeline: perturbed-attention guidance is not done"),
        ("SanaControlNetPipeline", "its ControlNet is not used"),
        ("SanaPipeline", None),
    ],
)
def test_what_a_pipeline_does_besides_is_said(folder: Path, pipeline: str, said: str | None) -> None:
    edit(folder / "model_index.json", _class_name=pipeline)
    with Sana.load(folder) as sana:
        notes = sana.generate(PROMPT, steps=1).notes
    assert any(said in note for note in notes) if said else not notes


def test_an_image_to_image_pipeline_needs_no_image(tiny_sprint_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sprint_folder, tmp_path / "model")
    edit(tmp_path / "model/model_index.json", _class_name="SanaSprintImg2ImgPipeline")
    with Sana.load(tmp_path / "model") as sana:
        assert not sana.generate(PROMPT).notes


@pytest.mark.parametrize(
    "name",
    ["pytorch_lora_weights.safetensors", "transformer/adapter_model.safetensors", "lora/a.safetensors"],
)
def test_a_lora_in_the_folder_is_said(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    save_file({"transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 2)}, folder / name)
    with Sana.load(folder) as sana:
        (note,) = sana.generate(PROMPT, steps=1).notes
    assert note == f"{name} is a LoRA, which is not applied: merge it into the weights"


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_a_decoder_in_place_of_the_models(folder: Path, lite: Path, tmp_path: Path, int8: bool) -> None:
    """Its pictures are those of a folder that has it, with the model's own scale of latents."""
    found = draw(folder, decoder=lite, int8=int8)
    assert not np.array_equal(found, draw(folder, int8=int8))
    shutil.rmtree(folder / "vae")
    shutil.copytree(lite, folder / "vae")
    edit(folder / "vae/config.json", scaling_factor=0.41407)
    assert np.array_equal(found, draw(folder, int8=int8))
    # as a converted folder, which can be quantized and exported
    assert main(["convert", str(lite), "--output", str(tmp_path / "new"), "--base", str(folder)]) == 0
    assert np.array_equal(found, draw(tmp_path / "new", int8=int8))
    # a model's folder gives its vae
    assert np.array_equal(draw(folder, decoder=folder, int8=int8), found)


def test_the_decoder_is_in_the_metadata(folder: Path, lite: Path) -> None:
    with Sana.load(folder, decoder=lite) as sana:
        assert sana.generate(PROMPT, steps=1).metadata["decoder"] == "lite"


def test_decoders_by_name(
    tiny_folder: Path,
    lite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    info = DECODERS["dc-ae-lite"]
    with pytest.raises(ModelNotFound, match=f"{info.repository} is not on this machine"):
        Sana.load(tiny_folder, decoder="dc-ae-lite", offline=True)
    snapshot = tmp_path / f"models--{info.repository.replace('/', '--')}/snapshots/abc"
    shutil.copytree(lite, snapshot)
    with Sana.load(tiny_folder, decoder="DC-AE-Lite", offline=True) as sana:
        assert sana.generate(PROMPT, steps=1).metadata["decoder"] == "dc-ae-lite"
    assert main(["models", "list"]) == 0
    size = sum(path.stat().st_size for path in lite.iterdir())
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("dc-ae-lite"))
    assert line.split()[1:4] == ["decoder", f"{size / 1e6:.0f}", "MB"] and info.repository in line
    with pytest.raises(ModelNotFound, match="is a decoder, no whole model"):
        hub.resolve("dc-ae-lite")


def test_decoders_that_do_not_fit(tiny_folder: Path, lite: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(lite, other)
    edit(other / "config.json", latent_channels=16)
    with pytest.raises(CheckpointError, match="has 16 channels, the model's latents are of 32"):
        Sana.load(tiny_folder, decoder=other)
    edit(other / "config.json", _class_name="AutoencoderKL")
    with pytest.raises(CheckpointError, match="is a AutoencoderKL") as caught:
        Sana.load(tiny_folder, decoder=other)
    assert "AutoencoderDC" in caught.value.hint
    with pytest.raises(CheckpointError, match=r"has no config\.json: it is an empty folder"):
        (tmp_path / "empty").mkdir()
        Sana.load(tiny_folder, decoder=tmp_path / "empty")
    with pytest.raises(ModelNotFound, match="unknown decoder 'taesd'"):
        Sana.load(tiny_folder, decoder="taesd")
    denoiser = tiny_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match="holds a denoiser"):
        Sana.load(tiny_folder, decoder=denoiser)


def test_a_decoders_file(tiny_folder: Path, lite: Path, tmp_path: Path) -> None:
    """Alone, so that its config is read from its shapes, and in its folder."""
    weights = lite / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, tmp_path / "lite.safetensors")
    expected = draw(tiny_folder, decoder=lite)
    for file in (weights, tmp_path / "lite.safetensors"):
        assert np.array_equal(draw(tiny_folder, decoder=file), expected)


def test_the_shift_of_a_generation(tiny_folder: Path, tmp_path: Path) -> None:
    assert np.array_equal(draw(tiny_folder, flow_shift=3), draw(tiny_folder))
    shifted = draw(tiny_folder, flow_shift=4.0)
    assert not np.array_equal(shifted, draw(tiny_folder))
    shutil.copytree(tiny_folder, tmp_path / "model")
    edit(tmp_path / "model/scheduler/scheduler_config.json", flow_shift=4.0)
    assert np.array_equal(draw(tmp_path / "model"), shifted)


def test_the_shift_is_in_the_metadata(tiny_folder: Path, tiny_sprint_folder: Path) -> None:
    with Sana.load(tiny_folder) as sana:
        assert sana.generate(PROMPT, steps=1, flow_shift=4).metadata["flow_shift"] == 4.0
        assert "flow_shift" not in sana.generate(PROMPT, steps=1).metadata
        config = dataclasses.replace(sana._open().sampler, flow_shift=4.0)
    expected = sampler_of(config, "flow-euler", 7).timesteps
    assert np.array_equal(sampler_of(config, "flow-euler", 7, 4.0).timesteps, expected)
    with Sana.load(tiny_sprint_folder) as sprint, pytest.raises(InvalidInput, match=r"flow shift 4\.0"):
        sprint.generate(PROMPT, flow_shift=4.0)


def test_instructions(tiny_folder: Path) -> None:
    usual, none = draw(tiny_folder), draw(tiny_folder, instruction="")
    assert np.array_equal(draw(tiny_folder, instruction="\n".join(CHI)), usual)
    other = draw(tiny_folder, instruction="An oil painting of ")
    assert len({picture.tobytes() for picture in (usual, none, other)}) == 3
    with Sana.load(tiny_folder) as sana:
        for text in ("a ", "b ", ""):
            assert sana.generate(PROMPT, steps=1, instruction=text).metadata["instruction"] == text
        # of those that were used only SANA's and the last are kept
        assert len(sana._open().text_encoder._prefixes) <= 2  # type: ignore[attr-defined]


def test_the_command_line(
    tiny_folder: Path,
    lite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--flow-shift", "4", "--instruction", "none", "--decoder", str(lite), "--json", "--quiet"]
    arguments = ["generate", "--prompt", PROMPT, "--model", str(tiny_folder), "--steps", "2", "--seed", "3"]
    assert main([*arguments, *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["flow_shift"], made["instruction"], made["decoder"]) == (4.0, "", "lite")
    arguments.append("--force")
    assert main([*arguments, "--revision", "main"]) == 1
    assert "revision 'main' is of a repository" in capsys.readouterr().err
    assert main([*arguments, "--flow-shift", "0"]) == 1
    assert "flow shift is 0.0" in capsys.readouterr().err


def test_exported_folders_have_their_decoder(tmp_path: Path, lite: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InvalidInput, match="has its decoder in it") as caught:
        Sana.load(tmp_path, decoder=lite)
    assert "sana-edge convert" in caught.value.hint
    with pytest.raises(InvalidInput, match="revision 'main' is of a repository"):
        Sana.load(tmp_path, revision="main")


def test_known_decoders_have_a_licence() -> None:
    assert all(isinstance(info, KnownModel) and info.licence for info in DECODERS.values())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "transformer_blocks.0.attn1.to_out.0.weight"),
        ("transformer", "transformer_blocks.1.attn2.to_k.bias"),
        ("vae", "decoder.norm_out.weight"),
        ("text_encoder", "layers.1.mlp.up_proj.weight"),
        ("text_encoder", "norm.weight"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(
    tiny_folder: Path, tmp_path: Path, component: str, name: str, int8: bool, value: float
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / component).glob("*.safetensors")
    state = load_file(path)
    state[name].flatten()[-1] = value
    save_file(state, path)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {name} has NaN or infinite values")):
        Sana.load(str(folder), int8=int8, prompt_cache=False)


@pytest.mark.parametrize("value", [math.nan, 0.0, -1.0])
@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("transformer", "transformer_blocks.1.attn1.to_v.weight_scale"),
        ("transformer", "transformer_blocks.0.attn1.to_q.input_scale"),
        ("vae", "decoder.conv_in.weight_scale"),
        ("text_encoder", "layers.0.mlp.up_proj.weight_scale"),
    ],
)
def test_a_package_with_such_a_value_is_named(
    tmp_path: Path, component: str, name: str, value: float
) -> None:
    """Its checksums fit, as somebody may have made them."""
    folder = tmp_path / "model"
    shutil.copytree(hub.resolve("sana-tiny-int8").path, folder)
    (path,) = (folder / component).glob("*.safetensors")
    state = load_file(path)
    state[name].flatten()[-1:] = value
    save_file(state, path)
    config = json.loads((folder / component / "config.json").read_text())
    config[package.KEY]["checksum"] = package.checksum(folder / component)
    (folder / component / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {name} has ")):
        Sana.load(str(folder), prompt_cache=False)


@pytest.mark.parametrize(
    ("component", "name"),
    [("transformer", "transformer_blocks.1.attn2.to_k.bias"), ("vae", "decoder.norm_out.weight")],
)
def test_a_command_that_makes_models_names_it_too(folder: Path, component: str, name: str) -> None:
    (path,) = (folder / component).glob("*.safetensors")
    state = load_file(path)
    state[name].flatten()[-1] = math.nan
    # as a training's wrapper calls them
    save_file({f"module.{key}": tensor for key, tensor in state.items()}, path)
    match = re.escape(f"{path}: module.{name} has NaN or infinite values")
    with pytest.raises(CheckpointError, match=match):
        quantize(str(folder), folder.parent / "int8", Settings(calibrate=False))
    with pytest.raises(CheckpointError, match=f"{name} has NaN or infinite values"):
        convert(path, folder.parent / "converted")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_embedding_that_is_not_finite_gives_no_picture(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (path,) = (folder / "text_encoder").glob("*.safetensors")
    state = load_file(path)
    state["embed_tokens.weight"][:] = math.nan
    save_file(state, path)
    with Sana.load(str(folder)) as sana, pytest.raises(SanaError, match="encoded text has values"):
        sana.generate("a house", steps=1)


TILED = "decoded in tiles of 64 pixels, as memory was short"


def test_tiles_are_in_the_metadata(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sana.load(folder) as sana:
        options = {"steps": 1, "seed": 3, "size": (96, 96)}
        whole, tiled = sana.generate(PROMPT, **options), sana.generate(PROMPT, tile=64, **options)
        assert "tile" not in whole.metadata and tiled.metadata["tile"] == 64
        assert tiled.notes == whole.notes and not np.array_equal(tiled.pixels, whole.pixels)
        # a larger tile than the picture
        large = sana.generate(PROMPT, tile=128, **options)
        assert np.array_equal(large.pixels, whole.pixels)
        monkeypatch.setattr(tiling, "DEFAULT_TILE", 64)
        monkeypatch.setattr(
            tiling, "decode_bytes", lambda config, height, width, **_: (height * width > 4) << 60
        )
        monkeypatch.setattr(tiling, "available_memory", lambda device: 1 << 40)
        chosen = sana.generate(PROMPT, **options)
        assert any(note.startswith(TILED) for note in chosen.notes)
        again = sana.generate(**chosen.metadata)
        assert np.array_equal(again.pixels, tiled.pixels) and again.metadata == chosen.metadata
        assert not any(note.startswith(TILED) for note in again.notes)
        with pytest.raises(OutOfMemory, match="96x96"):
            sana.generate(PROMPT, tile=0, **options)


def test_tiles_on_the_command_line(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["generate", PROMPT, "--model", str(tiny_folder), "--steps", "1", "--seed", "3", "--json"]
    found = []
    for tile in ("64", "off"):
        assert main([*arguments, "--tile", tile, "--output", f"{tile}.png"]) == 0
        found.append(json.loads(capsys.readouterr().out)["tile"])
    assert found == [64, 0]
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--tile", "some"])
    assert "argument --tile: 'some' is no number of pixels, nor off" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "export", "models pull"])
def test_every_command_has_revisions(
    tiny_folder: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = [] if command == "models pull" else ["--output", str(tmp_path / "new")]
    assert main([*command.split(), str(tiny_folder), "--revision", "v1", *output]) == 1
    assert "revision 'v1' is of a repository" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_revisions_of_what_has_none(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["models", "list", "--revision", "v1"])
    convert = ["convert", str(tmp_path / "a.pth"), "--output", str(tmp_path / "new"), "--revision", "v1"]
    assert main(convert) == 1 and "--revision without --base" in capsys.readouterr().err
    assert main([*convert, "--base", str(tiny_folder)]) == 1
    assert "revision 'v1' is of a repository" in capsys.readouterr().err
