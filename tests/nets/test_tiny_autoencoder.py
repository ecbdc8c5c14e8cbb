"""The tiny decoder: against diffusers' AutoencoderTiny, in TAESANA's own names, in INT8, as graphs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from sana_edge import CheckpointError, InvalidInput, ModelNotFound, Sana, decoding
from sana_edge.calib.folding import decoder_folds
from sana_edge.cli.main import main
from sana_edge.image_metrics import psnr
from sana_edge.int8 import quant
from sana_edge.nets.convert import read_decoder
from sana_edge.nets.quantize import decoder_targets, quantize_decoder
from sana_edge.nets.tiny_autoencoder import TinyAutoencoder, latent_decoder
from sana_edge.plan.maps import decode_bytes
from sana_edge.store import package
from sana_edge.store.folder import read_json
from sana_edge.store.identify import identify
from sana_edge.store.tiny_autoencoder import TinyAutoencoderConfig, decoder_config
from sana_edge.torch_runtime import tiling

PROMPT = "a red house"
# about a hundred roundings of 2^-24 added up over the layers, as for the DC-AE
TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


def original(widths: tuple[int, ...], blocks: tuple[int, ...], latents: int = 32) -> nn.Sequential:
    """The decoder as its author numbers it; the image is 0 to 1."""
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latents, widths[0], 3, padding=1), nn.ReLU()]
    for stage, count in enumerate(blocks):
        layers += [Block(widths[stage]) for _ in range(count)]
        if stage + 1 < len(widths):
            layers += [nn.Upsample(scale_factor=2)]
            layers += [nn.Conv2d(widths[stage], widths[stage + 1], 3, padding=1, bias=False)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = nn.Sequential(*layers, nn.Conv2d(widths[-1], 3, 3, padding=1))
        for tensor in made.parameters():
            # of maps that neither grow nor fade: an input has 9 values of each channel
            nn.init.normal_(tensor, std=tensor[0].numel() ** -0.5 if tensor.ndim == 4 else 0.1)
    return made.requires_grad_(False).eval()


# of TAESANA, an eighth as wide
WIDTHS, BLOCKS = (32, 16, 8, 8, 8, 8), (3, 3, 3, 3, 3, 1)


@pytest.fixture(scope="module")
def authors() -> nn.Sequential:
    return original(WIDTHS, BLOCKS)


@pytest.fixture(scope="module")
def file(authors: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taesana") / "taesana_decoder.pth"
    torch.save(authors.state_dict(), path)
    return path


def loaded(file: Path) -> TinyAutoencoder:
    found = read_decoder(file)
    made = latent_decoder(found.config)
    assert isinstance(made, TinyAutoencoder)
    made.load_state_dict(found.state)
    return made.requires_grad_(False).eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def latent(height: int, width: int, channels: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn((1, channels, height, width), generator=generator)


@pytest.mark.parametrize("act_fn", ["relu", "silu"])
def test_parity_with_diffusers(act_fn: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderTiny(
        decoder_block_out_channels=(24,) * 4,
        encoder_block_out_channels=(8,) * 4,
        num_decoder_blocks=(2, 1, 3, 1),
        latent_channels=5,
        act_fn=act_fn,
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = loaded(tmp_path)
    assert ours.config == decoder_config(read_json(tmp_path / "config.json"))
    x = latent(7, 5, 5)
    with torch.no_grad():
        expected = theirs.decode(x).sample
        assert relative_error(ours.decode(x.clone()), expected) < TOLERANCE
    # where gradients are recorded nothing is overwritten
    assert relative_error(ours.requires_grad_(True).decode(x.clone()).detach(), expected) < TOLERANCE


def test_strips_are_the_whole(file: Path, authors: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "STRIP_BYTES", 0)
    x = latent(5, 3)
    with torch.no_grad():
        assert relative_error(loaded(file).decode(x.clone()), 2 * authors(x) - 1) < TOLERANCE


def test_taesanas_layers() -> None:
    """1.2 million parameters of a TAESD at 8x, and the wider stages before them."""
    state = original((256, 128, 64, 64, 64, 64), BLOCKS).state_dict()
    config = TinyAutoencoderConfig(32, 3, (256, 128, 64, 64, 64, 64), BLOCKS)
    with torch.device("meta"):
        ours = latent_decoder(config)
    assert config.spatial_compression == 32
    assert sum(p.numel() for p in ours.parameters()) == sum(t.numel() for t in state.values())
    assert {"1.weight", "7.weight", "12.weight", "28.conv.4.bias", "29.bias"} <= set(state)
    assert not {"6.weight", "7.bias", "30.weight"} & set(state)


@pytest.mark.parametrize("kind", ["pth", "safetensors", "prefix", "folder", "diffusers", "both"])
def test_the_files_people_have(
    tiny_folder: Path, file: Path, authors: nn.Sequential, tmp_path: Path, kind: str
) -> None:
    state, place = authors.state_dict(), tmp_path / "taesana_decoder.safetensors"
    if kind == "pth":
        place = file
    elif kind in ("safetensors", "folder"):
        save_file(state, place)
        place = tmp_path if kind == "folder" else place
    elif kind == "prefix":
        place = tmp_path / "a.pth"
        torch.save({"state_dict": {f"module.decoder.{name}": t for name, t in state.items()}}, place)
    elif kind == "diffusers":
        assert main(["convert", str(file), "--output", str(tmp_path / "new")]) == 0
        place = tmp_path / "new" / "vae"
    else:
        # both halves in one file, as some programs save them
        both = {name: tensor.contiguous() for name, tensor in read_decoder(file).state.items()}
        save_file({**both, "encoder.layers.0.weight": torch.zeros(8, 3, 3, 3)}, place)
    with Sana.load(tiny_folder, decoder=place) as sana, Sana.load(tiny_folder, decoder=file) as other:
        options = {"steps": 1, "seed": 3, "size": (96, 64)}
        image = sana.generate(PROMPT, **options)
        assert np.array_equal(image.pixels, other.generate(PROMPT, **options).pixels)
        assert image.metadata["decoder"] == place.name and image.pixels.std() > 5


def test_latents_are_taken_as_the_sampler_leaves_them(
    tiny_folder: Path, file: Path, authors: nn.Sequential
) -> None:
    with Sana.load(tiny_folder, decoder=file) as sana:
        pixels = sana._open().decode(x := latent(2, 3))
    expected = authors(x)[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    # where a level's edge lies within rounding
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("tile", [None, 64])
def test_tiles(file: Path, tile: int | None) -> None:
    ours, told = loaded(file), []
    x = latent(3, 4)
    found = tiling.decode(ours, x, tile=tile, on_block=lambda done, total: told.append((done, total)))
    assert found.shape == (1, 3, 96, 128)
    tiles = 1 if tile is None else 3 * 4
    assert told == [(n, tiles * sum(BLOCKS)) for n in range(tiles * sum(BLOCKS))]
    small, large = (decode_bytes(ours.config, n, n, 4) for n in (8, 64))
    # the widest map, that of the picture, and the strips of it
    assert 4 * 8 * (32 * 64) ** 2 < large < 16 * 8 * (32 * 64) ** 2 and small < large


def test_int8(file: Path) -> None:
    float_model, model = loaded(file), loaded(file)
    quantize_decoder(model)
    targets = decoder_targets(model)
    assert len(targets) == 3 * sum(BLOCKS) + 5 + 2 and targets[0] == "decoder.layers.0"
    assert targets[-1] == f"decoder.layers.{len(model.layers) - 1}"
    x = latent(6, 5)
    expected = float_model.decode(x.clone())
    # 55 layers, each with the noise of two roundings to 255 steps, of a Gaussian's absmax: 40 dB each, and a
    # residual stream that keeps half of it
    assert quant.sqnr(model.decode(x.clone()), expected) > 20


def test_a_relu_lets_factors_through(file: Path) -> None:
    model = loaded(file)
    x = latent(3, 3)
    expected = model.decode(x.clone())
    folds = decoder_folds(model)
    assert len(folds) == 2 * sum(BLOCKS) and set(folds) < set(decoder_targets(model))
    for name, divide in folds.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        factors = torch.rand(layer.in_channels, generator=torch.Generator().manual_seed(len(name))) + 0.5
        divide(factors)
        layer.weight.mul_(factors[:, None, None])
    assert relative_error(model.decode(x.clone()), expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["float", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_whole_model_with_it(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Converted with the rest of a model, quantized, exported, and drawn by both engines."""
    onnx_export = pytest.importorskip("sana_edge.export.onnx", reason="onnx is not installed")
    monkeypatch.setenv("SANA_EDGE_CACHE", str(tmp_path / "cache"))
    model, file = tmp_path / "new", tmp_path / "few_layers.pth"
    torch.save(original((16, 8, 8, 8, 8, 8), (1,) * 6).state_dict(), file)
    assert main(["convert", str(file), "--output", str(model), "--base", str(tiny_folder)]) == 0
    assert read_json(model / "model_index.json")["vae"] == ["diffusers", "AutoencoderTiny"]
    options = {"steps": 1, "seed": 3}
    with Sana.load(tiny_folder, decoder=file) as sana:
        expected = sana.generate(PROMPT, **options)
    with Sana.load(model) as sana:
        assert np.array_equal(sana.generate(PROMPT, **options).pixels, expected.pixels)
        with pytest.raises(InvalidInput, match="has no encoder"):
            sana.generate(PROMPT, image=expected, **options)
    if kind == "int8":
        model = quantized(model, tmp_path)
    # which compares each graph and each part with the module
    made = onnx_export.export(str(model), tmp_path / "graphs")
    tails = [f"decoder_tail_{n}" for n in range(5)]
    assert [part.graph for part in made.decoder_parts] == ["decoder_head", *tails]
    assert made.cell == 32 and made.verification is not None
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend, reason=f"{backend} is not installed")
        # OpenVINO's own choice is bf16 where the CPU multiplies that
        with Sana.load(tmp_path / "graphs", backend=backend, device="cpu", dtype="fp32") as sana:
            drawn = sana.generate(PROMPT, **options)
        if kind == "float":
            # where a level's edge lies within rounding
            assert np.abs(drawn.pixels.astype(int) - expected.pixels.astype(int)).max() <= 1
        else:
            # 40 dB a layer, some 40 layers of noise that adds up: 40 - 10 log10(40) is 24
            assert psnr(drawn.pixels, expected.pixels) > 20


def quantized(model: Path, place: Path) -> Path:
    (place / "prompts.txt").write_text(PROMPT)
    quick = ["--steps", "1", "--pictures", "0", "--keep-fp16", "none", "--size", "64x64", "--quiet"]
    quick += ["--prompts", str(place / "prompts.txt")]
    assert main(["quantize", str(model), "--output", str(place / "int8"), *quick]) == 0
    assert package.read(place / "int8" / "vae") is not None
    return place / "int8"


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("taesd", "has 4 channels, the model's latents are of 32", "same latents"),
        ("encoder", "has no decoder", "file of its decoder"),
        ("taesana encoder", "is no decoder: it is .* tiny autoencoder's encoder", "taesana_decoder.pth"),
        ("more", "does not fit its config: 1 unexpected keys", ""),
        ("cut", "cut off", "download it again"),
        ("activation", "act_fn is 'mish', expected one of relu, silu", ""),
        ("bilinear", "upsample_fn is 'bilinear', expected 'nearest'", ""),
        ("kl", "is a AutoencoderKL", "AutoencoderTiny"),
    ],
)
def test_what_is_refused(
    tiny_folder: Path, file: Path, tmp_path: Path, kind: str, message: str, hint: str
) -> None:
    place = tmp_path / "a.pth"
    if kind == "taesd":
        torch.save(original((8,) * 4, (3, 3, 3, 1), latents=4).state_dict(), place)
    elif kind == "encoder":
        torch.save({"0.weight": torch.zeros(8, 3, 3, 3), "3.conv.0.weight": torch.zeros(8, 8, 3, 3)}, place)
    elif kind == "taesana encoder":
        torch.save({"0.weight": torch.zeros(8, 3, 3, 3), "4.conv.0.weight": torch.zeros(8, 8, 3, 3)}, place)
    elif kind == "more":
        torch.save({**torch.load(file), "3.pool.0.weight": torch.zeros(3)}, place)
    elif kind == "cut":
        place.write_bytes(file.read_bytes()[:-500])
    else:
        place = tmp_path / "vae"
        assert main(["convert", str(file), "--output", str(tmp_path)]) == 0
        changed = {"activation": {"act_fn": "mish"}, "bilinear": {"upsample_fn": "bilinear"}}
        config = read_json(place / "config.json") | changed.get(kind, {"_class_name": "AutoencoderKL"})
        (place / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, ModelNotFound), match=message) as caught:
        Sana.load(tiny_folder, decoder=place)
    assert hint in caught.value.hint


def test_what_it_is_called(file: Path, tmp_path: Path) -> None:
    found = identify(file)
    assert "a SANA tiny autoencoder in its authors' names" in found.words and found.convertible
    assert "convert" in found.hint and "--decoder" in found.hint
    shutil.copy(file, tmp_path / "decoder.pth")
    with pytest.raises(ModelNotFound, match=r"no whole model: it is .*tiny autoencoder"):
        Sana.load(tmp_path / "decoder.pth")


def test_configs() -> None:
    config = TinyAutoencoderConfig(
        latent_channels=32, decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 2)
    )
    assert decoder_config(config.to_dict()) == config
    for key, value in (
        ("latent_channels", 0),
        ("latent_channels", True),
        ("decoder_block_out_channels", [8]),
        ("decoder_block_out_channels", 8),
        ("decoder_block_out_channels", ["8", "8"]),
        ("num_decoder_blocks", [1]),
        ("num_decoder_blocks", [1, 0]),
        ("num_decoder_blocks", [1, 1000]),
        ("scaling_factor", "1"),
        ("scaling_factor", float("nan")),
        ("act_fn", []),
        ("upsampling_scaling_factor", 4),
    ):
        with pytest.raises(CheckpointError, match=key):
            decoder_config({**config.to_dict(), key: value})
    assert dataclasses.asdict(config)["out_channels"] == 3
