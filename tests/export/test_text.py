from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Gemma2Config, Gemma2Model

from sana_edge.engines.text import EngineText
from sana_edge.errors import CheckpointError, SanaError
from sana_edge.int8 import text_linear
from sana_edge.nets.text_encoder import TextEncoder
from sana_edge.nets.text_weights import load_text_model
from sana_edge.prompt import CHI

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from safetensors.numpy import load_file  # noqa: E402

from sana_edge.export import instruction_file  # noqa: E402
from sana_edge.export.graph.builder import GraphBuilder  # noqa: E402
from sana_edge.export.graph.external_data import ExternalData  # noqa: E402
from sana_edge.export.graph.text import add_text_encoder  # noqa: E402
from sana_edge.export.verify.runner import GraphRunner  # noqa: E402
from sana_edge.export.verify.text import TEXTS, runner  # noqa: E402
from sana_edge.store.manifest import Graph, TextShape  # noqa: E402

# about a hundred roundings of 2^-24, see CONTRIBUTING.md
BOUND = 1e-5


def write(folder: Path, model: Gemma2Model, dtype: str = "fp32") -> GraphRunner:
    """text_encoder.onnx of a model, ready to run."""
    with ExternalData(folder / "text_encoder.data") as data:
        graph = GraphBuilder("text_encoder", data, dtype)
        add_text_encoder(graph, model)
        graph.save(folder / "text_encoder.onnx")
    onnx.checker.check_model(str(folder / "text_encoder.onnx"), full_check=True)
    return GraphRunner(folder, {"text_encoder": Graph("text_encoder.onnx", {}, {})}, threads=1)


def run(graph: GraphRunner, model: Gemma2Model, ids: Tensor, past: int) -> tuple[Tensor, Tensor]:
    """Hidden states of ids (1, P + T) from ``past`` on: the graph's, and the model's."""
    config, cache = model.config, DynamicCache()
    with torch.no_grad():
        expected = model(ids).last_hidden_state[:, past:]
        if past:
            model(ids[:, :past], past_key_values=cache, use_cache=True)
    if past:
        keys, values = (
            torch.cat([getattr(layer, name) for layer in cache.layers]) for name in ("keys", "values")
        )
    else:
        keys = values = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, 0, config.head_dim)
    found = graph.run(
        "text_encoder",
        ids=ids[:, past:].numpy(),
        past_keys=keys.float().numpy(),
        past_values=values.float().numpy(),
    )
    return torch.from_numpy(found["hidden"]), expected.float()


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def drawn(model: Gemma2Model) -> Gemma2Model:
    """The model with norm weights that are not their default, which hides 1 + weight."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def gemma(**changes: object) -> Gemma2Model:
    """Awkward sizes: heads wider than their share, three layers, a window of 11 tokens."""
    options: dict[str, object] = {
        "vocab_size": 71,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "query_pre_attn_scalar": 3,
        "sliding_window": 11,
        "initializer_range": 0.3,
        "attn_logit_softcapping": 5.0,
        "rope_theta": 100.0,
    }
    return drawn(Gemma2Model(Gemma2Config(**{**options, **changes})))


@pytest.mark.parametrize(("past", "new"), [(0, 1), (0, 37), (1, 1), (23, 1), (23, 30), (9, 3), (60, 2)])
def test_hidden_states_equal_transformers(tmp_path: Path, past: int, new: int) -> None:
    model = gemma()
    graph = write(tmp_path, model)
    found, expected = run(graph, model, torch.randint(0, 71, (1, past + new)), past)
    assert error(found, expected) <= BOUND


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "attention_bias": True},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        {"sliding_window": 1},
        {"rms_norm_eps": 0.1},
        {"rope_theta": 3.0},
        {"final_logit_softcapping": 1.0},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_what_a_config_may_say(tmp_path: Path, changes: dict[str, object]) -> None:
    model = gemma(**changes)
    found, expected = run(write(tmp_path, model), model, torch.randint(0, 71, (1, 40)), 17)
    assert error(found, expected) <= BOUND


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_activation", "silu"),
        ("use_bidirectional_attention", True),
        ("layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ],
)
def test_another_config_is_refused(tmp_path: Path, key: str, value: object) -> None:
    model = gemma()
    setattr(model.config, key, value)
    with pytest.raises(CheckpointError, match=key) as caught:
        write(tmp_path, model)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> TextEncoder:
    return TextEncoder.load(tiny_folder, dtype=torch.float32, device="cpu")


def test_prompts_behind_the_instruction_equal_the_text_encoder(
    tmp_path: Path, encoder: TextEncoder, tiny_folder: Path
) -> None:
    graph = write(tmp_path, encoder._model)
    instruction_file.write_instruction(tmp_path / "instruction.safetensors", encoder)
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    config, length = encoder._model.config, len(encoder._prefix("\n".join(CHI)).ids)
    assert length > config.sliding_window, "the window has to end inside of the instruction"
    sizes = config.hidden_size, config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    text = EngineText(tmp_path, TextShape(*sizes), runner(graph))
    for prompt, instructed in TEXTS:
        lines = CHI if instructed else None
        expected = encoder.encode([prompt], instruction=lines).embeddings
        found = text.encode(prompt, instruction=lines)
        assert error(torch.from_numpy(found), expected) <= BOUND, prompt


def test_what_the_instruction_leaves(tmp_path: Path, encoder: TextEncoder) -> None:
    path = tmp_path / "instruction.safetensors"
    instruction_file.write_instruction(path, encoder)
    stored, config = load_file(path), encoder._model.config
    length = len(stored["ids"])
    sides = (config.num_hidden_layers, config.num_key_value_heads, length, config.head_dim)
    assert {name: (str(array.dtype), array.shape) for name, array in stored.items()} == {
        "ids": ("int64", (length,)),
        "hidden": ("float32", (1, length, config.hidden_size)),
        "keys": ("float32", sides),
        "values": ("float32", sides),
    }
    assert stored["ids"].tolist() == encoder._tokenizer.encode("\n".join(CHI))


def test_an_instruction_that_cannot_be_written_is_no_file(tmp_path: Path, encoder: TextEncoder) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SanaError, match=r"file/instruction\.safetensors") as caught:
        instruction_file.write_instruction(tmp_path / "file" / "instruction.safetensors", encoder)
    assert caught.value.hint
    (tmp_path / "taken").mkdir()
    with pytest.raises(SanaError, match="taken"):
        instruction_file.write_instruction(tmp_path / "taken", encoder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


def initializers(folder: Path) -> dict[str, Any]:
    model = onnx.load(folder / "text_encoder.onnx", load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_int8_weights_stay_int8(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_text_model(tiny_folder / "text_encoder", dtype=torch.float32, device="cpu", int8=True)
    graph = write(tmp_path, model)
    names = [f"layers.{i}/{name}_proj/weight" for i in range(2) for name in ("self_attn/q", "mlp/down")]
    stored = initializers(tmp_path)
    assert all(stored[name].data_type == onnx.TensorProto.INT8 for name in names)
    ids = torch.randint(0, 640, (1, 90))
    monkeypatch.setattr(text_linear, "choose_product", lambda device: text_linear.Product("dequantized", ""))
    assert error(*run(graph, model, ids, 61)) <= BOUND


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bf16"])
def test_the_embedding_is_gathered_in_its_own_dtype(tmp_path: Path, tiny_folder: Path, int8: bool) -> None:
    model = load_text_model(
        tiny_folder / "text_encoder", dtype=torch.float32 if int8 else torch.bfloat16, device="cpu", int8=int8
    )
    write(tmp_path, model)
    table = initializers(tmp_path)["embed_tokens.weight"]
    kept = onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    # an INT8 package has it in 16 bit; this folder has it in fp32, which a float model keeps
    assert table.data_type in (kept[:2] if int8 else kept[2:])
    graph = onnx.load(tmp_path / "text_encoder.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node if table.name in node.input] == ["Gather"]


def test_weights_stored_in_bf16_are_computed_with_in_fp32(tmp_path: Path) -> None:
    model = gemma().bfloat16()
    graph = write(tmp_path, model)
    large = [tensor for tensor in initializers(tmp_path).values() if np.prod(tensor.dims) >= 36 * 20]
    assert large and all(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in large)
    assert error(*run(graph, model.float(), torch.randint(0, 71, (1, 33)), 0)) <= BOUND


@pytest.mark.parametrize(("dtype", "unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_16_bit_graphs(tmp_path: Path, dtype: str, unit: float) -> None:
    model = gemma()
    found, expected = run(write(tmp_path, model, dtype), model, torch.randint(0, 71, (1, 40)), 17)
    # some thirty roundings in each of three layers, and of the weights before them, as a random walk: ten
    # of one rounding; scores of up to 5 make twice that of it
    assert unit / 100 < error(found, expected) <= 20 * unit


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-900]),
        lambda path: path.write_bytes(b"\x80" + path.read_bytes()),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
        lambda path: path.with_suffix(".data").unlink(),
        lambda path: path.with_suffix(".data").write_bytes(path.with_suffix(".data").read_bytes()[:4096]),
    ],
    ids=["cut", "garbage", "empty", "missing", "no-data", "cut-data"],
)
def test_a_damaged_graph_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    model = gemma()
    write(tmp_path, model)
    damage(tmp_path / "text_encoder.onnx")
    graph = GraphRunner(tmp_path, {"text_encoder": Graph("text_encoder.onnx", {}, {})})
    with pytest.raises(CheckpointError, match=r"text_encoder\.onnx") as caught:
        run(graph, model, torch.zeros(1, 3, dtype=torch.int64), 0)
    assert caught.value.hint and "\n" not in caught.value.message


def test_onnxruntime_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = gemma()
    run(write(tmp_path, model), model, torch.zeros(1, 3, dtype=torch.int64), 0)
    assert capfd.readouterr() == ("", "")


def test_inputs_that_a_graph_does_not_have(tmp_path: Path) -> None:
    graph = write(tmp_path, gemma())
    with pytest.raises(CheckpointError, match=r"text_encoder\.onnx"):
        graph.run("text_encoder", tokens=np.zeros((1, 1), np.int64))
    with pytest.raises(SanaError, match="decoder"):
        graph.run("decoder")
    shutil.rmtree(tmp_path)
