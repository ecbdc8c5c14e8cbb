"""Parameter names of `sana_edge.nets.denoiser.Denoiser` and of diffusers' SanaTransformer2DModel, both ways.

Ours stack q, k, v of the self-attention, and k, v of the cross-attention, along the rows of one matrix each,
and keep 1×1 convolutions as (out, in) matrices. An INT8 module has a ``weight_scale`` beside its weight,
stacked like it, and may have an ``input_scale``: q, k and v have one input, and so one scale, on ``to_q``. A
smoothed model has ``smoothing`` (2, dim) in every block, ours has those of all layers in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sana_edge.config import DenoiserConfig
from sana_edge.errors import CheckpointError, DamagedWeights

_ONE_BY_ONE = ("patch_embed.proj.weight", "ff.conv_inverted.weight", "ff.conv_point.weight")
_SCALES = (".weight_scale", ".input_scale")
_SMOOTHING = "smoothing"
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


def quantized(config: DenoiserConfig, state: Mapping[str, Tensor]) -> dict[str, bool]:
    """Our names of the layers that are INT8 in a diffusers state, and whether they have an input scale."""
    result = {}
    for ours, theirs in names(config).items():
        modules = [name.removesuffix(".weight") for name in theirs if name.endswith(".weight")]
        if any(f"{module}.weight_scale" in state for module in modules):
            result[ours.removesuffix(".weight")] = f"{modules[0]}.input_scale" in state
    return result


def from_diffusers(
    config: DenoiserConfig, state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """Rename and stack a diffusers state dict; ``shapes`` are those of our tensors, all that are wanted.

    Raises:
        CheckpointError: a tensor is missing, has another shape or dtype, or is not wanted.
    """
    result, used = {}, set[str]()
    for ours, theirs in _all_names(config, shapes).items():
        missing = [name for name in theirs if name not in state]
        if missing:
            raise CheckpointError(f"transformer weights lack {missing[0]}", _WRONG_MODEL)
        int8 = ours.endswith(".weight") and f"{ours}_scale" in shapes
        parts = [_checked(name, state[name], _part(name, shapes[ours], len(theirs)), int8) for name in theirs]
        if ours == _SMOOTHING:
            result[ours] = torch.stack(parts)
        else:
            result[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
        used.update(theirs)
    unknown = sorted(set(state) - used)
    if unknown:
        raise CheckpointError(f"transformer weights contain {unknown[0]}, which nothing reads", _WRONG_MODEL)
    return result


def to_diffusers(config: DenoiserConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `from_diffusers`: every tensor is contiguous and owns its memory."""
    result = {}
    for ours, theirs in _all_names(config, state).items():
        tensor = state[ours].detach()
        parts = (
            tensor.unbind() if ours == _SMOOTHING else tensor.chunk(len(theirs)) if tensor.ndim else [tensor]
        )
        for name, part in zip(theirs, parts, strict=True):
            part = part[..., None, None] if name.endswith(_ONE_BY_ONE) else part
            result[name] = part.clone(memory_format=torch.contiguous_format)
    return result


def _all_names(config: DenoiserConfig, ours: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """`names`, and those of the scales and the smoothing that are among our names."""
    result = names(config)
    for name in ours:
        if name == _SMOOTHING:
            blocks = range(config.num_layers)
            result[name] = tuple(f"transformer_blocks.{layer}.{_SMOOTHING}" for layer in blocks)
        elif name.endswith(_SCALES):
            module, kind = name.rsplit(".", 1)
            theirs = tuple(
                f"{weight.removesuffix('.weight')}.{kind}" for weight in result[f"{module}.weight"]
            )
            result[name] = theirs[:1] if kind == "input_scale" else theirs
    return result


def _part(name: str, shape: torch.Size, count: int) -> list[int]:
    """The shape of one of ``count`` tensors that make up one of ours, without the 1×1 of a kernel."""
    if name.endswith(f".{_SMOOTHING}"):
        return list(shape[1:])
    return [shape[0] // count, *shape[1:]] if shape else []


def _checked(name: str, tensor: Tensor, expected: list[int], int8: bool) -> Tensor:
    """A tensor of diffusers in our shape; scales and smoothing in fp32."""
    shape = [*expected, 1, 1] if name.endswith(_ONE_BY_ONE) else expected
    if list(tensor.shape) != shape:
        found = list(tensor.shape)
        raise CheckpointError(f"transformer weight {name} is {found}, expected {shape}", _WRONG_MODEL)
    if tensor.dtype != torch.int8 if int8 else not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        wanted = "int8, as it has a weight_scale" if int8 else "a float dtype"
        raise CheckpointError(f"transformer weight {name} is {kind}, expected {wanted}", _WRONG_MODEL)
    if name.endswith((*_SCALES, f".{_SMOOTHING}")):
        tensor = tensor.float()
        if not (tensor.isfinite() & (tensor > 0)).all():
            raise DamagedWeights(f"transformer weight {name} has values that are not above 0", _WRONG_MODEL)
    return tensor.reshape(expected)
