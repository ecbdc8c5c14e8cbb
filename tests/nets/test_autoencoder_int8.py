"""The decoder in INT8: convolutions against their definition, the whole against float, packing, storing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_edge.config import AutoencoderConfig
from sana_edge.errors import CheckpointError, InvalidInput, SanaError
from sana_edge.image_metrics import psnr
from sana_edge.int8 import conv_product, matmul, ops, quant
from sana_edge.int8.conv import Conv2d, PhaseConv2d, W8A8Conv2d, W8A8PhaseConv2d
from sana_edge.kernels import reference
from sana_edge.nets import autoencoder_blocks
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.autoencoder_blocks import ResBlock, Upsample
from sana_edge.nets.quantize import decoder_targets, prepare_decoder, quantize_decoder, stacked
from sana_edge.store.folder import read_json
from sana_edge.store.hub import resolve
from sana_edge.store.weights import load_into, load_state, save_state
from sana_edge.torch_runtime import tiling
from sana_edge.training.layout import draw_scene
from sana_edge.training.scenes import render

RES, VIT = "ResBlock", "EfficientViTBlock"
SANA = AutoencoderConfig(
    decoder_block_types=(RES, RES, VIT),
    decoder_block_out_channels=(16, 24, 32),
    decoder_layers_per_block=(1, 1, 1),
    decoder_qkv_multiscales=((), (), (5,)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu",) * 3,
    encoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(16, 24, 32),
    encoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    decoder_in_shortcut=False,
    latent_channels=8,
    attention_head_dim=8,
)
SANA = replace(SANA, decoder_block_out_channels=(16, 16, 32))
SHUFFLED = replace(SANA, upsample_block_type="pixel_shuffle", decoder_layers_per_block=(0, 1, 1))
CONFIGS = {"interpolate": SANA, "shuffled": SHUFFLED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_scale = pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
# (in, out, height, width, kernel)
SHAPES = pytest.mark.parametrize(
    "shape",
    [
        (8, 3, 1, 1, 3),
        (5, 7, 3, 5, 3),
        (33, 20, 17, 9, 3),
        (1, 1, 4, 4, 1),
        (130, 65, 2, 3, 2),
        (64, 16, 9, 17, 3),
    ],
    ids=str,
)


@pytest.fixture(params=["onednn", "wide", "unfolded"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All ways to convolve: what this CPU has, and what is used where it is refused."""
    if request.param != "onednn":
        refused = "not today" if request.param == "unfolded" else ""
        monkeypatch.setattr(conv_product, "onednn_refusal", lambda: "not today")
        monkeypatch.setattr(conv_product, "wide_refusal", lambda: refused)
        # several pieces of a small map
        monkeypatch.setattr(conv_product, "_UNFOLDED_BYTES", 3000)
        monkeypatch.setattr(conv_product, "_WIDE_BYTES", 12000)
    elif conv_product.onednn_refusal():
        pytest.skip(conv_product.onednn_refusal())
    return str(request.param)


def integers(*shape: int) -> Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def decoder(config: AutoencoderConfig) -> Autoencoder:
    """Random weights, norms and biases; nothing is 0 or 1."""
    model = Autoencoder(config, encoder=False).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def calibrated(model: Autoencoder, latent: Tensor) -> dict[str, float]:
    """Scales of the absmax of each layer's input, by its observer."""
    absmax: dict[str, float] = {}

    def observer(name: str, channels: int) -> Callable[[Tensor], None]:
        def see(x: Tensor) -> None:
            assert x.shape[-1] == channels
            absmax[name] = max(absmax.get(name, 0.0), float(x.abs().max()))

        return see

    for name in decoder_targets(model):
        layer = model.get_submodule(name)
        layer.observer = observer(name, layer.weight.shape[1])
    model.decode(latent.clone())
    for name in decoder_targets(model):
        model.get_submodule(name).observer = None
    return {name: float(quant.scales(torch.tensor(value))) for name, value in absmax.items()}


def int8(model: Autoencoder, scales: dict[str, float] | None = None) -> Autoencoder:
    model = copy.deepcopy(model)
    quantize_decoder(model, input_scales=scales)
    return model


@torch.no_grad()
def decode(model: Autoencoder, latent: Tensor) -> Tensor:
    return model.decode(latent.clone())


# --- the convolution


@SHAPES
def test_sums_are_exact_integers(shape: tuple[int, ...], product: str) -> None:
    channels, out, height, width, size = shape
    values, weight = integers(2, channels, height, width), integers(out, channels, size, size)
    one, ones = torch.ones(()), torch.ones(out)
    packed = ops.pack_conv2d(weight, padding=1)
    assert conv_product.is_packed(packed) == (product == "onednn")
    actual = ops.w8a8_conv2d(values, one, packed, ones, padding=1)
    assert torch.equal(actual, reference.w8a8_conv2d(values, one, weight, ones, padding=1))


@pytest.mark.parametrize("sign", [-127, 127])
def test_the_largest_sums_are_exact(sign: int, product: str) -> None:
    # 9 · 1100 products of 127²: 27 bits, more than fp32 holds and far more than 16
    values = torch.full((1, 1100, 3, 3), 127, dtype=torch.int8)
    weight = torch.full((2, 1100, 3, 3), sign, dtype=torch.int8)
    weight[1, ::2] = -sign
    one, ones = torch.ones(()), torch.ones(2)
    actual = ops.w8a8_conv2d(values, one, ops.pack_conv2d(weight, 1), ones, padding=1)
    assert torch.equal(actual, reference.w8a8_conv2d(values, one, weight, ones, padding=1))


@SHAPES
@each_dtype
def test_scales_and_bias(shape: tuple[int, ...], dtype: torch.dtype, product: str) -> None:
    channels, out, height, width, size = shape
    values, weight = integers(1, channels, height, width), integers(out, channels, size, size)
    scale, scales, bias = torch.tensor(0.0137), torch.rand(out) * 0.01, torch.randn(out)
    packed = ops.pack_conv2d(weight, padding=size // 2)
    actual = ops.w8a8_conv2d(values, scale, packed, scales, bias, size // 2, dtype)
    expected = reference.w8a8_conv2d(values, scale, weight, scales, bias, size // 2)
    assert actual.dtype == dtype and actual.is_contiguous(memory_format=torch.channels_last)
    # four roundings of the product or the sum, each 2^-24; then that to bf16, 2^-9
    terms = (expected - bias[:, None, None]).abs() + bias.abs()[:, None, None]
    bound = 4 * 2**-24 * terms + (2**-8 * expected.abs() if dtype == torch.bfloat16 else 0)
    assert ((actual.float() - expected).abs() <= bound).all()


def test_packing_is_undone_exactly(product: str) -> None:
    for shape in ((5, 7, 3, 3), (64, 32, 3, 3), (40, 33, 2, 2)):
        weight = integers(*shape)
        packed = ops.pack_conv2d(weight, 1)
        assert packed.shape == weight.shape and packed.dtype == torch.int8
        assert torch.equal(ops.unpack_conv2d(packed), weight)


def test_a_cpu_that_saturates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = conv_product.onednn_conv2d

    def saturating(*args: object) -> Tensor:
        return correct(*args).clamp(-(2**15), 2**15 - 1)  # type: ignore[arg-type]

    monkeypatch.setattr(conv_product, "onednn_conv2d", saturating)
    assert "saturate" in conv_product.onednn_refusal.__wrapped__()
    monkeypatch.setattr(conv_product, "_prepack", lambda *_, **__: torch.ops.onednn.no_such_operator)
    assert "cannot" in conv_product.onednn_refusal.__wrapped__()


def test_a_convolution_that_is_not_exact_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_product, "onednn_refusal", lambda: "not today")
    assert conv_product.wide_refusal.__wrapped__() == ""
    correct = F.conv2d

    def transformed(x: Tensor, weight: Tensor, *rest: object, **named: object) -> Tensor:
        out = correct(x, weight, *rest, **named)  # type: ignore[arg-type]
        # as Winograd's: a rounding of what it makes in between
        return out * (1 + 2**-20) if x.dtype == torch.float32 else out

    monkeypatch.setattr(F, "conv2d", transformed)
    assert "not exact" in conv_product.wide_refusal.__wrapped__()


def test_channels_are_parted_where_sums_would_not_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_product, "onednn_refusal", lambda: "not today")
    monkeypatch.setattr(conv_product, "wide_refusal", lambda: "")
    # 600 · 9 · 127² is beyond 2^24
    values, weight = integers(1, 600, 5, 4), integers(3, 600, 3, 3)
    values[:], weight[0] = 127, 127
    assert len(matmul.exact_parts(weight.float())) == 8
    one = torch.ones(())
    found = ops.w8a8_conv2d(values, one, weight, one.expand(3), None, 1)
    exact = F.conv2d(values.double(), weight.double(), padding=1)
    assert torch.equal(found, exact.float())


# --- its layers


def test_a_map_is_quantized_by_the_definition() -> None:
    x = torch.randn(2, 5, 7, 3)
    values, scale = ops.quantize_map(x)
    defined, absmax = reference.quantize_map(x)
    assert torch.equal(scale, absmax) and torch.equal(values, defined)
    assert values.is_contiguous(memory_format=torch.channels_last)
    # a third of the values are beyond, and -128 is not used
    scale = torch.tensor(1 / 127)
    values, same = ops.quantize_map(x, scale)
    defined, _ = reference.quantize_map(x, scale)
    assert torch.equal(same, scale) and torch.equal(values, defined)
    assert values.min() == -127 and values.max() == 127
    x[1, 2, 3, 0] = torch.inf
    for given in (None, scale):
        assert ops.quantize_map(x, given)[1].isnan() and reference.quantize_map(x, given)[1].isnan()


@each_scale
@each_dtype
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (17, 9)], ids=str)
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_layer_is_its_definition(
    kernel: int, size: tuple[int, int], dtype: torch.dtype, static: bool, product: str
) -> None:
    conv, x = Conv2d(6, 10, kernel, padding=kernel // 2), torch.randn(2, 6, *size).to(dtype)
    given = quant.tensor_scale(x) / 2 if static else None
    layer = W8A8Conv2d.from_float(conv, input_scale=given)
    weight, columns = quant.quantize_weight(conv.weight.detach())
    if kernel == 1 and not static:
        values, rows = reference.quantize_rows(x.permute(0, 2, 3, 1))
        expected = reference.w8a8_linear(values, rows, weight.flatten(1), columns, conv.bias, dtype)
        expected = expected.permute(0, 3, 1, 2)
    else:
        scale = quant.tensor_scale(x) if given is None else given
        values = reference.quantize_tensor(x, scale)
        expected = reference.w8a8_conv2d(values, scale, weight, columns, conv.bias, kernel // 2, dtype)
    actual = layer(x)
    assert actual.dtype == dtype
    # as in test_scales_and_bias; one more rounding where the two neighbours in bf16 are as near
    torch.testing.assert_close(actual, expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("interpolate", [False, True], ids=["shuffle", "interpolate"])
def test_upsampling_is_near_float(interpolate: bool, product: str) -> None:
    float_layer = Upsample(32, 16, interpolate=interpolate, shortcut=True).requires_grad_(False)
    layer, x = copy.deepcopy(float_layer), torch.randn(2, 32, 5, 3)
    kind = W8A8PhaseConv2d if interpolate else W8A8Conv2d
    layer.conv = kind.from_float(float_layer.conv)
    with torch.no_grad():
        assert quant.sqnr(layer(x), float_layer(x)) > 34
    # with gradients recorded elsewhere it is another path
    torch.testing.assert_close(layer(x), layer.requires_grad_(False)(x))


def test_each_phase_has_its_own_scales() -> None:
    conv = PhaseConv2d(3, 4, 3, padding=1)
    layer = W8A8PhaseConv2d.from_float(conv)
    assert layer.weight.shape == (4, 4, 3, 2, 2) and layer.weight_scale.shape == (4, 4)
    for n, kernel in enumerate(conv.kernels()):
        assert torch.equal(layer.weight_scale[n], quant.weight_scales(kernel.detach()))
        assert torch.equal(layer.weight[n], quant.quantize_weight(kernel.detach())[0])


@pytest.mark.parametrize("rows", [2, 3, 4, 7])
@pytest.mark.parametrize("kind", ["res", "interpolate", "shuffle"])
def test_strips_change_nothing_where_scales_are_static(
    kind: str, rows: int, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "res":
        block: nn.Module = ResBlock(16, "silu")
        for name in ("conv1", "conv2"):
            layer = W8A8Conv2d.from_float(getattr(block, name), input_scale=torch.tensor(0.02))
            setattr(block, name, layer)
    else:
        block = Upsample(16, 16, interpolate=kind == "interpolate", shortcut=True)
        quantized = W8A8PhaseConv2d if kind == "interpolate" else W8A8Conv2d
        block.conv = quantized.from_float(block.conv, input_scale=torch.tensor(0.02))
    x = torch.randn(1, 16, 9, 6).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = block(x.clone())
        monkeypatch.setattr(autoencoder_blocks, "strip_rows", lambda row_bytes: rows)
        actual = block(x.clone())
    # integers are the same, and what follows is done to each pixel alone; a vector's end may round otherwise
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@each_scale
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_map_of_zeros_gives_the_bias(kernel: int, static: bool) -> None:
    conv = Conv2d(6, 10, kernel, padding=kernel // 2)
    conv.weight.data[3] = 0
    layer = W8A8Conv2d.from_float(conv, input_scale=torch.tensor(0.1) if static else None)
    actual = layer(torch.zeros(1, 6, 4, 3))
    assert torch.equal(actual, conv.bias.detach()[:, None, None].expand(1, 10, 4, 3))


@each_scale
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_comes_out_as_nan(bad: float, static: bool, product: str) -> None:
    x = torch.randn(1, 6, 4, 3)
    x[0, 2, 1, 1] = bad
    scale = torch.tensor(0.1) if static else None
    assert W8A8Conv2d.from_float(Conv2d(6, 10, 3, padding=1), input_scale=scale)(x).isnan().all()
    pixels = W8A8Conv2d.from_float(Conv2d(6, 10, 1), input_scale=scale)(x)
    assert pixels[0, :, 1, 1].isnan().all() and pixels[0, :, 2, 2].isfinite().all()
    phases = W8A8PhaseConv2d.from_float(PhaseConv2d(6, 10, 3, padding=1), input_scale=scale)
    assert all(phase.isnan().all() for phase in phases.phases(x, phases.kernels()))


def swap(layer: nn.Module) -> None:
    layer.weight[..., [0, 9], :, :, :] = layer.weight[..., [9, 0], :, :, :]


def rescale(layer: nn.Module) -> None:
    layer.weight_scale[..., 2] *= 2


def forget_bias(layer: nn.Module) -> None:
    layer.bias = None


@pytest.mark.parametrize("fault", [None, swap, rescale, forget_bias])
@pytest.mark.parametrize("kind", ["3x3", "1x1", "phases"])
def test_a_fault_shows(kind: str, fault: Callable[[nn.Module], None] | None) -> None:
    """10 channels, each a tenth of the output, half of it bias: one of twice the size leaves 13 dB."""
    x = torch.randn(1, 32, 9, 8)
    size = 1 if kind == "1x1" else 3
    conv = (PhaseConv2d if kind == "phases" else Conv2d)(32, 10, size, padding=size // 2)
    nn.init.normal_(conv.bias)
    nn.init.normal_(conv.weight, std=(32 * size**2) ** -0.5)
    layer = (W8A8PhaseConv2d if kind == "phases" else W8A8Conv2d).from_float(conv)
    if fault is not None:
        fault(layer)

    def outputs(module: nn.Module) -> Tensor:
        if kind == "phases":
            return torch.cat(list(module.phases(x, module.kernels())))
        return module(x)

    with torch.no_grad():
        sqnr = quant.sqnr(outputs(layer), outputs(conv))
    # about 127 / 4 steps of the largest value: 40 dB for the input, and for the weights
    assert sqnr > 34 if fault is None else sqnr < 20


# --- the decoder


@each_config
@each_scale
def test_decoding_is_near_float(config: AutoencoderConfig, static: bool, product: str) -> None:
    model, latent = decoder(config), torch.randn(2, 8, 5, 4)
    expected = decode(model, latent)
    quantized = int8(model, calibrated(model, latent) if static else None)
    # some 38 dB for each of a dozen layers, whose errors add up: 27 dB; random weights leave none of it out
    assert quant.sqnr(decode(quantized, latent), expected) > 24


@each_config
def test_all_targets_become_int8_and_nothing_else(config: AutoencoderConfig) -> None:
    model = decoder(config)
    targets = decoder_targets(model)
    assert len(targets) == len(set(targets)) and targets[0] == "decoder.conv_in"
    names = {name for target in targets for name in stacked(target)}
    assert any(name.endswith("to_v") for name in names)
    layers = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1
    }
    assert names == layers
    quantized = int8(model)
    state = quantized.state_dict()
    assert {name for name in state if state[name].dtype == torch.int8} == {f"{n}.weight" for n in names}
    assert decoder_targets(quantized) == targets
    parameter = next(quantized.to(torch.bfloat16).parameters())
    assert parameter.dtype == torch.bfloat16


def test_calibration_hears_every_layer_in_int8_too() -> None:
    model, latent = decoder(SANA), torch.randn(1, 8, 4, 4)
    scales = calibrated(model, latent)
    assert list(scales) == decoder_targets(model)
    heard: list[str] = []
    quantized = int8(model, scales)
    for name in decoder_targets(quantized):
        quantized.get_submodule(name).observer = lambda x, name=name: heard.append(name)
    decode(quantized, latent)
    assert heard == decoder_targets(quantized)


@each_config
@each_scale
@each_dtype
def test_what_is_stored_decodes_the_same(
    config: AutoencoderConfig, static: bool, dtype: torch.dtype, product: str, tmp_path: Path
) -> None:
    model, latent = decoder(config).to(dtype), torch.randn(1, 8, 5, 4).to(dtype)
    scales = calibrated(model, latent) if static else None
    keep = [decoder_targets(model)[1], next(n for n in decoder_targets(model) if n.endswith("conv2"))]
    quantized = copy.deepcopy(model)
    quantize_decoder(quantized, keep=keep, input_scales=scales)
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    expected = decode(quantized, latent)
    # after its weights were packed
    save_state(quantized.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())
    state = load_state(tmp_path)
    assert state[f"{keep[0]}.weight"].dtype == dtype and f"{keep[0]}.weight_scale" not in state
    with torch.device("meta"):
        loaded = Autoencoder(config, encoder=False)
    prepare_decoder(loaded, state)
    load_into(loaded, state, where="package")
    loaded.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(decode(loaded, latent), expected)
    assert torch.equal(decode(quantized, latent), expected)
    assert torch.equal(decode(copy.deepcopy(loaded), latent), expected)


def test_moves_leave_int8_and_scales_alone() -> None:
    model, latent = decoder(SANA), torch.randn(1, 8, 5, 4)
    quantized = int8(model, calibrated(model, latent))
    before = quantized.state_dict()
    expected = decode(quantized, latent)
    decode(quantized.to(torch.bfloat16, memory_format=torch.channels_last), latent.bfloat16())
    after = quantized.float().state_dict()
    for name, tensor in before.items():
        if tensor.dtype == torch.int8 or name.endswith("scale"):
            assert torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype, name
    # norms, and the depthwise convolutions, were rounded to bf16
    assert quant.sqnr(decode(quantized, latent), expected) > 30


def test_int8_takes_at_most_0_30_of_the_memory() -> None:
    """The public decoder's shapes: INT8, its scales in fp32, the rest in 16 bit."""
    public = AutoencoderConfig(decoder_block_types=(RES,) * 3 + (VIT,) * 3, upsample_block_type="interpolate")
    with torch.device("meta"):
        model = Autoencoder(public, encoder=False)
    full = 4 * sum(parameter.numel() for parameter in model.parameters())
    names = [name for target in decoder_targets(model) for name in stacked(target)]
    prepare_decoder(model, {f"{name}.weight_scale": torch.ones(1) for name in names})
    state = model.to(torch.bfloat16).state_dict()
    assert sum(tensor.nbytes for tensor in state.values()) <= 0.30 * full


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_config
@each_scale
def test_a_gpu_decodes_the_same(config: AutoencoderConfig, static: bool) -> None:
    model, latent = decoder(config), torch.randn(1, 8, 5, 4)
    quantized = int8(model, calibrated(model, latent) if static else None)
    expected = decode(quantized, latent)
    # sums are the same integers; what is rounded otherwise in between may cross a step of 127 here and there
    assert quant.sqnr(decode(quantized.cuda(), latent.cuda()).cpu(), expected) > 35


def test_a_packed_weight_is_held_once() -> None:
    layer = W8A8Conv2d.from_float(Conv2d(64, 64, 3, padding=1))
    layer(torch.randn(1, 64, 4, 4))
    assert sum(tensor.dtype == torch.int8 for tensor in (*layer.buffers(), *layer.parameters())) == 1
    assert conv_product.is_packed(layer.weight) == (not conv_product.onednn_refusal())
    assert layer.state_dict()["weight"].layout == torch.strided


def test_tiles() -> None:
    model, latent = decoder(SANA), torch.randn(1, 8, 12, 9)
    quantized = int8(model, calibrated(model, latent))
    expected = tiling.decode(model, latent, tile=32, stride=24)
    assert quant.sqnr(tiling.decode(quantized, latent, tile=32, stride=24), expected) > 24


def test_damaged_weights_are_named() -> None:
    model = decoder(SANA)
    name = next(name for name in decoder_targets(model) if name.endswith("to_q"))
    bad = f"{name[:-1]}v"
    model.get_submodule(bad).weight[0, 0] = torch.nan
    before = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=bad.replace(".", r"\.")):
        quantize_decoder(model)
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == before
    quantize_decoder(model, keep=[name])
    assert model.get_submodule(bad).weight.is_floating_point()


def test_refusals() -> None:
    model = decoder(SANA)
    with pytest.raises(InvalidInput, match="no_such_layer"):
        quantize_decoder(model, keep=["decoder.no_such_layer"])
    with pytest.raises(InvalidInput, match="no_such_layer"):
        quantize_decoder(model, input_scales={"decoder.no_such_layer": 1.0})
    quantize_decoder(model)
    with pytest.raises(SanaError, match="quantized already"):
        quantize_decoder(model)


# --- real weights


@pytest.fixture(scope="module")
def sana_tiny() -> Iterator[tuple[Autoencoder, Tensor]]:
    """Its autoencoder, and the latents (2, C, h, w) of scenes."""
    folder = resolve("sana-tiny").path / "vae"
    model = Autoencoder(AutoencoderConfig.from_dict(read_json(folder / "config.json")))
    load_into(model, {name: tensor.float() for name, tensor in load_state(folder).items()}, where="vae")
    model.to(memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    scenes = [np.asarray(render(draw_scene(random.Random(seed)), 128)) for seed in (0, 1)]
    pixels = torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        yield model, model.encode(pixels)


def pictures(model: Autoencoder, latents: Tensor) -> list[np.ndarray]:
    pixels = torch.cat([decode(model, latents[n : n + 1]) for n in range(len(latents))])
    rounded = (pixels.clamp(-1, 1) + 1).mul(127.5).round().byte()
    return [picture.permute(1, 2, 0).numpy() for picture in rounded]


@each_scale
def test_pictures_of_sana_tiny(
    sana_tiny: tuple[Autoencoder, Tensor], static: bool, record_property: Callable[[str, object], None]
) -> None:
    """40 dB: the whole INT8 model is to reach 30 dB, so that the decoder may have a tenth of its error."""
    model, latents = sana_tiny
    quantized = int8(model, calibrated(model, latents) if static else None)
    ratios = [psnr(a, b) for a, b in zip(pictures(quantized, latents), pictures(model, latents), strict=True)]
    record_property("psnr", ratios)
    assert min(ratios) > 40, ratios


@pytest.mark.parametrize("fault", [swap, rescale, forget_bias])
def test_a_fault_shows_in_pictures_of_sana_tiny(
    sana_tiny: tuple[Autoencoder, Tensor], fault: Callable[[nn.Module], None]
) -> None:
    model, latents = sana_tiny
    quantized = int8(model)
    # 12 channels, three colours of four phases
    fault(quantized.decoder.conv_out.conv)
    ratios = [psnr(a, b) for a, b in zip(pictures(quantized, latents), pictures(model, latents), strict=True)]
    assert max(ratios) < 40, ratios
