"""The INT8 denoiser: as close to the float one as its rounding allows, in every form, dtype and layout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.int8 import quant
from sana_edge.int8.linear import Linear, W8A8Linear
from sana_edge.nets.block import Constant
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import denoiser_targets, quantize_denoiser, set_activations
from sana_edge.nets.text_encoder import TextFeatures

CONFIG = DenoiserConfig(
    in_channels=8,
    out_channels=8,
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=16,
    num_cross_attention_heads=2,
    cross_attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=40,
    sample_size=8,
)
FORMS = {
    "sana-1.0": CONFIG,
    "sana-1.5": replace(CONFIG, qk_norm="rms_norm_across_heads"),
    "sprint": replace(CONFIG, qk_norm="rms_norm_across_heads", guidance_embeds=True),
    "2k": replace(CONFIG, interpolation_scale=1.0),
    "attention-bias": replace(CONFIG, attention_bias=True),
}
FULL = DenoiserConfig(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
# A layer's output is off by about 1.2 %: values up to 3 or 4 deviations in 127 steps, so that a rounding is
# off by 0.8 % of one, on both sides. Each of the 3 layers adds three such branches: sqrt(3 · 3) · 1.2 %.
VELOCITY_ERROR = 0.036


def random_denoiser(config: DenoiserConfig) -> Denoiser:
    """Every parameter random, activations near 1."""
    denoiser = Denoiser(config).requires_grad_(False).eval()
    for name, parameter in denoiser.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name:
            parameter.add_(1)
    return denoiser


def in_int8(denoiser: Denoiser, **options: object) -> Denoiser:
    quantized = copy.deepcopy(denoiser)
    quantize_denoiser(quantized, **options)  # type: ignore[arg-type]
    return quantized


def features(*lengths: int) -> TextFeatures:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.randn(len(lengths), max(lengths), 40), mask)


@torch.no_grad()
def run(denoiser: Denoiser, latent: Tensor, *groups: TextFeatures, time: float = 400.0) -> Tensor:
    guidance = 4.5 if denoiser.config.guidance_embeds else None
    step = denoiser.modulation(torch.tensor([time]), guidance)[0]
    velocity: Tensor = denoiser(latent, step, denoiser.text_context(groups))
    return velocity


def layers(denoiser: Denoiser) -> dict[str, Linear | W8A8Linear]:
    found = {name: denoiser.get_submodule(name) for name in denoiser_targets(denoiser)}
    return {name: layer for name, layer in found.items() if isinstance(layer, Linear | W8A8Linear)}


def inputs_of_layers(denoiser: Denoiser, latent: Tensor, *groups: TextFeatures) -> dict[str, Tensor]:
    """What each layer is given in one step, as calibration collects it."""
    seen: dict[str, Tensor] = {}

    def observe(name: str) -> Callable[[Tensor], None]:
        # a layer's input is overwritten later
        return lambda x: seen.update({name: x.clone()})

    for name, layer in layers(denoiser).items():
        layer.observer = observe(name)
    run(denoiser, latent, *groups)
    for layer in layers(denoiser).values():
        layer.observer = None
    return seen


def calibrated(denoiser: Denoiser, latent: Tensor, *groups: TextFeatures) -> dict[str, float]:
    seen = inputs_of_layers(denoiser, latent, *groups)
    return {name: float(quant.tensor_scale(x)) for name, x in seen.items()}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_close_to_float(form: str) -> None:
    denoiser = random_denoiser(FORMS[form])
    quantized = in_int8(denoiser)
    assert all(isinstance(layer, W8A8Linear) for layer in layers(quantized).values())
    latent, text = torch.randn(4, 8, 6, 9), features(3, 7, 1, 5)
    for time in (980.0, 30.0):
        expected = run(denoiser, latent, text, time=time)
        assert 0 < quant.relative_error(run(quantized, latent, text, time=time), expected) <= VELOCITY_ERROR


def test_static_scales_are_close_to_float() -> None:
    """One scale per tensor spans more than one per token: here at most twice as much."""
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(2, 8, 6, 9), features(7, 5)
    scales = calibrated(denoiser, latent, text)
    assert list(scales) == denoiser_targets(denoiser)
    quantized = in_int8(denoiser, input_scales=scales, static=True)
    expected = run(denoiser, latent, text)
    static = run(quantized, latent, text)
    assert quant.relative_error(static, expected) <= 2 * VELOCITY_ERROR
    set_activations(quantized, "token")
    assert torch.equal(run(quantized, latent, text), run(in_int8(denoiser), latent, text))
    set_activations(quantized, "tensor")
    assert torch.equal(run(quantized, latent, text), static)


def test_kept_layers_stay_float() -> None:
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(1, 8, 5, 5), features(7)
    keep = ["blocks.0.expand", "blocks.2.qkv"]
    quantized = in_int8(denoiser, keep=keep)
    kept = [name for name, layer in layers(quantized).items() if isinstance(layer, Linear)]
    assert kept == ["blocks.0.expand", "blocks.2.qkv"]
    everything = in_int8(denoiser, keep=denoiser_targets(denoiser))
    assert torch.equal(run(everything, latent, text), run(denoiser, latent, text))
    error = quant.relative_error(run(quantized, latent, text), run(denoiser, latent, text))
    assert 0 < error <= VELOCITY_ERROR


def test_prompts_of_one_token_and_several_images() -> None:
    """An empty negative prompt is a constant per layer, computed by an INT8 layer as well."""
    denoiser, latent = random_denoiser(CONFIG), torch.randn(4, 8, 5, 6)
    quantized, groups = in_int8(denoiser), [features(1), features(5, 3)]
    assert isinstance(quantized.text_context(groups).layers[0][0], Constant)
    expected = run(denoiser, latent, *groups)
    assert quant.relative_error(run(quantized, latent, *groups), expected) <= VELOCITY_ERROR


def test_rows_may_have_timesteps_of_their_own() -> None:
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(2, 8, 6, 5), features(4, 7)
    quantized = in_int8(denoiser)
    with torch.no_grad():
        rows = [
            model(latent, model.modulation(torch.tensor([800.0, 30.0])), model.text_context([text]))
            for model in (denoiser, quantized)
        ]
    assert quant.relative_error(rows[1], rows[0]) <= VELOCITY_ERROR
    # a token is quantized by itself: its batch changes no more than the float parts' rounding does
    alone = run(quantized, latent[1:], TextFeatures(text.embeddings[1:], text.mask[1:]), time=30.0)
    assert quant.relative_error(rows[1][1:], alone) <= 0.1 * VELOCITY_ERROR


def channel_errors(float_layer: Linear, layer: W8A8Linear, x: Tensor) -> Tensor:
    """(out,): RMS error of each output channel, in units of a product of random x and w as large as these."""
    moved = (layer(x) - float_layer(x)).flatten(0, -2).square().mean(0).sqrt()
    return moved / (float_layer.weight.norm(dim=1) * x.square().mean().sqrt())


# the 1.2 % of above, and three times that for the worst channel where inputs have long tails
CHANNEL_ERROR = 0.035


@pytest.fixture
def pair() -> tuple[Denoiser, Denoiser, dict[str, Tensor]]:
    """Float, INT8, and the inputs of the layers."""
    torch.manual_seed(3)
    denoiser = random_denoiser(replace(CONFIG, attention_bias=True))
    return denoiser, in_int8(denoiser), inputs_of_layers(denoiser, torch.randn(2, 8, 6, 9), features(7, 5))


def worst(pair: tuple[Denoiser, Denoiser, dict[str, Tensor]]) -> dict[str, float]:
    """The largest error of a channel in each layer."""
    denoiser, quantized, seen = pair
    theirs, ours = layers(denoiser), layers(quantized)
    found = {}
    for name, x in seen.items():
        float_layer, layer = theirs[name], ours[name]
        assert isinstance(float_layer, Linear) and isinstance(layer, W8A8Linear)
        found[name] = float(channel_errors(float_layer, layer, x).max())
    return found


def test_every_channel_of_every_layer_is_close(pair: tuple[Denoiser, Denoiser, dict[str, Tensor]]) -> None:
    assert max(worst(pair).values()) <= CHANNEL_ERROR


def swap(layer: W8A8Linear, name: str) -> None:
    tensor = getattr(layer, name).clone()
    tensor[[2, 9, 14, 30]] = tensor[[9, 2, 30, 14]]
    setattr(layer, name, tensor)


FAULTS: dict[str, Callable[[W8A8Linear], None]] = {
    "scale": lambda layer: layer.weight_scale.mul_(1.3),
    "channel": lambda layer: swap(layer, "weight"),
    "bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_layer_is_far_outside_of_the_tolerance(
    fault: str, pair: tuple[Denoiser, Denoiser, dict[str, Tensor]]
) -> None:
    """A wrong scale, swapped channels, a dropped bias, in each of the 18 layers in turn."""
    _, quantized, _ = pair
    for name, layer in layers(quantized).items():
        assert isinstance(layer, W8A8Linear)
        if fault == "bias" and layer.bias is None:
            assert name.endswith("project")
            continue
        good = copy.deepcopy(layer)
        FAULTS[fault](layer)
        errors = worst(pair)
        assert errors.pop(name) > 4 * CHANNEL_ERROR, name
        assert max(errors.values()) <= CHANNEL_ERROR
        quantized.set_submodule(name, good)


def test_faults_reach_the_velocity() -> None:
    """All layers wrong in the same way: what the comparison of whole networks sees."""
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(2, 8, 6, 9), features(7, 5)
    expected = run(denoiser, latent, text)
    for fault in FAULTS.values():
        quantized = in_int8(denoiser)
        for layer in layers(quantized).values():
            assert isinstance(layer, W8A8Linear)
            fault(layer)
        assert quant.relative_error(run(quantized, latent, text), expected) > 2 * VELOCITY_ERROR


def test_smoothing_is_exact_in_float() -> None:
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(2, 8, 6, 9), features(7, 1)
    smoothed = smooth(denoiser)
    assert quant.relative_error(run(smoothed, latent, text), run(denoiser, latent, text)) <= 1e-5
    # also where every row has a modulation of its own
    with torch.no_grad():
        times = torch.tensor([700.0, 20.0])
        rows = [
            model(latent, model.modulation(times), model.text_context([text]))
            for model in (denoiser, smoothed)
        ]
    assert quant.relative_error(rows[1], rows[0]) <= 1e-5
    quantized = in_int8(smoothed)
    assert quant.relative_error(run(quantized, latent, text), rows[0]) > 0.1
    assert quant.relative_error(run(quantized, latent, text), run(denoiser, latent, text)) <= VELOCITY_ERROR
    assert quantized.to(torch.bfloat16).smoothing is not None
    assert quantized.smoothing is not None and torch.equal(quantized.smoothing, smoothed.smoothing)


def smooth(denoiser: Denoiser) -> Denoiser:
    """With factors from 1/2 to 2."""
    smoothed = copy.deepcopy(denoiser)
    smoothed.smoothing = torch.exp2(2 * torch.rand(3, 2, 64) - 1)
    for index in range(3):
        for branch, name in enumerate(("qkv", "expand")):
            smoothed.get_submodule(f"blocks.{index}.{name}").weight.mul_(smoothed.smoothing[index, branch])
    return smoothed


def test_the_clamp_holds_after_dequantization() -> None:
    """The last self-attention leaves fp16's range: clipped it is far from what it is unclipped."""
    denoiser, latent, text = random_denoiser(CONFIG), torch.randn(2, 8, 6, 9), features(7, 5)
    last = denoiser.get_submodule("blocks.2")
    last.out.weight.mul_(2e5)
    # keeps the softmax over the text from tipping over at the next rounding, and the stream within fp16
    last.cross_q.weight.mul_(1e-5)
    denoiser.modulate.weight[2 * 64 : 3 * 64] *= 0.1
    denoiser.modulate.bias[2 * 64 : 3 * 64] *= 0.1
    last.table[2] *= 0.1
    unclipped, quantized = run(denoiser, latent, text), in_int8(denoiser)
    assert quant.relative_error(run(quantized, latent, text), unclipped) <= VELOCITY_ERROR
    denoiser.clamp = quantized.clamp = True
    clipped = run(denoiser, latent, text)
    assert quant.relative_error(clipped, unclipped) > 3 * VELOCITY_ERROR
    assert quant.relative_error(run(quantized, latent, text), clipped) <= VELOCITY_ERROR
    # in fp16 the layer's own output is infinite and clipped without being asked
    quantized.clamp = False
    half = run(quantized.to_compute("cpu", torch.float16), latent, text)
    assert half.isfinite().all() and quant.relative_error(half, clipped) <= VELOCITY_ERROR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_computing_in_a_dtype_casts_neither_int8_nor_what_runs_once(
    stored: torch.dtype, dtype: torch.dtype
) -> None:
    denoiser = random_denoiser(CONFIG).to(stored)
    latent, text = torch.randn(2, 8, 6, 9), features(7, 5)
    expected = run(copy.deepcopy(denoiser).float(), latent, text)
    quantized = in_int8(denoiser)
    before = quantized.state_dict()
    assert quantized.to_compute("cpu", dtype) is quantized and quantized.dtype == dtype
    cold = ("time.", "modulate.", "caption_expand.", "caption_mix.")
    for name, tensor in quantized.state_dict().items():
        layer = isinstance(quantized.get_submodule(name.rpartition(".")[0]), W8A8Linear)
        kept = layer or name.startswith(cold) or "cross_kv" in name
        assert tensor.dtype == (before[name].dtype if kept else dtype), name
    # bf16 rounds every sum and product of the float parts to 2^-9, 0.2 %: about a sixth of INT8's error each
    bound = VELOCITY_ERROR * (2 if dtype == torch.bfloat16 else 1)
    assert quant.relative_error(run(quantized, latent, text), expected) <= bound
    assert denoiser.to_compute("cpu", dtype).modulate.weight.dtype == dtype


def same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_layout_of_diffusers_and_back_is_exact(form: str, static: bool) -> None:
    """A mixed model: some layers in 16 bit, smoothed or not, with input scales or without."""
    denoiser, latent, text = random_denoiser(FORMS[form]), torch.randn(2, 8, 6, 9), features(7, 5)
    if static:
        denoiser = smooth(denoiser)
    scales = calibrated(denoiser, latent, text) if static else {}
    keep = ["blocks.1.project", "blocks.2.qkv"]
    for name in keep:
        scales.pop(name, None)
    quantized = in_int8(denoiser.to(torch.bfloat16), keep=keep, input_scales=scales)
    state = quantized.to_diffusers()
    assert all(tensor.is_contiguous() for tensor in state.values())
    block = "transformer_blocks.0."
    assert state[f"{block}attn1.to_k.weight"].dtype == torch.int8
    assert state[f"{block}ff.conv_inverted.weight"].shape == (320, 64, 1, 1)
    assert state[f"{block}attn1.to_v.weight_scale"].shape == (64,)
    assert (f"{block}attn1.to_q.input_scale" in state) is static
    assert f"{block}attn1.to_k.input_scale" not in state
    assert (f"{block}smoothing" in state) is static
    loaded = Denoiser.from_diffusers(FORMS[form], state)
    same_state(loaded.to_diffusers(), state)
    same_state(dict(loaded.state_dict()), dict(quantized.state_dict()))
    for name, layer in layers(loaded).items():
        assert isinstance(layer, W8A8Linear) is (name not in keep)
    if static:
        set_activations(quantized, "tensor")
        set_activations(loaded, "tensor")
    assert torch.equal(run(loaded, latent, text), run(quantized, latent, text))


def test_a_state_that_does_not_fit_is_refused_by_name() -> None:
    state = in_int8(random_denoiser(CONFIG)).to_diffusers()
    query = "transformer_blocks.1.attn1.to_q"

    def refused(change: dict[str, Tensor], match: str, *, drop: str = "") -> None:
        changed = {name: tensor for name, tensor in (state | change).items() if name != drop}
        with pytest.raises(CheckpointError, match=match):
            Denoiser.from_diffusers(CONFIG, changed)

    refused({}, rf"lack {query}\.weight_scale", drop=f"{query}.weight_scale")
    refused({}, rf"lack {query}\.weight$", drop=f"{query}.weight")
    scale = state[f"{query}.weight_scale"]
    refused({f"{query}.weight_scale": scale[1:]}, rf"{query}\.weight_scale is \[63\], expected \[64\]")
    refused({f"{query}.weight_scale": scale * 0}, rf"{query}\.weight_scale has values that are not above 0")
    refused({f"{query}.weight_scale": scale * math.nan}, r"not above 0")
    refused({f"{query}.weight": state[f"{query}.weight"].float()}, rf"{query}\.weight is float32.* int8")
    name = "transformer_blocks.1.attn1.to_k.input_scale"
    refused({name: torch.ones(())}, rf"{name}, which nothing reads")
    refused({"proj_out.weight_scale": torch.ones(8)}, "head has an INT8 scale")
    name = "transformer_blocks.2.ff.conv_point"
    refused({}, rf"{name}\.weight is int8, expected a float", drop=f"{name}.weight_scale")


def test_input_scales_that_are_missing_are_named() -> None:
    denoiser = random_denoiser(CONFIG)
    with pytest.raises(InvalidInput, match=r"blocks\.0\.qkv has no input scale"):
        quantize_denoiser(denoiser, static=True)
    quantize_denoiser(denoiser)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.qkv has no input_scale"):
        set_activations(denoiser, "tensor")
    with pytest.raises(InvalidInput, match="'row'"):
        set_activations(denoiser, "row")


def test_what_cannot_be_quantized_is_refused_before_anything_changes() -> None:
    denoiser = random_denoiser(CONFIG)
    with pytest.raises(InvalidInput, match=r"blocks\.0\.cross_kv"):
        quantize_denoiser(denoiser, keep=["blocks.0.cross_kv"])
    weight = denoiser.get_submodule("blocks.1.cross_out").weight
    for value in (math.nan, -math.inf):
        weight[3, 5] = value
        with pytest.raises(CheckpointError, match=r"blocks\.1\.cross_out has NaN or infinite"):
            quantize_denoiser(denoiser)
    assert all(isinstance(layer, Linear) for layer in layers(denoiser).values())
    with pytest.raises(CheckpointError, match=r"blocks\.1\.cross_out has NaN or infinite"):
        quantize_denoiser(copy.deepcopy(denoiser), values_first=False)
    quantize_denoiser(denoiser, keep=["blocks.1.cross_out"])
    with pytest.raises(SanaError, match="quantized already"):
        quantize_denoiser(denoiser)


def test_nan_in_the_latent_is_nan_in_the_velocity() -> None:
    denoiser, text = in_int8(random_denoiser(CONFIG)), features(7)
    latent = torch.randn(1, 8, 6, 9)
    latent[0, 3, 2, 4] = math.nan
    # linear attention sums over all tokens
    assert run(denoiser, latent, text).isnan().all()


@pytest.mark.slow
def test_full_size_is_within_one_percent_and_less_than_a_third_of_the_memory() -> None:
    """SANA 0.6B as its layers are initialised, 28 layers, 64 tokens, guided by an empty prompt."""
    torch.manual_seed(0)
    denoiser = Denoiser(FULL).requires_grad_(False).eval()
    size = 4 * sum(parameter.numel() for parameter in denoiser.parameters())
    latent, captions = torch.randn(1, 32, 8, 8).expand(2, -1, -1, -1), torch.randn(2, 100, 2304)
    groups = [
        TextFeatures(captions[:1, :1], torch.ones(1, 1)),
        TextFeatures(captions[1:], torch.ones(1, 100)),
    ]
    expected = run(denoiser, latent, *groups, time=500.0)
    quantize_denoiser(denoiser)
    assert quant.relative_error(run(denoiser, latent, *groups, time=500.0), expected) <= 0.01
    # as from a checkpoint in 16 bit, computing in fp32
    denoiser.to(torch.bfloat16).to_compute("cpu", torch.float32)
    stored = sum(tensor.numel() * tensor.itemsize for tensor in denoiser.state_dict().values())
    assert stored <= 0.30 * size
