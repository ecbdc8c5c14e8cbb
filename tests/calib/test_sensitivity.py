"""What each layer costs, against quantizing it by hand, and what is kept for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sana_edge.calib.folding import denoiser_folds
from sana_edge.calib.sensitivity import (
    Probe,
    Sensitivity,
    choose_kept,
    decoder_sensitivity,
    denoiser_sensitivity,
    picture_error,
    predicted_error,
    probe,
    velocity_error,
)
from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import Cancelled, CheckpointError, InvalidInput
from sana_edge.int8 import quant
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, denoiser_targets, quantize_decoder, quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.store.hub import resolve
from sana_edge.torch_runtime.runtime import TorchRuntime

TINY: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "cross_attention_dim": 64,
    "caption_channels": 40,
    "sample_size": 8,
}
DECODER: dict[str, Any] = {
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (16, 16, 32),
    "decoder_block_out_channels": (16, 16, 32),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
    "decoder_norm_types": ("rms_norm",) * 3,
    "decoder_act_fns": ("silu",) * 3,
}


@pytest.fixture
def denoiser() -> Denoiser:
    denoiser = Denoiser(DenoiserConfig(**TINY)).requires_grad_(False)
    for name, parameter in denoiser.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.5 if "table" in name else parameter[0].numel() ** -0.5)
    return denoiser


@pytest.fixture
def autoencoder() -> Autoencoder:
    return Autoencoder(AutoencoderConfig(**DECODER), encoder=False).requires_grad_(False)


@pytest.fixture
def given() -> Probe:
    """Two prompts at three steps each; the second prompt is a single token."""
    lengths = (5, 1)
    groups = [TextFeatures(torch.randn(1, n, 40), torch.ones(1, n, dtype=torch.bool)) for n in lengths]
    return Probe(
        torch.randn(6, 32, 5, 4),
        torch.tensor([999.0, 500.0, 20.0] * 2),
        None,
        groups,
        torch.randn(2, 32, 3, 4),
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Modules by identity, and tensors by value."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"modules": {name: id(module) for name, module in model.named_modules()}, "tensors": tensors}


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    now = snapshot(model)
    same = all(torch.equal(tensor, now["tensors"][name]) for name, tensor in before["tensors"].items())
    return same and now["modules"] == before["modules"] and now["tensors"].keys() == before["tensors"].keys()


@torch.no_grad()
def velocity(denoiser: Denoiser, given: Probe, text: Denoiser | None = None) -> Tensor:
    """``text`` reads the texts, if not the denoiser itself."""
    context = (text or denoiser).text_context(given.texts)
    out: Tensor = denoiser(given.latents, denoiser.modulation(given.timesteps, given.guidance), context)
    return out


def test_each_layer_of_the_denoiser_alone(denoiser: Denoiser, given: Probe) -> None:
    """The same bits as without what is computed once: blocks are given what they would have made."""
    names, before = denoiser_targets(denoiser), snapshot(denoiser)
    expected, calls = velocity(denoiser, given), []
    scales = dict.fromkeys(names, 0.02)
    for static in (False, True):
        found = denoiser_sensitivity(
            denoiser, given, input_scales=scales, static=static, progress=lambda *now: calls.append(now)
        )
        assert [item.name for item in found] == [f"denoiser.{name}" for name in names]
        for name, item in zip(names, found, strict=True):
            alone = Denoiser(denoiser.config).requires_grad_(False)
            alone.load_state_dict(denoiser.state_dict())
            quantize_denoiser(alone, keep=set(names) - {name}, input_scales={name: 0.02}, static=static)
            assert item.error == velocity_error(velocity(alone, given, denoiser), expected) > 0
    assert calls == [("try layers of the denoiser", done, 18) for done in range(1, 19)] * 2
    assert unchanged(denoiser, before)


def test_each_layer_of_the_decoder_alone(autoencoder: Autoencoder, given: Probe) -> None:
    """q, k and v count as one."""
    names, before = decoder_targets(autoencoder), snapshot(autoencoder)
    with torch.no_grad():
        expected = autoencoder.decode(given.clean)
    found = decoder_sensitivity(autoencoder, given)
    assert [item.name for item in found] == names
    for name, item in zip(names, found, strict=True):
        alone = Autoencoder(autoencoder.config, encoder=False).requires_grad_(False)
        alone.load_state_dict(autoencoder.state_dict())
        quantize_decoder(alone, keep=set(names) - {name})
        with torch.no_grad():
            assert item.error == picture_error(alone.decode(given.clean), expected) > 0
    assert unchanged(autoencoder, before)


def test_squares_add_up(denoiser: Denoiser, autoencoder: Autoencoder, given: Probe) -> None:
    """The error with all layers INT8 is within a factor of 2 of what the layers' own errors predict."""
    expected = velocity(denoiser, given)
    predicted = predicted_error(denoiser_sensitivity(denoiser, given))
    quantize_denoiser(denoiser)
    assert 0.5 < velocity_error(velocity(denoiser, given), expected) / predicted < 2

    with torch.no_grad():
        picture = autoencoder.decode(given.clean)
        predicted = predicted_error(decoder_sensitivity(autoencoder, given))
        quantize_decoder(autoencoder)
        assert 0.5 < picture_error(autoencoder.decode(given.clean), picture) / predicted < 2


def test_auto_keeps_the_promise_that_the_prediction_makes(denoiser: Denoiser, given: Probe) -> None:
    """A layer made bad by an outlier in its weight's rows is found, and keeping it helps."""
    weight = denoiser.get_submodule("blocks.1.out").weight
    assert isinstance(weight, Tensor)
    # every row's scale is made for one channel, which is all but 0
    weight[:, 3] *= 300
    value: Any = denoiser.get_submodule("blocks.1.qkv").weight
    value[2 * 64 + 3] /= 300
    expected = velocity(denoiser, given)
    kept = choose_kept(denoiser_sensitivity(denoiser, given), "auto")
    assert kept == ["denoiser.blocks.1.out"]
    whole = Denoiser(denoiser.config).requires_grad_(False)
    whole.load_state_dict(denoiser.state_dict())
    quantize_denoiser(whole)
    quantize_denoiser(denoiser, keep=[name.removeprefix("denoiser.") for name in kept])
    errors = [velocity_error(velocity(model, given), expected) for model in (denoiser, whole)]
    assert errors[0] < 0.5 * errors[1]


def test_a_probe_outlives_smoothing(denoiser: Denoiser, given: Probe) -> None:
    """It holds what goes into the network, not what the network made of it."""
    before = denoiser_sensitivity(denoiser, given)
    for layer, fold in denoiser_folds(denoiser).items():
        weight: Any = denoiser.get_submodule(layer).weight
        # powers of two change no bit of an INT8 layer with scales per token
        weight *= 4
        fold(torch.full((weight.shape[1],), 4.0))
    assert denoiser.smoothing is not None
    after = denoiser_sensitivity(denoiser, given)
    assert [item.error for item in after] == pytest.approx([item.error for item in before], rel=1e-3)


@pytest.mark.parametrize("after", [1, 7, 18])
def test_an_interruption_leaves_the_float_model(denoiser: Denoiser, given: Probe, after: int) -> None:
    before = snapshot(denoiser)

    def cancel(name: str, done: int, count: int) -> None:
        if done == after:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        denoiser_sensitivity(denoiser, given, progress=cancel)
    assert unchanged(denoiser, before)


def test_nan_in_a_weight_names_the_layer(denoiser: Denoiser, autoencoder: Autoencoder, given: Probe) -> None:
    before = {name: id(module) for name, module in denoiser.named_modules()}
    weight: Any = denoiser.get_submodule("blocks.2.project").weight
    weight[3, 5] = math.nan
    with pytest.raises(CheckpointError, match=r"blocks\.2\.project"):
        denoiser_sensitivity(denoiser, given)
    assert {name: id(module) for name, module in denoiser.named_modules()} == before
    weight = autoencoder.get_submodule("decoder.conv_out").weight
    weight[0, 0] = math.inf
    with pytest.raises(CheckpointError, match=r"decoder\.conv_out"):
        decoder_sensitivity(autoencoder, given)


def sensitivities(*errors: float) -> list[Sensitivity]:
    return [Sensitivity(f"layer{n}", error) for n, error in enumerate(errors)]


def test_kept_layers() -> None:
    found = sensitivities(*[0.001] * 17, 0.02, 0.001, 0.008)
    assert choose_kept(found, "none") == choose_kept(found, 0) == []
    assert choose_kept(found, 1) == ["layer17"]
    assert choose_kept(found, 2) == ["layer17", "layer19"]
    assert len(choose_kept(found, 99)) == 20
    # sqrt(18 · 0.001² + 0.008²) = 0.0091
    assert choose_kept(found, "auto") == ["layer17"]
    assert choose_kept(found, "auto", target=0.008) == ["layer17", "layer19"]
    assert choose_kept(found, "auto", target=0.05) == []
    # a tenth of the layers at most
    assert choose_kept(found, "auto", target=1e-6) == ["layer17", "layer19"]
    assert choose_kept(sensitivities(*[1.0] * 9), "auto") == choose_kept([], "auto") == []


def test_a_layer_that_makes_nan_is_kept_first() -> None:
    found = sensitivities(*[0.01] * 18, math.nan, 3.0)
    assert choose_kept(found, 1) == ["layer18"]
    assert choose_kept(found, "auto") == ["layer18", "layer19"]


@pytest.mark.parametrize("budget", [-1, 1.5, "many", True, None, math.nan])
def test_bad_budgets(budget: Any) -> None:
    with pytest.raises(InvalidInput, match="layers to keep are"):
        choose_kept(sensitivities(0.1), budget)


def runtime(folder: Path) -> TorchRuntime:
    return TorchRuntime.load(resolve(str(folder)), device=torch.device("cpu"), dtype="fp32")


def test_probes_are_what_the_sampler_passes_through(tiny_folder: Path) -> None:
    model = runtime(tiny_folder)
    given = probe(model, ["a red house", "a cat on a mat"], cells=4, steps=5, seed=3)
    assert given.latents.shape == (6, 32, 4, 4) and given.clean.shape == (2, 32, 4, 4)
    assert torch.equal(
        given.latents[0], torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(3))[0]
    )
    # from noise to the end: the first prompt's rows get nearer to its finished latent
    clean = given.clean * model.autoencoder.config.scaling_factor
    near = [quant.relative_error(latent, clean[0]) for latent in given.latents[:3]]
    assert near == sorted(near, reverse=True)
    assert probe(model, ["a red house"], cells=6, steps=1).clean.shape == (1, 32, 4, 4)
    assert len(denoiser_sensitivity(model.denoiser, given)) == 12
    assert len(decoder_sensitivity(model.autoencoder, given)) == len(decoder_targets(model.autoencoder))


def test_sprint_has_two_steps_to_probe(tiny_sprint_folder: Path) -> None:
    model = runtime(tiny_sprint_folder)
    given = probe(model, ["a red house"], cells=2)
    assert given.latents.shape == (2, 32, 2, 2)
    assert given.timesteps.shape == (2,) and given.guidance == 4.5
    assert all(item.error > 0 for item in denoiser_sensitivity(model.denoiser, given))
    with pytest.raises(InvalidInput, match="no prompts"):
        probe(model, [])
