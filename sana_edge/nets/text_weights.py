"""The Gemma-2 of a model folder, float or with INT8 weights, and the INT8 form of its tensors.

Names are those of transformers' Gemma2Model: ``layers.0.self_attn.q_proj.weight`` and so on. In the INT8 form
the projections of attention and FFN have an int8 ``weight`` and an fp32 ``weight_scale`` (one per output
channel); norms and the embedding are in 16 bit. It comes from a package, or is made of float weights while
they are loaded, layer by layer; both give the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sana_edge.errors import CheckpointError, DamagedWeights, InvalidInput, SanaError
from sana_edge.int8.text_linear import WeightOnlyLinear, choose_product, quantize_weight, to_bitsandbytes
from sana_edge.store import package
from sana_edge.store.folder import read_json
from sana_edge.store.package_tensors import check_tensors, to_16_bit
from sana_edge.store.weights import StoredState, check_state, check_values, load_state, values_named
from sana_edge.system.json_values import shown

if TYPE_CHECKING:
    from transformers import Gemma2Model

_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
_FFN = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
_TABLE = "embed_tokens.weight"
# what a Gemma-2 is made of; everything else in a config.json is left out
_CONFIG = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_activation", "max_position_embeddings", "rms_norm_eps"),
    *("rope_theta", "rope_parameters", "attention_bias", "query_pre_attn_scalar", "sliding_window"),
    *("layer_types", "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    *("initializer_range", "pad_token_id", "eos_token_id", "bos_token_id"),
)
# what they may be at most: the library makes a layer, and a list, of each number
_MOST = {
    "num_hidden_layers": 256,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1024),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 1 << 20),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "sliding_window"), 1 << 26),
}

# looked at in one go; the embedding of Gemma-2-2B has 256000
_ROWS = 4096


class MappedEmbedding(nn.Module):
    """Gemma-2's embedding, row · √channels, gathered from a table (vocabulary, channels) on the CPU.

    The table is no parameter: it keeps its dtype and place in `Module.to`. Mapped from a file as `load_state`
    gives it, it takes no more memory than the pages of the rows that were used.

    Args:
        dtype: of the output; rows are converted before they are scaled, as a table in memory would be.
        rounded: a 16-bit dtype to which rows of an fp32 table are rounded first.
    """

    def __init__(self, table: Tensor, *, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
        super().__init__()
        self._table = table
        self._dtype = dtype
        self._rounded = rounded or table.dtype
        # the product of 16-bit tensors: its factor is rounded too
        self._scale = torch.tensor(table.shape[1] ** 0.5, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) int64 to (..., channels) on the device of ``ids``."""
        rows = self._table[ids.cpu()].to(self._rounded).to(self._dtype)
        return (rows * self._scale).to(ids.device)


def text_targets(layers: int) -> list[str]:
    """Names of the modules that can be INT8 in a Gemma-2 of so many layers, in the order of their use."""
    return [f"layers.{index}.{name}" for index in range(layers) for name in (*_ATTENTION, *_FFN)]


def load_text_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    variant: str | None = None,
    int8: bool = False,
    resident: int | None = None,
    fused: bool = False,
) -> Gemma2Model:
    """Read a ``text_encoder/``; the embedding stays in its file, see `MappedEmbedding`.

    Args:
        dtype: of the activations, and of all weights that are not INT8.
        int8: quantize float weights; a package is INT8 anyway.
        resident: bytes of float layers that stay in memory; the others are read again whenever they compute.
            None keeps all.
        fused: INT8 layers are for other products than torch's: they stay `WeightOnlyLinear` on a GPU.

    Raises:
        CheckpointError: a file is missing or damaged, does not fit its config, or is not of a Gemma-2.
    """
    with values_named(folder, variant):
        model, targets = _loaded(folder, dtype, torch.device(device), variant, int8, resident)
    if not fused and model.norm.weight.device.type == "cuda" and targets:
        _use_bitsandbytes(model, targets)
    return model


def _loaded(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    variant: str | None,
    int8: bool,
    resident: int | None,
) -> tuple[Gemma2Model, list[str]]:
    """The model, and which of its modules are INT8."""
    model = _empty_model(folder)
    quantization, where = package.read(folder), str(folder)
    targets = text_targets(len(model.layers))
    lasting = resident is None and (quantization is not None or not int8)
    expected, state = model.state_dict(), _read(folder, variant, lasting=lasting)
    if quantization is not None:
        package.verify(folder, quantization)
        check_tensors(state, quantization, [(name,) for name in targets], where=where)
        targets = [name for name in targets if name not in quantization.kept]
        for name in targets:
            weight = expected[f"{name}.weight"]
            expected[f"{name}.weight"] = weight.to(torch.int8)
            expected[f"{name}.weight_scale"] = weight[:, 0]
    elif not int8:
        targets = []
    check_state(expected, state, where=where)
    most = None if targets else resident
    _fill(model, state, targets, dtype, device, folder, variant, most)
    return model.requires_grad_(False).eval(), targets


def _use_bitsandbytes(model: Gemma2Model, targets: Collection[str]) -> None:
    if choose_product("cuda").name == "bitsandbytes":
        for name in targets:
            model.set_submodule(name, to_bitsandbytes(model.get_submodule(name)))


def quantize_text_state(
    folder: Path, *, variant: str | None = None, keep: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a float ``text_encoder/`` in the INT8 form, one after the other as they are asked for.

    Args:
        keep: names of `text_targets` that stay in 16 bit.

    Raises:
        CheckpointError: as `load_text_model`, or NaN or infinite values; names the layer.
        InvalidInput: ``keep`` has an unknown name.
        SanaError: the weights are INT8 already.
    """
    if package.read(folder) is not None:
        raise SanaError(f"{folder} is quantized already", "give the float model")
    model = _empty_model(folder)
    targets = text_targets(len(model.layers))
    unknown = sorted(set(keep) - set(targets))
    if unknown:
        raise InvalidInput(f"no layer of the text encoder is called {unknown[0]!r}", f"such as {targets[0]}")
    expected, state = model.state_dict(), _read(folder, variant, lasting=False)
    check_state(expected, state, where=str(folder))
    weights = {f"{name}.weight" for name in targets if name not in keep}
    for name in expected:
        if name in weights:
            values, scales = quantize_weight(_float(state, name), name.removesuffix(".weight"))
            yield name, values
            yield f"{name}_scale", scales
        else:
            tensor = _float(state, name)
            yield name, tensor.to(_stored_dtype(tensor, name))


def _empty_model(folder: Path) -> Gemma2Model:
    """The model of a ``config.json``, on the meta device."""
    from transformers import Gemma2Config, Gemma2Model

    path = folder / "config.json"
    description = read_json(path)
    if description.get("model_type") != "gemma2":
        raise CheckpointError(
            f"{path} has model_type {shown(description.get('model_type'))}, expected 'gemma2'",
            "only SANA models with a Gemma-2 text encoder are supported",
        )
    # what else a config says may choose attention kernels, which the library fetches from the hub
    known = {key: value for key, value in description.items() if key in _CONFIG}
    for key, most in _MOST.items():
        value = known.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise CheckpointError(
                f"{path}: {key} is {shown(value)}, expected a whole number from 1 to {most}",
                "the file is damaged; download the model again",
            )
    try:
        with torch.device("meta"):
            # some versions' default, SDPA, leaves the cap of the scores out
            return Gemma2Model(Gemma2Config(**known, attn_implementation="eager"))
    except Exception as error:  # the library's checks of the values raise several kinds
        raise CheckpointError(
            f"{path} does not describe a Gemma-2: {' '.join(str(error).split()) or type(error).__name__}",
            "the file is damaged; download the model again",
        ) from error


def _read(folder: Path, variant: str | None, *, lasting: bool) -> Mapping[str, Tensor]:
    """The tensors by the model's names; mapped ``lasting`` as in `load_state`, or as in `StoredState`."""

    def name(stored: str) -> str | None:
        # of a causal language model the output layer is unused here and tied to the embedding
        return None if stored == "lm_head.weight" else stored.removeprefix("model.")

    if not lasting:
        return StoredState(folder, variant=variant, name=name)
    state = load_state(folder, variant=variant)
    return {known: tensor for stored, tensor in state.items() if (known := name(stored)) is not None}


def _fill(
    model: Gemma2Model,
    state: Mapping[str, Tensor],
    targets: Collection[str],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
    variant: str | None,
    resident: int | None = None,
) -> None:
    """Give an empty model its tensors, ``targets`` in INT8, one by one on ``device``."""

    def placed(name: str) -> Tensor:
        tensor = _float(state, name)
        with values_named(folder, variant):
            check_values({name: tensor}, where=str(folder))
        return tensor.to(_stored_dtype(tensor, name) if targets else dtype).to(device, dtype)

    names, weights = list(model.state_dict()), {f"{name}.weight" for name in targets}
    table = _float(state, _TABLE)
    # a 16-bit table is not read here
    rounded = _stored_dtype(table, _TABLE) if targets and table.dtype == torch.float32 else table.dtype
    model.embed_tokens = MappedEmbedding(table, dtype=dtype, rounded=rounded)
    # its angles are not among the weights, and are on the meta device
    model.rotary_emb = type(model.rotary_emb)(model.config)
    for target in targets:
        bias = placed(f"{target}.bias") if f"{target}.bias" in names else None
        weight, scales = (tensor.to(device) for tensor in _int8_weight(state, target))
        model.set_submodule(target, WeightOnlyLinear(weight, scales, bias))
    read_later = _streamed(model, placed, resident, dtype)
    kept = [name for name in names if name not in weights | {_TABLE} and not name.startswith(read_later)]
    model.load_state_dict({name: placed(name) for name in kept}, strict=False, assign=True)
    if read_later:
        # not the layers, which have no memory now
        model.rotary_emb.to(device)
        return
    model.to(device)


def _streamed(
    model: Gemma2Model, placed: Callable[[str], Tensor], resident: int | None, dtype: torch.dtype
) -> tuple[str, ...]:
    """Prefixes of the layers behind ``resident`` bytes, which now get their weights while they compute."""
    prefixes, size = [], 0
    for index, layer in enumerate(model.layers):
        names = list(layer.state_dict())
        size += sum(tensor.numel() for tensor in layer.parameters()) * dtype.itemsize
        if resident is None or size <= resident:
            continue
        prefix = f"layers.{index}."
        prefixes.append(prefix)

        def read(layer: nn.Module, _: object, prefix: str = prefix, names: list[str] = names) -> None:
            layer.load_state_dict({name: placed(prefix + name) for name in names}, assign=True)
            layer.requires_grad_(False)

        def forget(layer: nn.Module, *_: object) -> None:
            layer.to("meta")

        layer.register_forward_pre_hook(read)
        layer.register_forward_hook(forget)
    return tuple(prefixes)


def _int8_weight(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    if f"{name}.weight_scale" in state:
        return state[f"{name}.weight"], state[f"{name}.weight_scale"]
    return quantize_weight(_float(state, f"{name}.weight"), name)


def _float(state: Mapping[str, Tensor], name: str) -> Tensor:
    tensor = state[name]
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, but config.json says nothing of it",
            "the weights do not belong to config.json; download the model again",
        )
    return tensor


def _stored_dtype(tensor: Tensor, name: str) -> torch.dtype:
    """The dtype in which a package stores a float tensor; reads all of it, in pieces."""
    pieces = (tensor[start : start + _ROWS] for start in range(0, len(tensor), _ROWS))
    absmax = torch.stack([torch.maximum(piece.amax(), -piece.amin()) for piece in pieces]).amax()
    if not absmax.isfinite():
        raise DamagedWeights(
            f"{name} has NaN or infinite values", "the file is damaged; download the model again"
        )
    return to_16_bit(absmax).dtype
