"""The text encoder as a graph: Gemma-2 that goes on behind the keys and values of tokens it has seen.

    ids int64 (1, T), past_keys, past_values float32 (layers, kv heads, P, d)  ->  hidden float32 (1, T, C)

Token t has position P + t, and P may be 0. Everything else is transformers' eager Gemma2Model (RMSNorm with
1 + weight in fp32, softcapped scores, softmax in fp32, every other layer with a sliding window). The logits'
softcapping has no part in hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sana_edge.errors import CheckpointError, SanaError
from sana_edge.export.graph.builder import BOOL, DTYPES, FLOAT, INT64, GraphBuilder, Value
from sana_edge.int8.text_linear import WeightOnlyLinear
from sana_edge.nets.text_weights import MappedEmbedding

if TYPE_CHECKING:
    from transformers import Gemma2Model

_ELEMENTS = {torch.float32: DTYPES["fp32"], torch.float16: DTYPES["fp16"], torch.bfloat16: DTYPES["bf16"]}
# what takes a score out of the softmax; every token sees itself, so that no row is without a score
_HIDDEN = -1e30


@dataclass(frozen=True)
class _Shared:
    """What all layers read.

    ``cos`` and ``sin`` are (1, T, d) in the graph's dtype, ``allowed`` bool (T, P + T) by kind of layer.
    """

    config: Any
    past_keys: Value
    past_values: Value
    cos: Value
    sin: Value
    allowed: dict[str, Value]


def add_text_encoder(graph: GraphBuilder, model: Gemma2Model) -> int:
    """Add the whole text encoder, with its inputs and output, to an empty graph.

    Weights are stored in the graph's dtype, in an fp32 graph in the model's: of one loaded in bf16 the file
    has half the size. `WeightOnlyLinear` layers are int8 with a DequantizeLinear per channel. Rows of the
    embedding are gathered in the dtype of the table.

    Args:
        model: from `load_text_model`, float or INT8.

    Returns:
        The bytes of its embedding table among the weights.

    Raises:
        CheckpointError: its config asks for something that no known SANA text encoder has.
    """
    config = model.config
    _check(config)
    sides = (config.num_hidden_layers, config.num_key_value_heads, "P", config.head_dim)
    ids = graph.input("ids", (1, "T"), INT64)
    shared = _shared(graph, model, ids, graph.input("past_keys", sides), graph.input("past_values", sides))
    x, table = _embedding(graph, model.embed_tokens, ids)
    for index, layer in enumerate(model.layers):
        with graph.scope(f"layers.{index}"):
            x = _layer(graph, layer, index, x, shared)
    graph.output("hidden", _norm(graph, "norm", model.norm, x), (1, "T", config.hidden_size))
    return table


def _layer(graph: GraphBuilder, layer: Any, index: int, x: Value, shared: _Shared) -> Value:
    """x (1, T, C) through one decoder layer."""
    normed = _norm(graph, "input_layernorm", layer.input_layernorm, x)
    with graph.scope("self_attn"):
        attended = _attention(graph, layer.self_attn, index, normed, shared)
    x = graph.op("Add", x, _norm(graph, "post_attention_layernorm", layer.post_attention_layernorm, attended))
    normed = _norm(graph, "pre_feedforward_layernorm", layer.pre_feedforward_layernorm, x)
    with graph.scope("mlp"):
        gate = graph.op("Gelu", _linear(graph, "gate_proj", layer.mlp.gate_proj, normed), approximate="tanh")
        product = graph.op("Mul", gate, _linear(graph, "up_proj", layer.mlp.up_proj, normed))
        out = _linear(graph, "down_proj", layer.mlp.down_proj, product)
    out = _norm(graph, "post_feedforward_layernorm", layer.post_feedforward_layernorm, out)
    return graph.op("Add", x, out)


def _attention(graph: GraphBuilder, attention: Any, index: int, x: Value, shared: _Shared) -> Value:
    """Grouped-query attention of x (1, T, C) to the tokens before and itself."""
    config = shared.config
    groups, d = config.num_key_value_heads, config.head_dim
    each = config.num_attention_heads // groups

    def heads(projection: str, count: int) -> Value:
        """(count, T, d)"""
        projected = _linear(graph, projection, getattr(attention, projection), x)
        return graph.transpose(graph.reshape(projected, -1, count, d), 1, 0, 2)

    def with_past(past: Value, new: Value) -> Value:
        """(groups, 1, P + T, d)"""
        before = graph.cast(graph.op("Gather", past, graph.constant(index, INT64), axis=0))
        return graph.op("Unsqueeze", graph.op("Concat", before, new, axis=1), graph.ints(1))

    q = graph.reshape(_rotated(graph, heads("q_proj", groups * each), shared, d), groups, each, -1, d)
    k = with_past(shared.past_keys, _rotated(graph, heads("k_proj", groups), shared, d))
    v = with_past(shared.past_values, heads("v_proj", groups))
    # (groups, each, T, P + T)
    scores = _capped(graph, graph.op("MatMul", q, graph.transpose(k, 0, 1, 3, 2)), attention)
    scores = graph.cast(scores, FLOAT)
    hidden = graph.constant(_HIDDEN, FLOAT)
    scores = graph.op("Where", shared.allowed[attention.layer_type], scores, hidden, dtype=FLOAT)
    weights = graph.cast(graph.op("Softmax", scores, axis=-1))
    read = graph.transpose(graph.op("MatMul", weights, v), 2, 0, 1, 3)
    return _linear(graph, "o_proj", attention.o_proj, graph.reshape(read, 1, -1, groups * each * d))


def _capped(graph: GraphBuilder, products: Value, attention: Any) -> Value:
    """cap · tanh(scale · q k / cap)"""
    cap = attention.attn_logit_softcapping
    if cap is None:
        return graph.op("Mul", products, float(attention.scaling))
    return graph.op("Mul", graph.op("Tanh", graph.op("Mul", products, attention.scaling / cap)), float(cap))


def _rotated(graph: GraphBuilder, x: Value, shared: _Shared, d: int) -> Value:
    """x (heads, T, d) turned by its positions' angles; channel j goes with channel j + d / 2."""
    low, high = graph.slice(x, 2, 0, d // 2), graph.slice(x, 2, d // 2, d)
    turned = graph.op("Concat", graph.op("Neg", high), low, axis=2)
    return graph.op("Add", graph.op("Mul", x, shared.cos), graph.op("Mul", turned, shared.sin))


def _shared(graph: GraphBuilder, model: Any, ids: Value, past_keys: Value, past_values: Value) -> _Shared:
    zero, one = graph.constant(0, INT64), graph.constant(1, INT64)
    past, new = (
        graph.op("Squeeze", graph.side(x, axis), graph.ints(0)) for x, axis in ((past_keys, 2), (ids, 1))
    )
    total = graph.op("Add", past, new)
    # (T, 1) and (P + T,)
    queries = graph.op("Unsqueeze", graph.op("Range", past, total, one), graph.ints(1))
    keys = graph.op("Range", zero, total, one)
    causal = graph.op("LessOrEqual", keys, queries, dtype=BOOL)
    near = graph.op("Greater", keys, graph.op("Sub", queries, model.config.sliding_window or 0), dtype=BOOL)
    frequencies = graph.weight("inverse_frequencies", model.rotary_emb.inv_freq, FLOAT)
    angles = graph.op("Mul", graph.cast(queries, FLOAT), frequencies)
    angles = graph.op("Unsqueeze", graph.op("Concat", angles, angles, axis=1), graph.ints(0))
    cos, sin = (
        graph.cast(graph.op("Mul", graph.op(kind, angles), float(model.rotary_emb.attention_scaling)))
        for kind in ("Cos", "Sin")
    )
    allowed = {"full_attention": causal, "sliding_attention": graph.op("And", causal, near)}
    return _Shared(model.config, past_keys, past_values, cos, sin, allowed)


def _embedding(graph: GraphBuilder, embedding: Any, ids: Value) -> tuple[Value, int]:
    """Rows of the table times √C, rounded to the graph's dtype as the rows are, and the table's bytes."""
    mapped = isinstance(embedding, MappedEmbedding)
    table = embedding._table if mapped else embedding.weight
    dtype = embedding._rounded if mapped else table.dtype
    rows = graph.op("Gather", graph.weight("embed_tokens.weight", table, _ELEMENTS[dtype]), ids, axis=0)
    scaled = graph.op("Mul", graph.cast(rows), float(table.shape[1] ** 0.5))
    return scaled, table.numel() * dtype.itemsize


def _norm(graph: GraphBuilder, name: str, norm: Any, x: Value) -> Value:
    """RMSNorm of x in fp32; its nodes are those that engines know as one operation."""
    with graph.scope(name):
        wide = graph.cast(x, FLOAT)
        mean = graph.op("ReduceMean", graph.op("Pow", wide, 2.0), graph.ints(-1), keepdims=1)
        root = graph.op("Sqrt", graph.op("Add", mean, float(norm.eps)))
        weight = graph.weight("weight", 1.0 + norm.weight.detach().float(), FLOAT)
        return graph.cast(graph.op("Mul", graph.op("Div", wide, root), weight))


def _linear(graph: GraphBuilder, name: str, layer: nn.Module, x: Value) -> Value:
    """x (..., in) to (..., out)."""
    with graph.scope(name):
        if isinstance(layer, WeightOnlyLinear):
            weight = graph.int8_weight(layer.weight.t(), layer.weight_scale, axis=1)
        elif isinstance(layer, nn.Linear):
            stored = _ELEMENTS[layer.weight.dtype] if graph.dtype == FLOAT else graph.dtype
            weight = graph.cast(graph.weight("weight", layer.weight.t(), stored))
        else:
            raise SanaError(
                f"a {type(layer).__name__} cannot be exported", "load the text encoder on the CPU"
            )
        return graph.linear(x, weight, layer.bias)


def _check(config: Any) -> None:
    """Refuse what the graph does not have."""
    found = {
        "hidden_activation": config.hidden_activation == "gelu_pytorch_tanh",
        "rope_parameters": config.rope_parameters["rope_type"] in ("default", "linear"),
        "use_bidirectional_attention": not getattr(config, "use_bidirectional_attention", None),
        "layer_types": set(config.layer_types) <= {"full_attention", "sliding_attention"},
    }
    for key, known in found.items():
        if not known:
            raise CheckpointError(
                f"the text encoder's {key} is {getattr(config, key)!r}, which cannot be exported",
                "the text encoders of the public SANA models can",
            )
