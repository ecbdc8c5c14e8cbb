"""Checkpoints as NVlabs (denoiser) and MIT HAN Lab (autoencoder) publish them, in diffusers' names.

Each function returns the config that the shapes tell and the renamed tensors, views of the old ones. A
checkpoint in diffusers' names is taken as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sana_edge.config import LATENT_CELL, AutoencoderConfig, DenoiserConfig
from sana_edge.errors import CheckpointError, InvalidInput

# of the two published widths; heads leave no trace in the shapes
CROSS_ATTENTION_HEADS = {1152: 16, 2240: 20}
SELF_HEAD_DIM = 32
# image size in pixels -> interpolation scale of the position embedding
SIZES: dict[int, float | None] = {512: None, 1024: None, 2048: 1.0, 4096: 2.0}
# latents times this have unit variance; of the SANA autoencoders 1.0 and 1.1
SCALING_FACTOR = 0.41407

_DENOISER = {
    "x_embedder.proj": "patch_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "attention_y_norm": "caption_norm",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "final_layer.linear": "proj_out",
    "final_layer": "",
}
_DENOISER_BLOCK = {
    "": ("",),
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.proj": ("attn1.to_out.0",),
    "attn.q_norm": ("attn1.norm_q",),
    "attn.k_norm": ("attn1.norm_k",),
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
    "cross_attn.q_norm": ("attn2.norm_q",),
    "cross_attn.k_norm": ("attn2.norm_k",),
    "mlp.inverted_conv.conv": ("ff.conv_inverted",),
    "mlp.depth_conv.conv": ("ff.conv_depth",),
    "mlp.point_conv.conv": ("ff.conv_point",),
}
# only training uses these; the position table is made again from the size
_DENOISER_DROPPED = ("y_embedder.y_embedding", "pos_embed", "logvar_linear.weight", "logvar_linear.bias")

_AUTOENCODER = {
    "encoder.project_in.conv": "encoder.conv_in",
    # with an empty first stage the projections resample
    "encoder.project_in.conv.conv": "encoder.conv_in.conv",
    "encoder.project_out.0.conv": "encoder.conv_out",
    "decoder.project_in.conv": "decoder.conv_in",
    "decoder.project_out.0": "decoder.norm_out",
    "decoder.project_out.2.conv": "decoder.conv_out",
    "decoder.project_out.2.conv.conv": "decoder.conv_out.conv",
}
_AUTOENCODER_BLOCK = {
    "conv1.conv": ("conv1",),
    "conv2.conv": ("conv2",),
    "conv2.norm": ("norm",),
    "conv": ("conv",),
    "conv.conv": ("conv",),
    "context_module.qkv.conv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_module.aggreg.0.0": ("attn.to_qkv_multiscale.0.proj_in",),
    "context_module.aggreg.0.1": ("attn.to_qkv_multiscale.0.proj_out",),
    "context_module.proj.conv": ("attn.to_out",),
    "context_module.proj.norm": ("attn.norm_out",),
    "local_module.inverted_conv.conv": ("conv_out.conv_inverted",),
    "local_module.depth_conv.conv": ("conv_out.conv_depth",),
    "local_module.point_conv.conv": ("conv_out.conv_point",),
    "local_module.point_conv.norm": ("conv_out.norm",),
}
# 1x1 convolutions there, linear layers here
_AUTOENCODER_LINEAR = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out")


def denoiser(
    state: Mapping[str, Tensor],
    *,
    size: int | None = None,
    cross_attention_heads: int | None = None,
    published: bool = False,
) -> tuple[DenoiserConfig, dict[str, Tensor]]:
    """Read a SANA denoiser: 1.0, 1.5 or Sprint, any depth and width.

    Args:
        published: the names are diffusers' already.
        size: side in pixels of the pictures it was trained on, one of 512, 1024, 2048 and 4096; None if the
            checkpoint has a position table that tells.
        cross_attention_heads: for a width other than the published 1152 and 2240.

    Raises:
        InvalidInput: an argument is needed, or cannot be.
        CheckpointError: keys that no SANA denoiser has, or lacks.
    """
    guidance = "cfg_embedder.mlp.0.weight" in state
    time = "time_embed" if guidance else "time_embed.emb"
    names = {f"t_embedder.mlp.{i}": f"{time}.timestep_embedder.linear_{i // 2 + 1}" for i in (0, 2)}

    def rename(module: str) -> tuple[str, ...] | None:
        block = re.fullmatch(r"(?:blocks\.(\d+)(?:\.|$))(.*)", module)
        if block is None:
            target = {**_DENOISER, **names}.get(module)
            return None if target is None else (target,)
        return _in_block(f"transformer_blocks.{block[1]}", _DENOISER_BLOCK.get(block[2]))

    kept = {key: tensor for key, tensor in state.items() if key not in _DENOISER_DROPPED}
    renamed = kept if published else _rename(kept, rename, "denoiser")
    positions = state.get("pos_embed")
    return _denoiser_config(renamed, size or _size_of(positions), cross_attention_heads), renamed


def autoencoder(
    state: Mapping[str, Tensor], *, published: bool = False
) -> tuple[AutoencoderConfig, dict[str, Tensor]]:
    """Read a DC-AE of the SANA family (RMS norms, SiLU), DC-AE-Lite with its empty first stage included.

    Args:
        published: the names are diffusers' already.

    Raises:
        CheckpointError: keys that such an autoencoder does not have, or lacks.
    """

    def rename(module: str) -> tuple[str, ...] | None:
        block = re.fullmatch(r"(encoder|decoder)\.stages\.(\d+\.\d+)\.(.*)", module)
        if block is None:
            target = _AUTOENCODER.get(module)
            return None if target is None else (target,)
        blocks = "down_blocks" if block[1] == "encoder" else "up_blocks"
        return _in_block(f"{block[1]}.{blocks}.{block[2]}", _AUTOENCODER_BLOCK.get(block[3]))

    if published:
        return _autoencoder_config(state), dict(state)
    plain = {re.sub(r"\b(main|op_list)\.", "", key): tensor for key, tensor in state.items()}
    renamed = _rename(plain, rename, "autoencoder")
    for key, tensor in renamed.items():
        if key.removesuffix(".weight").endswith(_AUTOENCODER_LINEAR):
            renamed[key] = tensor.flatten(1)
    if not any(key.startswith("encoder.down_blocks.0.") for key in renamed):
        # what projects into an empty first stage is a resampling, which has its convolution inside
        for leaf in ("weight", "bias"):
            if f"encoder.conv_in.{leaf}" in renamed:
                renamed[f"encoder.conv_in.conv.{leaf}"] = renamed.pop(f"encoder.conv_in.{leaf}")
    return _autoencoder_config(renamed), renamed


def _in_block(prefix: str, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return None if targets is None else tuple(f"{prefix}.{name}".rstrip(".") for name in targets)


def _rename(
    state: Mapping[str, Tensor], rename: Callable[[str], tuple[str, ...] | None], what: str
) -> dict[str, Tensor]:
    """Rename every tensor; ``rename`` gives a module's new names, between which its rows are divided."""
    result: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        targets = rename(module)
        if targets is None:
            unknown.append(key)
            continue
        for target, part in zip(targets, _divide(tensor, len(targets), key), strict=True):
            result[f"{target}.{leaf}".lstrip(".")] = part
    if unknown:
        listed = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise CheckpointError(f"{len(unknown)} keys are of no SANA {what} ({listed})")
    return result


def _divide(tensor: Tensor, parts: int, key: str) -> tuple[Tensor, ...]:
    if parts == 1:
        return (tensor,)
    if tensor.ndim == 0 or tensor.shape[0] % parts:
        raise CheckpointError(f"{key} is {tuple(tensor.shape)}, expected rows in {parts} equal parts")
    return tensor.chunk(parts)


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> torch.Size:
    if key not in state:
        raise CheckpointError(f"the checkpoint has no {key}")
    if state[key].ndim != dimensions:
        raise CheckpointError(f"{key} is {tuple(state[key].shape)}, expected {dimensions} dimensions")
    return state[key].shape


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand in the group of ``pattern`` at the start of the keys."""
    return len({match[1] for key in state if (match := re.match(pattern, key))})


def _denoiser_config(state: Mapping[str, Tensor], size: int | None, heads: int | None) -> DenoiserConfig:
    dim, channels, patch = _shape(state, "patch_embed.proj.weight", 4)[:3]
    ffn = _shape(state, "transformer_blocks.0.ff.conv_inverted.weight", 4)[0] // 2
    if dim % SELF_HEAD_DIM:
        raise CheckpointError(f"the denoiser's width is {dim}, not a multiple of {SELF_HEAD_DIM}")
    heads = heads or CROSS_ATTENTION_HEADS.get(dim)
    if heads is None or dim % heads:
        raise InvalidInput(
            f"a denoiser of width {dim} with {heads or 'an unknown number of'} cross-attention heads",
            f"only the widths {' and '.join(map(str, CROSS_ATTENTION_HEADS))} are published: give"
            " --cross-attention-heads",
        )
    if size not in SIZES:
        raise InvalidInput(
            f"size {size} is none that SANA was trained on"
            if size
            else "the checkpoint does not say on which size it was trained",
            f"give the size: {', '.join(map(str, SIZES))}",
        )
    found = DenoiserConfig(
        in_channels=channels,
        out_channels=_shape(state, "proj_out.weight", 2)[0],
        num_layers=_count(state, r"transformer_blocks\.(\d+)\."),
        num_attention_heads=dim // SELF_HEAD_DIM,
        attention_head_dim=SELF_HEAD_DIM,
        num_cross_attention_heads=heads,
        cross_attention_head_dim=dim // heads,
        cross_attention_dim=dim,
        caption_channels=_shape(state, "caption_projection.linear_1.weight", 2)[1],
        mlp_ratio=ffn / dim,
        attention_bias="transformer_blocks.0.attn1.to_q.bias" in state,
        sample_size=size // LATENT_CELL,
        patch_size=patch,
        interpolation_scale=SIZES[size],
        guidance_embeds="time_embed.guidance_embedder.linear_1.weight" in state,
        qk_norm="rms_norm_across_heads" if "transformer_blocks.0.attn1.norm_q.weight" in state else None,
    )
    # within its bounds: a file of names alone may have any number of layers
    return DenoiserConfig.from_dict(found.to_dict())


def _size_of(positions: Tensor | None) -> int | None:
    """Pixels along a side, from a position table (1, tokens, dim) with one token per latent cell."""
    return None if positions is None else math.isqrt(positions.shape[1]) * LATENT_CELL


def _autoencoder_config(state: Mapping[str, Tensor]) -> AutoencoderConfig:
    down, up = _Side(state, "encoder", "down_blocks"), _Side(state, "decoder", "up_blocks")
    if down.stages < 2 or up.stages != down.stages:
        raise CheckpointError(
            f"the checkpoint has an encoder of {down.stages} stages and a decoder of {up.stages}"
        )
    head = next((tensor.shape[1] for key, tensor in state.items() if key.endswith(".proj_out.weight")), 32)
    found = AutoencoderConfig(
        in_channels=_shape(state, f"encoder.conv_in.{'' if down.layers[0] else 'conv.'}weight", 4)[1],
        latent_channels=_shape(state, "decoder.conv_in.weight", 4)[1],
        attention_head_dim=head,
        encoder_block_types=down.types,
        decoder_block_types=up.types,
        encoder_block_out_channels=down.widths,
        decoder_block_out_channels=up.widths,
        encoder_layers_per_block=down.layers,
        decoder_layers_per_block=up.layers,
        encoder_qkv_multiscales=down.scales,
        decoder_qkv_multiscales=up.scales,
        upsample_block_type="interpolate" if up.resampled == up.widths[up.first] else "pixel_shuffle",
        downsample_block_type="Conv" if down.resampled == down.widths[down.first + 1] else "pixel_unshuffle",
        decoder_norm_types=("rms_norm",) * up.stages,
        decoder_act_fns=("silu",) * up.stages,
        # which no tensor tells: of the published decoders DC-AE-Lite's is SiLU, and has an empty stage
        decoder_conv_act_fn="relu" if up.layers[0] else "silu",
        scaling_factor=SCALING_FACTOR,
    )
    return AutoencoderConfig.from_dict(found.to_dict())


class _Side:
    """What the shapes of an encoder or a decoder tell, one entry for each stage.

    Attributes:
        first: the first stage that has blocks; only stage 0 may have none.
        resampled: output channels of that stage's resampling, which pixel (un)shuffling changes fourfold.
    """

    def __init__(self, state: Mapping[str, Tensor], side: str, name: str) -> None:
        self._state, self._blocks = state, f"{side}.{name}"
        numbers = [int(m[1]) for key in state if (m := re.match(rf"{side}\.{name}\.(\d{{1,2}})\.", key))]
        self.stages = max(numbers, default=-1) + 1
        if self.stages < 2:
            return
        stages = range(self.stages)
        self.first = min(numbers)
        # every stage but the last has a resampling beside its blocks: the last entry of an encoder's, the
        # first of a decoder's
        entries = [_count(state, rf"{side}\.{name}\.{i}\.(\d+)\.") for i in stages]
        self.layers = tuple(
            max(count - (i < stages[-1]), 0) for i, count in zip(stages, entries, strict=True)
        )
        decoder = side == "decoder"
        blocks = [f"{self._blocks}.{i}.{int(decoder and i < stages[-1])}" for i in stages[self.first :]]
        self.types = self._padded([_block_type(state, block) for block in blocks])
        # an empty stage has no width
        self.widths = self._padded([_width(state, block) for block in blocks])
        self.scales = ((),) * self.first + tuple(_scales(state, block) for block in blocks)
        entry = 0 if decoder else self.layers[self.first]
        self.resampled = _shape(state, f"{self._blocks}.{self.first}.{entry}.conv.weight", 4)[0]

    def _padded(self, values: list[Any]) -> tuple[Any, ...]:
        return tuple(values[:1] * self.first + values)


def _block_type(state: Mapping[str, Tensor], block: str) -> str:
    return "EfficientViTBlock" if f"{block}.attn.to_q.weight" in state else "ResBlock"


def _width(state: Mapping[str, Tensor], block: str) -> int:
    attention = f"{block}.attn.to_q.weight"
    return (
        _shape(state, attention, 2)[1] if attention in state else _shape(state, f"{block}.conv1.weight", 4)[1]
    )


def _scales(state: Mapping[str, Tensor], block: str) -> tuple[int, ...]:
    key = f"{block}.attn.to_qkv_multiscale.0.proj_in.weight"
    return (state[key].shape[-1],) if key in state else ()
