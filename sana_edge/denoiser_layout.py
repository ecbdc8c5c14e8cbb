"""Parameter names of `sana_edge.denoiser.Denoiser` and of diffusers' SanaTransformer2DModel, both ways.

Ours stack q, k, v of the self-attention, and k, v of the cross-attention, along the rows of one matrix each,
and keep 1×1 convolutions as (out, in) matrices.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError

_ONE_BY_ONE = ("patch_embed.proj.weight", "ff.conv_inverted.weight", "ff.conv_point.weight")
_WRONG_MODEL = "the config.json beside the weights must describe the same model"


def _module(ours: str, *theirs: str, bias: bool = True) -> dict[str, tuple[str, ...]]:
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": tuple(f"{name}.{kind}" for name in theirs) for kind in kinds}


def _block_names(config: DenoiserConfig) -> dict[str, tuple[str, ...]]:
    names = {
        "table": ("scale_shift_table",),
        **_module("qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v", bias=config.attention_bias),
        **_module("out", "attn1.to_out.0"),
        **_module("cross_q", "attn2.to_q"),
        **_module("cross_kv", "attn2.to_k", "attn2.to_v"),
        **_module("cross_out", "attn2.to_out.0"),
        **_module("expand", "ff.conv_inverted"),
        **_module("depthwise", "ff.conv_depth"),
        **_module("project", "ff.conv_point", bias=False),
    }
    if config.qk_norm is not None:
        names |= {
            "norm_q": ("attn1.norm_q.weight",),
            "norm_k": ("attn1.norm_k.weight",),
            "cross_norm_q": ("attn2.norm_q.weight",),
            "cross_norm_k": ("attn2.norm_k.weight",),
        }
    return names


def names(config: DenoiserConfig) -> dict[str, tuple[str, ...]]:
    """Our parameter name to diffusers' names, whose tensors stacked along the rows are ours."""
    embedder = "time_embed" if config.guidance_embeds else "time_embed.emb"
    result = {
        **_module("patch", "patch_embed.proj"),
        **_module("time.expand", f"{embedder}.timestep_embedder.linear_1"),
        **_module("time.mix", f"{embedder}.timestep_embedder.linear_2"),
        **_module("modulate", "time_embed.linear"),
        **_module("caption_expand", "caption_projection.linear_1"),
        **_module("caption_mix", "caption_projection.linear_2"),
        "caption_norm": ("caption_norm.weight",),
        "table": ("scale_shift_table",),
        **_module("head", "proj_out"),
    }
    if config.guidance_embeds:
        result |= _module("guidance.expand", "time_embed.guidance_embedder.linear_1")
        result |= _module("guidance.mix", "time_embed.guidance_embedder.linear_2")
    for layer in range(config.num_layers):
        for ours, theirs in _block_names(config).items():
            prefix = f"transformer_blocks.{layer}."
            result[f"blocks.{layer}.{ours}"] = tuple(prefix + name for name in theirs)
    return result


def from_diffusers(
    config: DenoiserConfig, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Rename and stack a diffusers state dict; ``shapes`` are those of our parameters.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or belongs to no parameter.
    """
    result, used = {}, set[str]()
    for ours, theirs in names(config).items():
        missing = [name for name in theirs if name not in state]
        if missing:
            raise CheckpointError(f"transformer weights lack {missing[0]}", _WRONG_MODEL)
        rows, *rest = shapes[ours]
        expected = [rows // len(theirs), *rest]
        for name in theirs:
            shape = [*expected, 1, 1] if name.endswith(_ONE_BY_ONE) else expected
            if list(state[name].shape) != shape:
                found = list(state[name].shape)
                raise CheckpointError(f"transformer weight {name} is {found}, expected {shape}", _WRONG_MODEL)
        parts = [state[name].reshape(expected) for name in theirs]
        result[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
        used.update(theirs)
    unknown = sorted(set(state) - used)
    if unknown:
        raise CheckpointError(f"transformer weights contain {unknown[0]}, which nothing reads", _WRONG_MODEL)
    return result


def to_diffusers(config: DenoiserConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_diffusers`: every tensor is contiguous and owns its memory."""
    result = {}
    for ours, theirs in names(config).items():
        for name, part in zip(theirs, state[ours].detach().chunk(len(theirs)), strict=True):
            part = part[..., None, None] if name.endswith(_ONE_BY_ONE) else part
            result[name] = part.clone(memory_format=torch.contiguous_format)
    return result
