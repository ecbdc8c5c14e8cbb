"""Smoothing: the float model stays what it is, its layers are easier to round, and statistics follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from sana_edge.calib.clip import clip
from sana_edge.calib.folding import decoder_folds, denoiser_folds
from sana_edge.calib.smooth import ALPHAS, Smoothed, smooth, smooth_decoder
from sana_edge.calib.statistics import LayerStatistics, Statistics
from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.int8 import quant
from sana_edge.int8.linear import W8A8Linear
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import decoder_targets, denoiser_targets, quantize_denoiser
from sana_edge.nets.text_encoder import TextFeatures

TINY: dict[str, Any] = {
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 64,
    "caption_channels": 40,
    "sample_size": 8,
}
FORMS: dict[str, dict[str, Any]] = {
    "sana-1.0": {},
    "sana-1.5": {"qk_norm": "rms_norm_across_heads"},
    "sprint": {"qk_norm": "rms_norm_across_heads", "guidance_embeds": True},
    "2k": {"interpolation_scale": 1.0},
    "attention-bias": {"attention_bias": True},
}
STEPS = (999.0, 500.0, 20.0)
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


def random_denoiser(**changes: Any) -> Denoiser:
    """Every parameter random, with a spread of sizes over the rows: there is something to smooth."""
    denoiser = Denoiser(DenoiserConfig(**TINY | changes)).requires_grad_(False)
    for name, parameter in denoiser.named_parameters():
        parameter.normal_(std=0.5 if "table" in name else max(parameter[0].numel(), 4) ** -0.5)
        if parameter.ndim > 1:
            parameter.mul_(torch.randn(len(parameter)).exp().view(-1, *[1] * (parameter.ndim - 1)))
        if "norm" in name:
            parameter.add_(1)
    return denoiser


def random_autoencoder(**changes: Any) -> Autoencoder:
    autoencoder = Autoencoder(AutoencoderConfig(**DECODER | changes), encoder=False).requires_grad_(False)
    for name, parameter in autoencoder.named_parameters():
        parameter.normal_(std=max(parameter[0].numel(), 4) ** -0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1)
    return autoencoder


class Calls:
    """One way to use a denoiser: a batch of four latents, all steps, with texts in some grouping."""

    def __init__(self, denoiser: Denoiser, texts: str = "rows") -> None:
        channels = denoiser.config.caption_channels
        lengths = {"rows": [[3, 7, 1, 5]], "one token": [[1]], "cfg": [[1, 1], [6, 4]]}[texts]
        self.latent = torch.randn(4, denoiser.config.in_channels, 5, 6)
        self.groups = [
            TextFeatures(torch.randn(len(own), 7, channels), torch.arange(7) < torch.tensor(own)[:, None])
            for own in lengths
        ]

    def __call__(
        self, denoiser: Denoiser, on_step: Callable[[int], None] = lambda step: None
    ) -> list[Tensor]:
        """Velocities (4, C, 5, 6) of all steps."""
        context = denoiser.text_context(self.groups)
        tables = denoiser.modulation(torch.tensor(STEPS), 4.5 if denoiser.config.guidance_embeds else None)
        velocities = []
        for step in range(len(STEPS)):
            on_step(step)
            velocities.append(denoiser(self.latent.to(tables.blocks.dtype), tables[step], context))
        return velocities


@contextmanager
def listening(
    model: nn.Module, targets: list[str], steps: int, prefix: str
) -> Iterator[tuple[Statistics, list[int]]]:
    """Inside, everything that the targets read is added to the step in the list."""
    step = [0]
    layers = {}
    for name in targets:
        layer = model.get_submodule(name)
        layers[prefix + name] = LayerStatistics.empty(steps, layer.weight.shape[1])

        def see(own: LayerStatistics, x: Tensor) -> None:
            rows = x.flatten(0, -2).float()
            own.update(step[0], rows)
            own.add_samples(step[0], list(rows[:: max(len(rows) // 64, 1)].clone()))

        layer.observer = partial(see, layers[prefix + name])
    yield Statistics(layers), step
    for name in targets:
        model.get_submodule(name).observer = None


def observed(denoiser: Denoiser, calls: Calls) -> tuple[Statistics, list[Tensor]]:
    """Statistics of all steps, and the velocities."""
    with listening(denoiser, denoiser_targets(denoiser), len(STEPS), "denoiser.") as (statistics, step):
        velocities = calls(denoiser, lambda number: step.__setitem__(0, number))
    return statistics, velocities


def worst(actual: list[Tensor], expected: list[Tensor]) -> float:
    return max(quant.relative_error(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("texts", ["rows", "one token", "cfg"])
@pytest.mark.parametrize("form", FORMS)
def test_the_smoothed_float_model_is_the_model(form: str, texts: str) -> None:
    """1e-5: a hundred fp32 roundings. Texts of one token take the path that precomputes ``cross_out``."""
    denoiser = random_denoiser(**FORMS[form])
    calls = Calls(denoiser, texts)
    # with a text of one token alone, nothing reads cross_q and cross_out but the constant
    statistics, expected = observed(denoiser, Calls(denoiser))[0], calls(denoiser)
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    results = smooth(denoiser, statistics, alpha=0.7)
    assert worst(calls(denoiser), expected) <= 1e-5
    assert {item.name.split(".")[-1] for item in results if not item.alpha} == {"cross_q"}
    for name in denoiser_folds(denoiser):
        ratio = denoiser.state_dict()[f"{name}.weight"] / before[f"{name}.weight"]
        assert ratio.max() > 1.5 and ratio.min() < 0.7


def test_in_bf16_weights_are_rounded_once_more() -> None:
    """By 2^-9 each, as bf16 itself rounds everywhere: the smoothed model is as near to fp32 as the other."""
    denoiser = random_denoiser()
    calls = Calls(denoiser)
    statistics, expected = observed(denoiser, calls)
    rounded = worst(calls(denoiser.to(torch.bfloat16)), expected)
    smooth(denoiser, statistics, alpha=0.7)
    assert worst(calls(denoiser), expected) <= 2 * rounded


def test_statistics_become_those_of_the_smoothed_model() -> None:
    denoiser = random_denoiser()
    calls = Calls(denoiser)
    statistics, _ = observed(denoiser, calls)
    smooth(denoiser, statistics, alpha=0.7)
    for name, after in observed(denoiser, calls)[0].layers.items():
        own = statistics.layers[name]
        torch.testing.assert_close(own.absmax, after.absmax, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.samples, after.samples, rtol=1e-3, atol=1e-4)
        assert torch.equal(own.sample_steps, after.sample_steps)
        # half of the rows are samples here: a scale chosen from them is about the one chosen from all
        assert clip(own) == pytest.approx(clip(after), rel=0.25)
        assert clip(own, method="absmax") == pytest.approx(clip(after, method="absmax"), rel=1e-4)
        counted = own.histogram.sum(1) / after.histogram.sum(1)
        assert bool(((counted > 0.5) & (counted < 1.5)).all())


@pytest.mark.parametrize("activations", ["token", "tensor"])
def test_auto_measures_what_the_layers_do(activations: Any) -> None:
    denoiser = random_denoiser()
    statistics, _ = observed(denoiser, Calls(denoiser))
    samples = {name: layer.samples.clone() for name, layer in statistics.layers.items()}
    plain = {
        f"denoiser.{name}": denoiser.get_submodule(name).weight.clone() for name in denoiser_targets(denoiser)
    }
    results = smooth(denoiser, statistics, activations=activations)
    assert [item.name for item in results] == list(plain)
    assert sum(item.alpha > 0 for item in results) >= 8
    for item in results:
        assert item.alpha in ALPHAS
        assert bool(item.reason) == (item.alpha == 0)
        assert getattr(item.after, activations) <= getattr(item.before, activations)
        if item.name.endswith("qkv"):
            # its v rows were divided afterwards
            continue
        errors = layer_errors(denoiser, item, statistics, samples[item.name] @ plain[item.name].T)
        # of 180 rows, those of 90
        assert errors == pytest.approx((item.after.tensor, item.after.token), rel=0.3)


def test_a_fixed_alpha_reports_what_the_layers_do() -> None:
    denoiser = random_denoiser()
    statistics, _ = observed(denoiser, Calls(denoiser))
    # fp32 and few outputs: the trial looks at the weight itself
    results = smooth(denoiser, statistics, alpha=0.5)
    for item in results:
        if item.alpha and not item.name.endswith("qkv"):
            weight = cast(Tensor, denoiser.get_submodule(item.name.removeprefix("denoiser.")).weight)
            # what was smoothed is the same product
            expected = statistics.layers[item.name].samples @ weight.T
            errors = layer_errors(denoiser, item, statistics, expected)
            assert errors == pytest.approx((item.after.tensor, item.after.token), rel=0.3)


def layer_errors(
    denoiser: Denoiser, item: Smoothed, statistics: Statistics, expected: Tensor
) -> tuple[float, float]:
    """Of the real INT8 layer on the samples: with a scale per tensor, and with scales per token."""
    linear = denoiser.get_submodule(item.name.removeprefix("denoiser."))
    assert isinstance(linear, nn.Linear)
    seen = statistics.layers[item.name]
    scale = torch.tensor(clip(seen, weight=linear.weight))
    layer = W8A8Linear.from_float(linear, input_scale=scale, static=True)
    # between equal steps of tokens as they are, and equal tokens
    of_step = torch.stack([expected[seen.sample_steps == step].norm() for step in range(len(STEPS))])
    share = (expected.norm(dim=1) * of_step[seen.sample_steps]).rsqrt()[:, None]

    def error() -> float:
        output = layer(seen.samples) - (0 if linear.bias is None else linear.bias)
        return quant.relative_error(output * share, expected * share)

    static = error()
    layer.set_static(False)
    return static, error()


def test_alpha_0_changes_nothing() -> None:
    denoiser = random_denoiser()
    statistics, _ = observed(denoiser, Calls(denoiser))
    before = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    checksum = statistics.checksum()
    results = smooth(denoiser, statistics, alpha=0)
    assert all(item.alpha == 0 and item.reason for item in results)
    assert denoiser.smoothing is None and statistics.checksum() == checksum
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.state_dict().items())


def test_dead_channels_stay_finite() -> None:
    denoiser = random_denoiser()
    block: Any = denoiser.blocks[0]
    # a value channel that is always 0, and one that nothing reads
    block.qkv.weight[2 * 64 + 3] = 0
    block.expand.weight[:, 5] = 0
    calls = Calls(denoiser)
    statistics, expected = observed(denoiser, calls)
    smooth(denoiser, statistics, alpha=1)
    assert worst(calls(denoiser), expected) <= 1e-5
    quantize_denoiser(denoiser)
    assert all(bool(velocity.isfinite().all()) for velocity in calls(denoiser))


def test_smoothing_twice_is_exact_as_well() -> None:
    denoiser = random_denoiser()
    calls = Calls(denoiser)
    statistics, expected = observed(denoiser, calls)
    smooth(denoiser, statistics, alpha=0.5)
    smooth(denoiser, statistics, alpha=0.8)
    assert worst(calls(denoiser), expected) <= 1e-5


@pytest.mark.parametrize("upsample", ["pixel_shuffle", "interpolate"])
@pytest.mark.parametrize("first", [1, 0], ids=["conv-out", "upsample-out"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_smoothed_decoder_is_the_decoder(activation: str, first: int, upsample: str) -> None:
    """With and without a second scale of attention; ``conv_out`` can be smoothed behind a ReLU alone."""
    autoencoder = random_autoencoder(
        decoder_conv_act_fn=activation, decoder_layers_per_block=(first, 1, 1), upsample_block_type=upsample
    )
    latent = torch.randn(1, 32, 3, 4)
    with listening(autoencoder, decoder_targets(autoencoder), 1, "") as (statistics, _), torch.no_grad():
        expected = autoencoder.decode(latent)
    results = smooth_decoder(autoencoder, statistics, alpha=0.7)
    smoothed = {item.name for item in results if item.alpha}
    assert smoothed == set(decoder_folds(autoencoder))
    assert sum("conv_point" in name for name in smoothed) == sum("to_out" in name for name in smoothed) == 2
    assert any("decoder.conv_out" in name for name in smoothed) == (activation == "relu")
    with torch.no_grad():
        assert quant.relative_error(autoencoder.decode(latent), expected) <= 1e-5


def test_bad_input() -> None:
    denoiser = random_denoiser()
    statistics, _ = observed(denoiser, Calls(denoiser))
    for alpha in (-0.1, 1.1, float("nan"), "much", True):
        with pytest.raises(InvalidInput, match="alpha is"):
            smooth(denoiser, statistics, alpha=alpha)  # type: ignore[arg-type]
    narrow = Statistics(dict(statistics.layers))
    narrow.layers["denoiser.blocks.1.out"] = LayerStatistics.empty(3, 60)
    with pytest.raises(InvalidInput, match=r"denoiser.blocks.1.out are of 60 channels, it has 64"):
        smooth(denoiser, narrow)
    del narrow.layers["denoiser.blocks.1.out"]
    with pytest.raises(InvalidInput, match=r"denoiser.blocks.1.out are missing"):
        smooth(denoiser, narrow)
    # nothing has been touched until here
    assert denoiser.smoothing is None
    quantize_denoiser(denoiser)
    with pytest.raises(SanaError, match=r"denoiser.blocks.0.qkv is quantized already"):
        smooth(denoiser, statistics)


W0_6B: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


def inject_outliers(denoiser: Denoiser, reading: float) -> None:
    """Make 1 % of the channels that each layer of the block reads 20 to 100 times as large, log-uniformly.

    By the weights that make them: adaLN's table and projection, rows of V, of the depthwise convolution. The
    columns of the weights that read a channel of factor f are divided by f^``reading``.
    """
    block: Any = denoiser.blocks[0]
    dim, hidden = denoiser.config.dim, denoiser.config.ffn_dim
    for layer, width in [
        (block.qkv, dim),
        (block.expand, dim),
        (block.out, dim),
        (block.cross_out, dim),
        (block.project, hidden),
    ]:
        f = torch.ones(width)
        f[torch.randperm(width)[: width // 100]] = 20 * 5 ** torch.rand(width // 100)
        layer.weight.div_(f**reading)
        if layer in (block.qkv, block.expand):
            shift, scale = (0, 1) if layer is block.qkv else (3, 4)
            for row in (shift, scale):
                block.table[row] *= f
                denoiser.modulate.weight.view(6, dim, dim)[row] *= f[:, None]
                denoiser.modulate.bias.view(6, dim)[row] *= f
            # to which 1 is added
            block.table[scale] += f - 1
        elif layer is block.project:
            block.depthwise.weight[:hidden] *= f[:, None, None, None]
            block.depthwise.bias[:hidden] *= f
        else:
            source = block.qkv if layer is block.out else block.cross_kv
            source.weight[-dim:] *= f[:, None]
            if source.bias is not None:
                source.bias[-dim:] *= f


def block_error(denoiser: Denoiser, statistics: Statistics, calls: Calls, expected: list[Tensor]) -> float:
    """RMS over the steps of the velocity's relative error, all layers INT8 with static scales."""
    int8 = Denoiser(denoiser.config).requires_grad_(False)
    int8.smoothing = None if denoiser.smoothing is None else torch.ones_like(denoiser.smoothing)
    int8.load_state_dict(denoiser.state_dict())
    names = denoiser_targets(int8)
    scales = {
        name: clip(statistics.layers[f"denoiser.{name}"], weight=int8.get_submodule(name).weight)
        for name in names
    }
    quantize_denoiser(int8, input_scales=scales, static=True)
    pairs = zip(calls(int8), expected, strict=True)
    return float(torch.tensor([quant.relative_error(*pair) for pair in pairs]).square().mean().sqrt())


@pytest.mark.parametrize(("reading", "factor"), [(0.5, 4), (0.0, 4)], ids=["half-heard", "fully-heard"])
def test_smoothing_takes_outliers_away_from_static_scales(reading: float, factor: float) -> None:
    """A block of SANA 0.6B's width, on the velocity behind it: what all of its layers do together.

    A channel 100 times as large that is read by weights like any other makes 10^4 of their energy, and the
    outputs of a layer are little else. Trained layers read theirs by smaller weights: f^-0.5 still leaves an
    outlier channel f times a normal one's energy. There the error falls to an eighth to a thirteenth (five
    seeds), to a fourth to a sixth where outliers are read in full: what is left is their own rounding.
    ``cross_q``, which cannot be smoothed, reads the token stream, where no outliers are injected.
    """
    torch.manual_seed(5)
    denoiser = Denoiser(DenoiserConfig(**TINY | W0_6B)).requires_grad_(False)
    for name, parameter in denoiser.named_parameters():
        if parameter.ndim > 1 and "table" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    inject_outliers(denoiser, reading)
    calls = Calls(denoiser)
    statistics, expected = observed(denoiser, calls)
    before = block_error(denoiser, statistics, calls, expected)
    smooth(denoiser, statistics, activations="tensor")
    assert worst(calls(denoiser), expected) <= 1e-5
    after = block_error(denoiser, statistics, calls, expected)
    assert after <= before / factor
