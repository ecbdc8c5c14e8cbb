"""The decoder's graph in onnxruntime against the torch decoder: float, INT8, any size, 16 bit."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from sana_edge.config import AutoencoderConfig  # noqa: E402
from sana_edge.engines import strips  # noqa: E402
from sana_edge.engines.onnxruntime import EXACT_SUMS  # noqa: E402
from sana_edge.engines.openvino.backend import sums_are_exact  # noqa: E402
from sana_edge.engines.openvino.engine import FLOAT_PRODUCTS  # noqa: E402
from sana_edge.errors import CheckpointError  # noqa: E402
from sana_edge.export.graph.builder import GraphBuilder  # noqa: E402
from sana_edge.export.graph.decoder import add_decoder  # noqa: E402
from sana_edge.export.graph.decoder_parts import add_decoder_part, decoder_parts  # noqa: E402
from sana_edge.export.graph.external_data import ExternalData  # noqa: E402
from sana_edge.int8 import quant  # noqa: E402
from sana_edge.nets.autoencoder import Autoencoder  # noqa: E402
from sana_edge.nets.quantize import decoder_targets, quantize_decoder  # noqa: E402
from sana_edge.store.hub import resolve  # noqa: E402
from sana_edge.torch_runtime.load import load_decoder  # noqa: E402

RES, VIT = "ResBlock", "EfficientViTBlock"
# repeats of the shortcuts: 4 and 2 (INTERPOLATE), 4 and none (SHUFFLED); two scales of attention
INTERPOLATE = AutoencoderConfig(
    decoder_block_types=(RES, RES, VIT),
    decoder_block_out_channels=(8, 16, 16),
    decoder_layers_per_block=(1, 2, 1),
    decoder_qkv_multiscales=((), (), (3, 5)),
    decoder_norm_types=("rms_norm",) * 3,
    decoder_act_fns=("silu", "relu", "silu"),
    encoder_block_types=(RES, RES, VIT),
    encoder_block_out_channels=(8, 16, 16),
    encoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), (5,)),
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    latent_channels=8,
    attention_head_dim=8,
    scaling_factor=0.41407,
)
SHUFFLED = replace(
    INTERPOLATE,
    upsample_block_type="pixel_shuffle",
    decoder_layers_per_block=(0, 1, 1),
    decoder_qkv_multiscales=((), (), ()),
    decoder_conv_act_fn="silu",
)
MIXED = replace(
    INTERPOLATE,
    decoder_block_types=(RES, VIT, VIT),
    decoder_qkv_multiscales=((), (5,), (5,)),
    decoder_layers_per_block=(0, 1, 1),
    decoder_in_shortcut=False,
)
CONFIGS = {"interpolate": INTERPOLATE, "shuffled": SHUFFLED, "mixed": MIXED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
# heads have 8 channels: torch multiplies in another order up to 8 tokens
SIZES = ((5, 7), (1, 1), (2, 4), (6, 3))


def decoder(config: AutoencoderConfig) -> Autoencoder:
    """Random weights, norms and biases; nothing is 0 or 1."""
    model = Autoencoder(config, encoder=False).requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def int8(model: Autoencoder, latent: Tensor) -> Autoencoder:
    """With scales of 1.2 times each layer's absmax for this latent: -128, which torch clips, stays out."""
    absmax: dict[str, float] = {}
    quantized = copy.deepcopy(model)
    for name in decoder_targets(model):
        model.get_submodule(name).observer = lambda x, name=name: absmax.update({name: float(x.abs().max())})
    decode(model, latent)
    for name in decoder_targets(model):
        model.get_submodule(name).observer = None
    scales = {name: float(quant.scales(torch.tensor(1.2 * value))) for name, value in absmax.items()}
    quantize_decoder(quantized, input_scales=scales)
    return quantized


@torch.no_grad()
def decode(model: Autoencoder, latent: Tensor) -> Tensor:
    return model.decode(latent / model.config.scaling_factor)


def export(
    model: Autoencoder, folder: Path, dtype: str = "fp32", size: tuple[int, int] | None = None
) -> Path:
    path = folder / "decoder.onnx"
    with ExternalData(folder / "decoder.data") as data:
        graph = GraphBuilder("decoder", data, dtype)
        add_decoder(graph, model, size)
        graph.save(path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def run(path: Path, latent: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_SUMS)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["pixels"], {"latent": latent.numpy()})[0])


@each_config
def test_float(config: AutoencoderConfig, tmp_path: Path) -> None:
    model = decoder(config)
    path = export(model, tmp_path)
    for size in SIZES:
        latent = torch.randn(1, 8, *size)
        # about a hundred roundings of 2^-24 added up
        assert quant.relative_error(run(path, latent), decode(model, latent)) <= 1e-5


@each_config
def test_a_fixed_size(config: AutoencoderConfig, tmp_path: Path) -> None:
    model, latent = decoder(config), torch.randn(1, 8, 3, 5)
    path = export(model, tmp_path, size=(3, 5))
    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = [
        [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    ]
    assert shapes == [[1, 8, 3, 5], [1, 3, 12, 20]]
    assert quant.relative_error(run(path, latent), decode(model, latent)) <= 1e-5


@each_config
def test_int8(config: AutoencoderConfig, tmp_path: Path) -> None:
    latents = [torch.randn(1, 8, 5, 7) for _ in range(5)]
    model = int8(decoder(config), torch.cat(latents))
    path = export(model, tmp_path)
    expected = [decode(model, latent) for latent in latents]

    def errors() -> list[float]:
        pairs = zip(latents, expected, strict=True)
        return sorted(quant.relative_error(run(path, latent), pixels) for latent, pixels in pairs)

    # Sums are the same integers, what lies between them differs by roundings of 2^-24. Those carry one value
    # in 2^22 / 127, of some ten thousand here, over the border between two steps. Then it differs by a step,
    # 1/127 of the largest, and so does what is computed from it; all others are as close as in fp32.
    found = errors()
    assert found[2] <= 1e-5 and found[-1] <= 3e-2, found
    # which sees a wrong scale
    name = next(name for name in decoder_targets(model) if name.endswith("conv_point"))
    model.get_submodule(name).weight_scale[0] *= 1.5
    path = export(model, tmp_path)
    assert errors()[2] > 1e-3


@each_config
def test_what_is_quantized(config: AutoencoderConfig, tmp_path: Path) -> None:
    model = int8(decoder(config), torch.randn(1, 8, 5, 7))
    graph = onnx.load(str(export(model, tmp_path)), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    inputs = decoder_targets(model)
    phases = [
        model.get_submodule(name).weight_scale.shape[0] == 4
        and model.get_submodule(name).weight_scale.ndim == 2
        for name in inputs
    ]
    # one for an input, however many products read it
    assert counts["QuantizeLinear"] == len(inputs)
    # and one for a weight: four of them in a phase convolution
    weights = len(inputs) + 3 * sum(phases)
    assert counts["DequantizeLinear"] == len(inputs) + weights
    stored = {tensor.name: tensor for tensor in graph.initializer}
    dequantized = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    int8_weights = [stored[name] for name in dequantized if name in stored]
    assert len(int8_weights) == weights
    assert all(tensor.data_type == onnx.TensorProto.INT8 for tensor in int8_weights)
    products = sum(isinstance(layer, torch.nn.Conv2d) for layer in model.modules())
    assert counts["Conv"] == weights + products


def test_layers_that_are_kept_stay_float(tmp_path: Path) -> None:
    model, latent = decoder(INTERPOLATE), torch.randn(1, 8, 4, 4)
    keep = [name for name in decoder_targets(model) if not name.endswith("conv2")]
    scales = {name: 0.05 for name in decoder_targets(model) if name not in keep}
    quantize_decoder(model, keep=keep, input_scales=scales)
    path = export(model, tmp_path)
    assert quant.relative_error(run(path, latent), decode(model, latent)) <= 3e-2
    graph = onnx.load(str(path), load_external_data=False).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == len(scales) == 3


def test_without_calibration_it_is_refused(tmp_path: Path) -> None:
    model = decoder(INTERPOLATE)
    quantize_decoder(model)
    with pytest.raises(CheckpointError, match=r"no input_scale") as error:
        export(model, tmp_path)
    assert "calibrate" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_16_bit(dtype: str, quantized: bool, tmp_path: Path) -> None:
    latent = torch.randn(1, 8, 5, 7)
    model = decoder(INTERPOLATE)
    exact = expected = decode(model, latent)
    if quantized:
        model = int8(model, latent)
        expected = decode(model, latent)
    path = export(model, tmp_path, dtype)
    loaded = onnx.load(str(path), load_external_data=False)
    kinds = {tensor.data_type for tensor in loaded.graph.initializer}
    assert {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype] in kinds
    # onnxruntime has no bf16 on CPUs
    if dtype == "fp16":
        # 2^-11 for each of some thirty maps; of INT8 two roundings that have nothing to do with each other
        bound = 1.5 * quant.relative_error(expected, exact) if quantized else 3e-3
        assert quant.relative_error(run(path, latent), expected) <= bound


@each_config
def test_int8_in_openvino(config: AutoencoderConfig, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    latent = torch.randn(1, 8, 5, 7)
    model = int8(decoder(config), latent)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    core = openvino.Core()
    # as the engine does
    if not sums_are_exact():
        options |= FLOAT_PRODUCTS
    request = core.compile_model(str(export(model, tmp_path)), "CPU", options).create_infer_request()
    pixels = torch.from_numpy(next(iter(request.infer({0: latent.numpy()}).values())))
    # it reorders scales around the sums, so that more steps are crossed than in `test_int8`
    assert quant.relative_error(pixels, decode(model, latent)) <= 3e-2


@each_config
def test_strips_give_the_whole_picture(
    config: AutoencoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "_MIN_ROWS_PER_HALO", 1)
    model = decoder(config)
    model = int8(model, torch.randn(1, 8, 9, 3))
    parts = decoder_parts(model)
    # what works on the whole picture, if anything, comes first; attention as the last leaves no tails
    assert [(part.halo, part.scale) for part in parts] == {
        "interpolate": [(None, 1), (3, 2), (3, 2)],
        "shuffled": [(None, 1), (3, 4)],
        "mixed": [],
    }[next(name for name in CONFIGS if CONFIGS[name] is config)]
    if not parts:
        return
    paths = [tmp_path / f"{part.name}.onnx" for part in parts]
    with ExternalData(tmp_path / "decoder.data") as data:
        for part, path in zip(parts, paths, strict=True):
            graph = GraphBuilder(part.name, data)
            add_decoder_part(graph, model, part)
            graph.save(path)
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
    latent = torch.randn(1, 8, 13, 3)
    actual = strips.decode_strips(
        latent.numpy(),
        runner(paths[0]),
        [
            strips.Tail(runner(path), part.halo or 0, part.scale, part.values)
            for part, path in zip(parts[1:], paths[1:], strict=True)
        ],
        strip_bytes=0,
    )
    # roundings of sums that were split elsewhere; no step is crossed here
    assert quant.relative_error(torch.from_numpy(actual), run(export(model, tmp_path), latent)) <= 1e-5


def runner(path: Path) -> strips.Run:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def call(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(["y"], {"x": x})[0]
        return found

    return call


@pytest.mark.parametrize("name", ["sana-tiny", "sana-tiny-int8"])
def test_sana_tiny(name: str, tmp_path: Path) -> None:
    model = load_decoder(resolve(name), device=torch.device("cpu"), dtype=torch.float32)
    latent = torch.randn(1, 32, 3, 5)
    error = quant.relative_error(run(export(model, tmp_path), latent), decode(model, latent))
    # see `test_int8`
    assert error <= (1e-5 if name == "sana-tiny" else 3e-2)
