"""What a model folder's config files say, as frozen dataclasses; field names and defaults are diffusers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sana_edge.system.json_values import Between, Reader

SamplerKind = Literal["flow-dpm", "flow-euler", "scm"]

# pixels per latent cell of the f32 autoencoder that every public SANA model uses
LATENT_CELL = 32
# channels inside of the gated convolution of an EfficientViT block, for one outside
EXPAND_RATIO = 4

# of numbers that a model may have; the largest SANA has 60 layers of 2240 channels
Count = Annotated[int, Between(1, 1024)]
# modules of each are made before the weights are looked at
Layers = Annotated[int, Between(1, 256)]
Width = Annotated[int, Between(1, 1 << 16)]
Positive = Annotated[float, Between(1e-12, 1e6)]
_Names = Annotated[tuple[str, ...], Between(1, 16)]
_Widths = Annotated[tuple[Width, ...], Between(1, 16)]
_Layers = Annotated[tuple[Annotated[int, Between(0, 64)], ...], Between(1, 16)]
_Scales = Annotated[
    tuple[Annotated[tuple[Annotated[int, Between(1, 31)], ...], Between(0, 8)], ...], Between(1, 16)
]

_BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
_ACTIVATIONS = ("silu", "relu")


@dataclass(frozen=True)
class DenoiserConfig:
    """``transformer/config.json``, the Linear DiT (arXiv 2410.10629, section 2.2 and table 6).

    ``interpolation_scale`` is set only for models with a sin-cos position embedding (2K and 4K);
    ``qk_norm`` is None or "rms_norm_across_heads" (SANA-1.5, Sprint); ``sample_size`` is the side of the
    latent the model was trained on.
    """

    in_channels: Count = 32
    out_channels: Count = 32
    num_layers: Layers = 20
    num_attention_heads: Count = 70
    attention_head_dim: Count = 32
    num_cross_attention_heads: Count = 20
    cross_attention_head_dim: Count = 112
    cross_attention_dim: Width = 2240
    caption_channels: Width = 2304
    mlp_ratio: Annotated[float, Between(0.01, 64)] = 2.5
    attention_bias: bool = False
    sample_size: Count = 32
    patch_size: Annotated[int, Between(1, 1)] = 1
    norm_eps: Positive = 1e-6
    interpolation_scale: Positive | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: Annotated[float, Between(-1e6, 1e6)] = 0.1
    qk_norm: Literal["rms_norm_across_heads"] | None = None
    timestep_scale: Positive = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DenoiserConfig:
        """Read a parsed ``config.json``; keys that do not change the model are ignored.

        Raises:
            CheckpointError: a value has the wrong type or describes a model that SANA does not have.
        """
        owner = "transformer/config.json"
        if data.get("out_channels", 32) is None:
            data = {**data, "out_channels": data.get("in_channels", 32)}
        reader = Reader(owner, defaults=True)
        config: DenoiserConfig = reader.convert(data, cls)
        expected = f"{config.dim} (num_attention_heads x attention_head_dim)"
        found = config.cross_attention_dim
        reader.require(found == config.dim, "cross_attention_dim", found, expected)
        ratio = config.mlp_ratio
        reader.require(config.ffn_dim > 0, "mlp_ratio", ratio, f"a number from {1 / config.dim:.2g}")
        affine = data.get("norm_elementwise_affine", False)
        reader.require(affine is False, "norm_elementwise_affine", affine, "False")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that diffusers and `from_dict` read."""
        return {"_class_name": "SanaTransformer2DModel", **dataclasses.asdict(self)}

    @property
    def dim(self) -> int:
        """Width of the token stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Channels between the Mix-FFN's gate and its last projection (the expansion makes twice as many)."""
        return int(self.mlp_ratio * self.dim)

    @property
    def native_size(self) -> int:
        """Side in pixels of the pictures the model was trained on."""
        return self.sample_size * LATENT_CELL


@dataclass(frozen=True)
class AutoencoderConfig:
    """``vae/config.json``, the DC-AE. Tuples have one entry per stage, highest resolution first."""

    in_channels: Count = 3
    latent_channels: Count = 32
    attention_head_dim: Count = 32
    encoder_block_types: _Names = ("ResBlock",) * 6
    decoder_block_types: _Names = ("ResBlock",) * 6
    encoder_block_out_channels: _Widths = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: _Widths = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: _Layers = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: _Layers = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: _Scales = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: _Scales = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: _Names = ("rms_norm",) * 6
    decoder_act_fns: _Names = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: Positive = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a parsed ``config.json``; a single name for all stages is repeated for each.

        Raises:
            CheckpointError: a value has the wrong type or describes an autoencoder that SANA does not use.
        """
        owner = "vae/config.json"
        reader = Reader(owner, defaults=True)
        config: AutoencoderConfig = reader.convert(_repeat_names(data), cls)
        for side in ("encoder", "decoder"):
            stages = len(getattr(config, f"{side}_block_out_channels"))
            norms = ("norm_types", "act_fns") if side == "decoder" else ()
            for key in ("block_types", "layers_per_block", "qkv_multiscales", *norms):
                value = getattr(config, f"{side}_{key}")
                reader.require(len(value) == stages, f"{side}_{key}", value, f"{stages} entries")
        for key, allowed in (
            ("encoder_block_types", _BLOCK_TYPES),
            ("decoder_block_types", _BLOCK_TYPES),
            ("decoder_norm_types", ("rms_norm",)),
            ("decoder_act_fns", _ACTIVATIONS),
        ):
            value = getattr(config, key)
            reader.require(set(value) <= set(allowed), key, value, f"names from {allowed}")
        activation = config.decoder_conv_act_fn
        fits = activation in _ACTIVATIONS
        reader.require(fits, "decoder_conv_act_fn", activation, f"one of {_ACTIVATIONS}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that diffusers and `from_dict` read."""
        return {"_class_name": "AutoencoderDC", **dataclasses.asdict(self)}

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent cell along a side: every stage but the first halves the resolution."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))


def _repeat_names(data: Mapping[str, Any]) -> dict[str, Any]:
    defaults = AutoencoderConfig()
    result = dict(data)
    for key in ("encoder_block_types", "decoder_block_types", "decoder_norm_types", "decoder_act_fns"):
        channels = f"{key.split('_')[0]}_block_out_channels"
        stages = data.get(channels, getattr(defaults, channels))
        value = data.get(key, getattr(defaults, key)[0])
        if isinstance(value, str) and isinstance(stages, list | tuple):
            result[key] = [value] * min(max(len(stages), 1), 16)
    return result


_SCHEDULERS: dict[str, SamplerKind] = {
    "DPMSolverMultistepScheduler": "flow-dpm",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "SCMScheduler": "scm",
}

# per scheduler: key, diffusers' default where the file is silent, the one value that is implemented
_SCHEDULER_KEYS: dict[SamplerKind, tuple[tuple[str, Any, Any], ...]] = {
    "flow-dpm": (
        ("prediction_type", "epsilon", "flow_prediction"),
        ("use_flow_sigmas", False, True),
        ("solver_order", 2, 2),
        ("algorithm_type", "dpmsolver++", "dpmsolver++"),
        ("solver_type", "midpoint", "midpoint"),
        ("final_sigmas_type", "zero", "zero"),
        ("thresholding", False, False),
        ("use_dynamic_shifting", False, False),
        ("use_karras_sigmas", False, False),
        ("use_exponential_sigmas", False, False),
        ("use_beta_sigmas", False, False),
        ("use_lu_lambdas", False, False),
    ),
    "flow-euler": (
        ("use_dynamic_shifting", False, False),
        ("invert_sigmas", False, False),
        ("shift_terminal", None, None),
        ("stochastic_sampling", False, False),
        ("use_karras_sigmas", False, False),
        ("use_exponential_sigmas", False, False),
        ("use_beta_sigmas", False, False),
    ),
    "scm": (("prediction_type", "trigflow", "trigflow"),),
}


@dataclass(frozen=True)
class SamplerConfig:
    """``scheduler/scheduler_config.json``: the sampler a model was made for.

    ``flow_shift`` is used by the two flow samplers, ``sigma_data`` by SCM.
    """

    kind: SamplerKind = "flow-dpm"
    flow_shift: Annotated[float, Between(0.01, 100)] = 1.0
    num_train_timesteps: Annotated[int, Between(1, 1_000_000)] = 1000
    sigma_data: Annotated[float, Between(1e-3, 1000)] = 0.5

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplerConfig:
        """Read a parsed ``scheduler_config.json``.

        Raises:
            CheckpointError: the scheduler class, or one of its settings, has no sampler here.
        """
        owner = "scheduler/scheduler_config.json"
        name = data.get("_class_name")
        reader = Reader(owner, defaults=True)
        known = isinstance(name, str) and name in _SCHEDULERS
        reader.require(known, "_class_name", name, f"one of {', '.join(_SCHEDULERS)}")
        kind = _SCHEDULERS[str(name)]
        for key, default, supported in _SCHEDULER_KEYS[kind]:
            value = data.get(key, default)
            fits = type(value) is type(supported) and value == supported
            reader.require(fits, key, value, repr(supported))
        numbers = {key: value for key, value in data.items() if key != "kind"}
        if kind == "flow-euler" and "shift" in data:
            numbers["flow_shift"] = data["shift"]
        config: SamplerConfig = reader.convert(numbers, cls)
        return dataclasses.replace(config, kind=kind)
