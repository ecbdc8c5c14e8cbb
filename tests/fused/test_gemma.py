"""Gemma-2 as this project computes it, against transformers' Gemma2Model with the same random weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2Model

from sana_edge.fused import gemma
from sana_edge.fused.gemma import FusedGemma
from sana_edge.int8.quant import dequantize_weight, relative_error
from sana_edge.int8.text_linear import WeightOnlyLinear, quantize_weight
from sana_edge.kernels import reference_gemma
from sana_edge.nets.text_encoder import KeysValues
from sana_edge.nets.text_weights import text_targets

# longer than the window, and scores well beyond the cap
LENGTH, WINDOW, CAP, HEADS = 21, 7, 1.5, 4
IN_ORDER = pytest.mark.parametrize("emulated", [0], ids=["in order"], indirect=True)

# an input in two digits errs by absmax / 64516 / √3 of each number, absmax at most √64 of the rms in rows of
# 64: 7e-5 of the row; four such inputs a layer, in quadrature, twice as large behind attention and norms
DIGITS = 2 * math.sqrt(4 * 2) * 7e-5
BF16 = 2.0**-8


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_model(**changes: Any) -> Gemma2Model:
    """Two layers, the first with a window; nothing at its default."""
    settings = {
        "vocab_size": 40,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": CAP,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.3,
        "attention_bias": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    }
    model = Gemma2Model(Gemma2Config(**{**settings, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def quantized(model: Gemma2Model) -> Gemma2Model:
    """A copy with INT8 projections, whose values the model takes as its own."""
    made = copy.deepcopy(model)
    for name in text_targets(len(model.layers)):
        layer = model.get_submodule(name)
        values, scales = quantize_weight(layer.weight, name)
        layer.weight.copy_(dequantize_weight(values, scales))
        bias = None if layer.bias is None else layer.bias.clone()
        made.set_submodule(name, WeightOnlyLinear(values, scales, bias))
    return made


def specified(model: Gemma2Model, ids: Tensor, **changes: Any) -> Tensor:
    """The definition's layers, one after the other."""
    config = model.config
    rotation = reference_gemma.rotation_of(torch.arange(ids.shape[1]), model.rotary_emb.inv_freq.float())
    x = model.embed_tokens(ids)
    for layer, kind in zip(model.layers, config.layer_types, strict=True):
        asked = {
            "heads": HEADS,
            "eps": config.rms_norm_eps,
            "cap": config.attn_logit_softcapping,
            "scalar": config.query_pre_attn_scalar,
            "window": config.sliding_window if kind == "sliding_attention" else None,
        }
        x = reference_gemma.gemma_layer(x, layer.state_dict(), rotation, **{**asked, **changes})
    return model.norm(x)


def test_definition_equals_transformers_in_fp32() -> None:
    model, ids = make_model(), torch.randint(0, 40, (2, LENGTH))
    expected = model(ids).last_hidden_state
    assert relative_error(specified(model, ids), expected) < 1e-5
    # window and cap count
    assert relative_error(specified(model, ids, window=None), expected) > 0.05
    assert relative_error(specified(model, ids, cap=None), expected) > 0.05


def test_definition_is_closer_than_transformers_in_bf16() -> None:
    """bf16 weights, computed by the library in bf16 and here in fp32, against the library in fp32."""
    model, ids = make_model().bfloat16(), torch.randint(0, 40, (2, LENGTH))
    theirs = model(ids).last_hidden_state.float()
    exact = copy.deepcopy(model).float()(ids).last_hidden_state
    ours = specified(model, ids).float()
    # the embedding's product and the last norm are rounded to bf16 in both
    assert relative_error(ours, exact) < min(2 * BF16, 0.5 * relative_error(theirs, exact))


def hidden(network: FusedGemma, ids: Tensor) -> Tensor:
    known = torch.tensor(0, dtype=torch.int32)
    return network.hidden_states(network.embed(ids), [], known)


def behind(network: FusedGemma, ids: Tensor, known: int) -> Tensor:
    """The same in two parts, the first kept with 3 tokens more than are used."""
    layers: KeysValues = []
    nothing = torch.tensor(0, dtype=torch.int32)
    first = network.hidden_states(network.embed(ids[:1, : known + 3]), [], nothing, layers)
    count = torch.tensor(known, dtype=torch.int32)
    rest = network.hidden_states(network.embed(ids[:, known:]), layers, count)
    return torch.cat([first[:, :known].expand(len(ids), -1, -1), rest], dim=1)


@pytest.mark.usefixtures("emulated")
@IN_ORDER
@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("bias", [False, True])
def test_fused_equals_transformers(backend: str, bias: bool) -> None:
    model = make_model(attention_bias=bias)
    network, ids = FusedGemma(quantized(model), backend), torch.randint(0, 40, (2, LENGTH))
    expected = model(ids).last_hidden_state
    assert relative_error(hidden(network, ids), expected) < DIGITS


@pytest.mark.usefixtures("emulated")
@IN_ORDER
@pytest.mark.parametrize("backend", ["torch", "cuda"])
@pytest.mark.parametrize("known", [2, 13])
def test_a_kept_prefix_changes_nothing(backend: str, known: int) -> None:
    """But the order of fp32 sums, which tips a low digit in 300: absmax / 32258 of one number."""
    network, ids = FusedGemma(quantized(make_model()), backend), torch.randint(0, 40, (2, LENGTH))
    ids[1, : known + 3] = ids[0, : known + 3]
    assert relative_error(behind(network, ids, known), hidden(network, ids)) < 2e-5


@pytest.mark.usefixtures("emulated")
@IN_ORDER
def test_in_bf16_it_is_closer_than_transformers() -> None:
    model, ids = make_model(), torch.randint(0, 40, (1, LENGTH))
    network = FusedGemma(quantized(model).bfloat16(), "cuda")
    expected = model(ids).last_hidden_state
    theirs = relative_error(model.bfloat16()(ids).last_hidden_state.float(), expected)
    assert hidden(network, ids).dtype == torch.bfloat16
    assert relative_error(hidden(network, ids).float(), expected) < theirs
    assert relative_error(behind(network, ids, 13).float(), expected) < theirs


@IN_ORDER
def test_nine_launches_a_layer(emulated: Any) -> None:
    """And one before the first; the padding of a recorded length changes no row."""
    network, ids = FusedGemma(quantized(make_model()), "cuda"), torch.randint(0, 40, (1, LENGTH))
    emulated.count()
    alone = hidden(network, ids)
    assert emulated.count()["launches"] == 9 * 2 + 1
    padded = hidden(network, torch.cat([ids, torch.zeros(1, 11, dtype=torch.int64)], dim=1))
    assert torch.equal(padded[:, :LENGTH], alone)


def test_the_layers_are_taken() -> None:
    model = quantized(make_model())
    held = sum(t.numel() for t in model.state_dict().values())
    FusedGemma(model, "torch")
    assert sum(t.numel() for t in model.state_dict().values()) < held / 10


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"hidden_activation": "gelu"}, "hidden_activation is gelu"),
    "positions": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
        "positions are scaled",
    ),
    "heads": ({"head_dim": 24}, "heads have 24 channels"),
    "width": ({"hidden_size": 56}, "width is 56"),
    "ffn": ({"intermediate_size": 88}, "FFN has 88"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_the_kernels_have_not_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in gemma.refusal(quantized(make_model(**changes)))


def test_a_layer_that_is_not_int8_is_named() -> None:
    model = make_model()
    made = quantized(model)
    assert gemma.refusal(made) == ""
    made.set_submodule("layers.1.mlp.up_proj", model.get_submodule("layers.1.mlp.up_proj"))
    assert gemma.refusal(made) == "layers.1.mlp.up_proj is not INT8"
