"""The denoiser's and the text projection's graphs in onnxruntime, against the torch modules."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from sana_edge.config import DenoiserConfig  # noqa: E402
from sana_edge.engines.onnxruntime import EXACT_SUMS  # noqa: E402
from sana_edge.errors import CheckpointError, SanaError  # noqa: E402
from sana_edge.export.graph import layers as graph_layers  # noqa: E402
from sana_edge.export.graph.builder import GraphBuilder  # noqa: E402
from sana_edge.export.graph.denoiser import add_denoiser, add_denoiser_folded  # noqa: E402
from sana_edge.export.graph.external_data import ExternalData  # noqa: E402
from sana_edge.export.graph.projection import add_text_projection  # noqa: E402
from sana_edge.int8.linear import W8A8Linear  # noqa: E402
from sana_edge.nets.denoiser import Denoiser  # noqa: E402
from sana_edge.nets.quantize import (  # noqa: E402
    denoiser_targets,
    quantize_denoiser,
    set_activations,
    set_graph_activations,
)
from sana_edge.nets.text_encoder import TextFeatures  # noqa: E402
from sana_edge.store import hub  # noqa: E402
from sana_edge.torch_runtime.load import load_denoiser  # noqa: E402

CONFIG = DenoiserConfig(
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    num_cross_attention_heads=2,
    cross_attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=40,
    sample_size=8,
)
NORMED = replace(CONFIG, qk_norm="rms_norm_across_heads", num_layers=1)
FORMS = {
    "plain": CONFIG,
    "normed": NORMED,
    "sprint": replace(NORMED, guidance_embeds=True),
    "4k": replace(CONFIG, interpolation_scale=2.0),
    "odd": replace(CONFIG, attention_bias=True, norm_eps=1e-3, out_channels=16, timestep_scale=0.5),
}
GUIDANCE = 4.5
# CONTRIBUTING.md: a hundred roundings of 2^-24 added up over a module
FP32 = 1e-5
Arrays = dict[str, np.ndarray[Any, Any]]


def random_denoiser(config: DenoiserConfig) -> Denoiser:
    """Every parameter random, activations near 1."""
    denoiser = Denoiser(config).requires_grad_(False).eval()
    for name, parameter in denoiser.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
        if "norm" in name:
            parameter.add_(1)
    return denoiser


def write(denoiser: Denoiser, folder: Path, dtype: str = "fp32", size: tuple[int, int] | None = None) -> None:
    """All three graphs; both denoisers share a data file."""
    with ExternalData(folder / "denoiser.onnx.data") as data:
        for name, add in (("denoiser", add_denoiser), ("denoiser_folded", add_denoiser_folded)):
            g = GraphBuilder(name, data, dtype)
            add(g, denoiser, size)
            g.save(folder / f"{name}.onnx")
    with ExternalData(folder / "text_projection.onnx.data") as data:
        g = GraphBuilder("text_projection", data, dtype)
        add_text_projection(g, denoiser)
        g.save(folder / "text_projection.onnx")


def session(folder: Path, name: str, optimized: bool = True) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT_SUMS)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])


def run(folder: Path, name: str, inputs: Arrays, optimized: bool = True) -> list[Tensor]:
    outputs = session(folder, name, optimized).run(None, inputs)
    return [torch.from_numpy(output) for output in outputs]


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


def embeddings(*lengths: int) -> list[Tensor]:
    return [torch.randn(1, length, CONFIG.caption_channels) for length in lengths]


def projected(folder: Path, texts: list[Tensor], optimized: bool = True) -> tuple[Arrays, Arrays]:
    """Padded keys, values and mask of a batch of texts, and the outputs of the last alone."""
    parts = [run(folder, "text_projection", {"embeddings": text.numpy()}, optimized) for text in texts]
    length = max(text.shape[1] for text in texts)

    def padded(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = length
        wide = torch.full(shape, 7.0)
        wide.narrow(dim, 0, x.shape[dim]).copy_(x)
        return wide

    keys = torch.cat([padded(part[0], 4) for part in parts], dim=1).numpy()
    values = torch.cat([padded(part[1], 3) for part in parts], dim=1).numpy()
    mask = np.full((len(texts), 1, 1, length), -1e30, dtype=np.float32)
    for row, text in zip(mask, texts, strict=True):
        row[..., : text.shape[1]] = 0
    last = {name: part.numpy() for name, part in zip(("keys", "values", "constant"), parts[-1], strict=True)}
    return {"keys": keys, "values": values, "mask": mask}, last


def step_inputs(denoiser: Denoiser, latent: Tensor, time: float) -> Arrays:
    inputs = {"latent": latent.numpy(), "timestep": np.array([time], dtype=np.float32)}
    if denoiser.config.guidance_embeds:
        inputs["guidance"] = np.array([GUIDANCE], dtype=np.float32)
    return inputs


@torch.no_grad()
def torch_velocity(denoiser: Denoiser, latent: Tensor, time: float, texts: list[Tensor]) -> Tensor:
    """What `Denoiser` computes; each row of the batch has its own group."""
    guidance = GUIDANCE if denoiser.config.guidance_embeds else None
    groups = [TextFeatures(text, torch.ones(text.shape[:2], dtype=torch.bool)) for text in texts]
    step = denoiser.modulation(torch.tensor([time]), guidance)[0]
    velocity: Tensor = denoiser(latent, step, denoiser.text_context(groups))
    return velocity


@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_size_equals_torch(form: str, tmp_path: Path) -> None:
    """One dynamic graph for batches, sizes and lengths; a text of one token is attended to as others are."""
    denoiser = random_denoiser(FORMS[form])
    write(denoiser, tmp_path)
    for (height, width), lengths in {(8, 8): (7,), (5, 9): (3, 7), (9, 4): (5, 1, 4)}.items():
        texts = embeddings(*lengths)
        latent = torch.randn(len(texts), 8, height, width)
        for time in (1.0, 0.53) if denoiser.config.guidance_embeds else (999.0, 487.0):
            text, _ = projected(tmp_path, texts)
            (actual,) = run(tmp_path, "denoiser", step_inputs(denoiser, latent, time) | text)
            assert error(actual, torch_velocity(denoiser, latent, time, texts)) <= FP32


@pytest.mark.parametrize("form", FORMS)
def test_folded_graph_equals_the_guided_pair(form: str, tmp_path: Path) -> None:
    denoiser = random_denoiser(FORMS[form])
    write(denoiser, tmp_path)
    negative, prompt = embeddings(1, 6)
    for height, width in ((8, 8), (3, 7)):
        latent = torch.randn(1, 8, height, width)
        _, of_negative = projected(tmp_path, [negative])
        _, of_prompt = projected(tmp_path, [prompt])
        inputs = step_inputs(denoiser, latent, 321.0)
        inputs |= {"keys": of_prompt["keys"], "values": of_prompt["values"]}
        inputs |= {"constant": of_negative["constant"], "scale": np.array([GUIDANCE], dtype=np.float32)}
        (actual,) = run(tmp_path, "denoiser_folded", inputs)
        both = torch_velocity(denoiser, latent.expand(2, -1, -1, -1), 321.0, [negative, prompt])
        expected = both[:1] + GUIDANCE * (both[1:] - both[:1])
        # the difference is multiplied by guidance: errors of u and c are up to 2 · 4.5 times as large
        assert error(actual, expected) <= 2 * GUIDANCE * FP32


@pytest.mark.parametrize("form", FORMS)
def test_fixed_size_equals_any_size(form: str, tmp_path: Path) -> None:
    denoiser = random_denoiser(FORMS[form])
    write(denoiser, tmp_path, size=(5, 9))
    texts = embeddings(4, 2)
    latent = torch.randn(2, 8, 5, 9)
    text, _ = projected(tmp_path, texts)
    (actual,) = run(tmp_path, "denoiser", step_inputs(denoiser, latent, 111.0) | text)
    assert error(actual, torch_velocity(denoiser, latent, 111.0, texts)) <= FP32
    with pytest.raises(Exception, match="dimension"):
        run(tmp_path, "denoiser", step_inputs(denoiser, torch.randn(2, 8, 5, 8), 111.0) | text)


def calibrated(denoiser: Denoiser, keep: tuple[str, ...] = (), static: bool = False) -> Denoiser:
    """INT8 with the scales of graphs; nothing exceeds the static ones in what these tests feed it."""
    quantized = copy.deepcopy(denoiser)
    scales = {name: 20 / 127 for name in denoiser_targets(denoiser) if name not in keep}
    quantize_denoiser(quantized, keep=keep, input_scales=scales, static=static)
    set_graph_activations(quantized)
    assert all(block.project.static == static for block in quantized.blocks)
    return quantized


# Scales are such that nothing is clipped, where torch has -127 and the graph -128. A value that both sides
# round differs by 1e-6 and flips to the next step with a probability of 1e-5, and then others in its token
# do: this token is as far off as INT8 itself. One in sixteen, of 42, may be: a fourth of the error of INT8.
FLIPPED = 1 / 4


@pytest.mark.parametrize("optimized", [False, True], ids=["as written", "optimized"])
@pytest.mark.parametrize("static", [False, True], ids=["package per token", "package per tensor"])
@pytest.mark.parametrize("form", FORMS)
def test_int8_graphs_equal_torch_with_their_scales(
    form: str, static: bool, optimized: bool, tmp_path: Path
) -> None:
    original = random_denoiser(FORMS[form])
    # one layer of a kind stays float
    denoiser = calibrated(original, keep=("blocks.0.cross_q",), static=static)
    denoiser.smoothing = torch.empty(denoiser.config.num_layers, 2, denoiser.config.dim).uniform_(0.8, 1.25)
    original.smoothing = denoiser.smoothing
    write(denoiser, tmp_path)
    negative, prompt = embeddings(1, 6)
    latent = torch.randn(1, 8, 6, 7)
    pair = latent.expand(2, -1, -1, -1)
    of_int8 = torch_velocity(denoiser, pair, 400.0, [negative, prompt])
    of_float = torch_velocity(original, pair, 400.0, [negative, prompt])

    text, of_prompt = projected(tmp_path, [negative, prompt], optimized)
    (actual,) = run(tmp_path, "denoiser", step_inputs(denoiser, pair, 400.0) | text, optimized)
    # a text of one token is a constant to torch, from an INT8 product of its own
    assert error(actual[1:], of_int8[1:]) <= FLIPPED * error(of_int8[1:], of_float[1:])

    _, of_negative = projected(tmp_path, [negative], optimized)
    inputs = step_inputs(denoiser, latent, 400.0)
    inputs |= {"keys": of_prompt["keys"], "values": of_prompt["values"]}
    inputs |= {"constant": of_negative["constant"], "scale": np.array([GUIDANCE], dtype=np.float32)}
    (actual,) = run(tmp_path, "denoiser_folded", inputs, optimized)
    guided = [both[:1] + GUIDANCE * (both[1:] - both[:1]) for both in (of_int8, of_float)]
    assert error(actual, guided[0]) <= FLIPPED * error(*guided)


def test_an_int8_product_is_exact(tmp_path: Path) -> None:
    """Where the input lies on the steps nothing is rounded: int8 sums, scaled once, within fp32 rounding."""
    layer = W8A8Linear.from_float(
        torch.nn.Linear(96, 40), input_scale=torch.tensor(0.125), static=True
    ).requires_grad_(False)
    with ExternalData(tmp_path / "layer.data") as data:
        g = GraphBuilder("layer", data)
        g.output("y", graph_layers.linear(g, "layer", layer, g.input("x", (1, "N", 96))), (1, "N", 40))
        g.save(tmp_path / "layer.onnx")
    x = torch.randint(-127, 128, (1, 33, 96)) * 0.125
    (actual,) = run(tmp_path, "layer", {"x": x.numpy()}, optimized=False)
    # 96 products of one sign at most, each rounded by 2^-24 of the sum of their sizes
    bound = 96 * 2**-24 * (x.abs() @ (layer.weight.abs() * layer.weight_scale[:, None]).T) + 1e-6
    assert ((actual - layer(x)).abs() <= bound).all()


# Of the sum of the products' sizes: x, t, x / t and the weights are rounded to the graph's dtype. In fp16
# that is up to a sixteenth of a step: values flip to the next step, up as often as down. One more may.
@pytest.mark.parametrize("dtype,rounding", [("fp32", 2**-20), ("fp16", 2**-9)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_with_scales_per_token(dtype: str, rounding: float, bias: bool, tmp_path: Path) -> None:
    layer = W8A8Linear.from_float(torch.nn.Linear(96, 40, bias=bias)).requires_grad_(False)
    with ExternalData(tmp_path / "layer.data") as data:
        g = GraphBuilder("layer", data, dtype)
        x = g.cast(g.input("x", (1, "N", 96)))
        g.output("y", graph_layers.linear(g, "layer", layer, x), (1, "N", 40))
        g.save(tmp_path / "layer.onnx")
    # tokens of every size, of 0, and with the largest value of fp16
    of_tokens = torch.tensor([1e-4, 1e-2, 1.0, 30.0, 0.0, 300.0])
    x = (torch.randn(6, 96) * of_tokens[:, None])[None]
    x[0, 5, 3] = 65504
    (actual,) = run(tmp_path, "layer", {"x": x.numpy()}, optimized=False)
    assert actual.isfinite().all()
    steps = x.abs().amax(-1, keepdim=True) / 127
    flipped = steps * (layer.weight.abs() * layer.weight_scale[:, None]).amax(1)
    sizes = x.abs() @ (layer.weight.abs() * layer.weight_scale[:, None]).T
    shift = 0 if layer.bias is None else layer.bias.abs()
    assert ((actual - layer(x)).abs() <= flipped + rounding * (sizes + shift) + 1e-7).all()


@pytest.mark.parametrize("name", ["denoiser", "denoiser_folded", "text_projection"])
def test_every_int8_product_has_scales_on_both_sides_and_nothing_is_quantized_twice(
    name: str, tmp_path: Path
) -> None:
    keep = ("blocks.0.expand", "blocks.1.qkv")
    denoiser = calibrated(random_denoiser(CONFIG), keep=keep)
    write(denoiser, tmp_path)
    graph = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph
    producer = {output: node for node in graph.node for output in node.output}
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    found = []
    for node in graph.node:
        if node.op_type != "MatMul":
            continue
        sides = [producer.get(read) for read in node.input]
        kinds = [side is not None and side.op_type == "DequantizeLinear" for side in sides]
        assert kinds in ([True, True], [False, False])
        if kinds[0]:
            assert producer[sides[0].input[0]].op_type == "QuantizeLinear"
            assert sides[1].input[0] in int8
            found.append(node.name)
    # products by what is quantized for them: value and gate of expand share it
    layers = {"qkv": 1, "out": 1, "cross_q": 1, "cross_out": 1, "expand": 2, "project": 1}
    of_block = {"cross_out": 1} if name == "text_projection" else layers
    kept = [of_block[layer] for layer in (key.split(".")[2] for key in keep) if layer in of_block]
    assert len(found) == len(set(found)) == 2 * sum(of_block.values()) - sum(kept)
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len({node.input[0] for node in quantizers}) == len(quantizers) == 2 * len(of_block) - len(kept)
    assert not [node for node in quantizers if producer[node.input[0]].op_type == "DequantizeLinear"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("form", ["plain", "sprint", "4k"])
def test_graphs_are_valid(form: str, int8: bool, dtype: str, tmp_path: Path) -> None:
    denoiser = random_denoiser(FORMS[form])
    write(calibrated(denoiser) if int8 else denoiser, tmp_path, dtype)
    for name in ("denoiser", "denoiser_folded", "text_projection"):
        path = tmp_path / f"{name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [
            ("", 22 if dtype == "bf16" else 20)
        ]
        assert model.ir_version == (10 if dtype == "bf16" else 9)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
        # every edge has the type that the builder gave it, or inference fails; edges are named as nodes
        assert {node.output[0] for node in model.graph.node} <= {*types, *(o.name for o in inferred.output)}
        for end in (*model.graph.input, *model.graph.output):
            assert end.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        wide = sum(node.op_type == "Cast" for node in model.graph.node)
        assert wide == 0 if dtype == "fp32" and form != "4k" else wide <= 60


def velocity_on(engine: str, folder: Path, inputs: Arrays, prompt: Tensor, hint: str = "f32") -> Tensor:
    """A batch of one through text projection and denoiser."""

    def call(name: str, given: Arrays) -> list[np.ndarray[Any, Any]]:
        if engine == "onnxruntime":
            return [output.numpy() for output in run(folder, name, given)]
        openvino = pytest.importorskip("openvino", reason="openvino is not installed")
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(str(folder / f"{name}.onnx"), "CPU", options)
        results = compiled(given)
        return [results[output].copy() for output in compiled.outputs]

    keys, values, _ = call("text_projection", {"embeddings": prompt.numpy()})
    mask = np.zeros((1, 1, 1, prompt.shape[1]), dtype=np.float32)
    return torch.from_numpy(call("denoiser", inputs | {"keys": keys, "values": values, "mask": mask})[0])


# A rounding is off by up to 2^-12 in fp16 and 2^-9 in bf16. About 25 tensors in a row of a layer are rounded,
# and as many weights, and add up in squares: 7 times a rounding.
ROUNDED = {"fp16": 7 * 2.0**-12, "bf16": 7 * 2.0**-9}


@pytest.mark.parametrize(("dtype", "engine"), [("fp16", "onnxruntime"), ("bf16", "openvino")])
def test_16_bit_graphs_run(dtype: str, engine: str, tmp_path: Path) -> None:
    denoiser = random_denoiser(NORMED)
    write(denoiser, tmp_path, dtype)
    (prompt,) = embeddings(6)
    latent = torch.randn(1, 8, 6, 7)
    actual = velocity_on(engine, tmp_path, step_inputs(denoiser, latent, 400.0), prompt)
    assert error(actual, torch_velocity(denoiser, latent, 400.0, [prompt])) <= ROUNDED[dtype]
    quantized = calibrated(denoiser)
    write(quantized, tmp_path, dtype)
    actual = velocity_on(engine, tmp_path, step_inputs(denoiser, latent, 400.0), prompt)
    # a value moved by a rounding lands on another step: as far off as INT8 itself at most
    of_int8 = torch_velocity(quantized, latent, 400.0, [prompt])
    limit = error(of_int8, torch_velocity(denoiser, latent, 400.0, [prompt]))
    assert error(actual, of_int8) <= limit + ROUNDED[dtype]


def test_padded_texts_in_fp16(tmp_path: Path) -> None:
    """-1e30 is -inf there."""
    denoiser = random_denoiser(CONFIG)
    write(denoiser, tmp_path, "fp16")
    texts = embeddings(3, 7)
    latent = torch.randn(2, 8, 5, 9)
    text, _ = projected(tmp_path, texts)
    (actual,) = run(tmp_path, "denoiser", step_inputs(denoiser, latent, 400.0) | text)
    assert error(actual, torch_velocity(denoiser, latent, 400.0, texts)) <= 2 * ROUNDED["fp16"]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_openvino_in_bf16_keeps_the_timestep(scale: float, tmp_path: Path) -> None:
    """bf16 has no 999, 0.2 % of which is an angle of 2: only its turns may be left out before rounding."""
    denoiser = random_denoiser(replace(NORMED, timestep_scale=scale))
    write(denoiser, tmp_path)
    (prompt,) = embeddings(6)
    latent = torch.randn(1, 8, 6, 7)
    for time in (999.0, 77.7):
        inputs = step_inputs(denoiser, latent, time)
        expected = torch_velocity(denoiser, latent, time, [prompt])
        assert error(velocity_on("openvino", tmp_path, inputs, prompt), expected) <= FP32
        assert error(velocity_on("openvino", tmp_path, inputs, prompt, "bf16"), expected) <= ROUNDED["bf16"]


def test_linear_attention_does_not_overflow_in_fp16(tmp_path: Path) -> None:
    """Sums over 1024 tokens of values near 60 are beyond 65504; the quotient is not."""
    denoiser = random_denoiser(CONFIG)
    for block in denoiser.blocks:
        block.qkv.weight.mul_(60)
    write(denoiser, tmp_path, "fp16")
    (prompt,) = embeddings(6)
    latent = torch.randn(1, 8, 32, 32)
    expected = torch_velocity(denoiser, latent, 400.0, [prompt])
    actual = velocity_on("onnxruntime", tmp_path, step_inputs(denoiser, latent, 400.0), prompt)
    assert error(actual, expected) <= 2 * ROUNDED["fp16"]


def test_clamp_of_models_trained_in_fp16(tmp_path: Path) -> None:
    denoiser = random_denoiser(NORMED)
    denoiser.blocks[0].out.bias.mul_(1e6)
    write(denoiser, tmp_path)
    (prompt,) = embeddings(6)
    latent = torch.randn(1, 8, 6, 7)
    inputs = step_inputs(denoiser, latent, 400.0)
    free = torch_velocity(denoiser, latent, 400.0, [prompt])
    assert error(velocity_on("onnxruntime", tmp_path, inputs, prompt), free) <= FP32
    denoiser.clamp = True
    clamped = torch_velocity(denoiser, latent, 400.0, [prompt])
    assert error(clamped, free) > 0.01
    write(denoiser, tmp_path)
    assert error(velocity_on("onnxruntime", tmp_path, inputs, prompt), clamped) <= FP32


def test_both_denoisers_share_their_weights(tmp_path: Path) -> None:
    denoiser = calibrated(random_denoiser(CONFIG))
    write(denoiser, tmp_path)
    places = {}
    for name in ("denoiser", "denoiser_folded"):
        graph = onnx.load(tmp_path / f"{name}.onnx", load_external_data=False).graph
        places[name] = {
            (entry["offset"], entry["length"])
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
            for entry in [{pair.key: pair.value for pair in tensor.external_data}]
        }
    assert places["denoiser"] == places["denoiser_folded"]
    size = (tmp_path / "denoiser.onnx.data").stat().st_size
    needed = sum(int(length) for _, length in places["denoiser"])
    # what lies between tensors aligns them
    assert needed <= size < needed + 4096 * len(places["denoiser"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "denoiser.onnx",
        "denoiser.onnx.data",
        "denoiser_folded.onnx",
        "text_projection.onnx",
        "text_projection.onnx.data",
    ]


def test_an_int8_layer_without_an_input_scale_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    denoiser = random_denoiser(CONFIG)
    quantize_denoiser(denoiser)
    with pytest.raises(CheckpointError, match=r"blocks\.0.*input_scale") as caught:
        write(denoiser, tmp_path)
    assert "calibrat" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(SanaError, match="cannot write"), ExternalData(tmp_path / "missing" / "data"):
        pass
    with ExternalData(tmp_path / "data") as data:
        g = GraphBuilder("g", data)
        g.output("y", g.op("Relu", g.input("x", (1,))), (1,))
        (tmp_path / "file").touch()
        with pytest.raises(SanaError, match="cannot write"):
            g.save(tmp_path / "file" / "g.onnx")
    with pytest.raises(SanaError, match="not open"):
        g.weight("late", torch.zeros(1024))


def test_the_bundled_package_differs_from_torch_as_torch_does_from_itself(tmp_path: Path) -> None:
    """Eight INT8 layers are chaotic: one value that flips changes others until the error is that of rounding.

    Texts changed by 1e-6 show how far this goes, of which one may flip nothing; the graph is another change.
    """
    model = hub.resolve("sana-tiny", int8=True, offline=True)
    denoiser, _ = load_denoiser(model, device=torch.device("cpu"), dtype="fp32")
    set_activations(denoiser, "tensor")
    write(denoiser, tmp_path)
    latent = torch.randn(1, 32, 8, 8)
    prompt = torch.randn(1, 9, denoiser.config.caption_channels)
    text, _ = projected(tmp_path, [prompt])
    (actual,) = run(tmp_path, "denoiser", step_inputs(denoiser, latent, 500.0) | text)
    expected = torch_velocity(denoiser, latent, 500.0, [prompt])
    changed = [prompt * (1 + 1e-6 * torch.randn_like(prompt)) for _ in range(6)]
    chaos = max(error(torch_velocity(denoiser, latent, 500.0, [each]), expected) for each in changed)
    assert chaos < 0.1
    assert error(actual, expected) <= 1.5 * chaos + FP32
