"""What a model folder's config files say, as frozen dataclasses; field names and defaults are diffusers'."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sana_edge.errors import CheckpointError

SamplerKind = Literal["flow-dpm", "flow-euler", "scm"]

# pixels per latent cell of the f32 autoencoder that every public SANA model uses
LATENT_CELL = 32

_T = TypeVar("_T")

_BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
_ACTIVATIONS = ("silu", "relu")


def _require(condition: bool, owner: str, key: str, value: object, expected: str) -> None:
    if not condition:
        raise CheckpointError(f"{owner}: {key} is {value!r}, expected {expected}")


def _convert(value: Any, hint: Any, owner: str, key: str) -> Any:
    """``value`` as the annotated type ``hint``: JSON lists become tuples, integers may become floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        (hint,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(value, hint, owner, key)
    if origin is tuple:
        _require(isinstance(value, list | tuple), owner, key, value, "a list")
        return tuple(_convert(item, arguments[0], owner, key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    _require(type(value) is hint, owner, key, value, f"a {hint.__name__}")
    return value


def _from_dict(cls: type[_T], data: Mapping[str, Any], owner: str) -> _T:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: _convert(data[name], hints[name], owner, name) for name in names if name in data})


def _positive(config: Any, owner: str, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        _require(0 < value < math.inf, owner, key, value, "a positive number")


@dataclass(frozen=True)
class DenoiserConfig:
    """``transformer/config.json``, the Linear DiT (arXiv 2410.10629, section 2.2 and table 6).

    ``interpolation_scale`` is set only for models with a sin-cos position embedding (2K and 4K);
    ``qk_norm`` is None or "rms_norm_across_heads" (SANA-1.5, Sprint); ``sample_size`` is the side of the
    latent the model was trained on.
    """

    in_channels: int = 32
    out_channels: int = 32
    num_layers: int = 20
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    cross_attention_dim: int = 2240
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    attention_bias: bool = False
    sample_size: int = 32
    patch_size: int = 1
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    qk_norm: str | None = None
    timestep_scale: float = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DenoiserConfig:
        """Read a parsed ``config.json``; keys that do not change the model are ignored.

        Raises:
            CheckpointError: a value has the wrong type or describes a model that SANA does not have.
        """
        owner = "transformer/config.json"
        if data.get("out_channels", 32) is None:
            data = {**data, "out_channels": data.get("in_channels", 32)}
        config = _from_dict(cls, data, owner)
        _positive(config, owner, "in_channels", "out_channels", "num_layers", "num_attention_heads")
        _positive(
            config, owner, "attention_head_dim", "num_cross_attention_heads", "cross_attention_head_dim"
        )
        _positive(config, owner, "caption_channels", "mlp_ratio", "sample_size", "norm_eps", "timestep_scale")
        _require(config.patch_size == 1, owner, "patch_size", config.patch_size, "1")
        _require(
            config.cross_attention_dim == config.dim,
            owner,
            "cross_attention_dim",
            config.cross_attention_dim,
            f"{config.dim} (num_attention_heads x attention_head_dim)",
        )
        norms = (None, "rms_norm_across_heads")
        _require(config.qk_norm in norms, owner, "qk_norm", config.qk_norm, f"one of {norms}")
        affine = data.get("norm_elementwise_affine", False)
        _require(affine is False, owner, "norm_elementwise_affine", affine, "False")
        if config.interpolation_scale is not None:
            _positive(config, owner, "interpolation_scale")
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

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 6
    encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: tuple[str, ...] = ("rms_norm",) * 6
    decoder_act_fns: tuple[str, ...] = ("silu",) * 6
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AutoencoderConfig:
        """Read a parsed ``config.json``; a single name for all stages is repeated for each.

        Raises:
            CheckpointError: a value has the wrong type or describes an autoencoder that SANA does not use.
        """
        owner = "vae/config.json"
        config = _from_dict(cls, _repeat_names(data), owner)
        _positive(config, owner, "in_channels", "latent_channels", "attention_head_dim", "scaling_factor")
        for side in ("encoder", "decoder"):
            channels = getattr(config, f"{side}_block_out_channels")
            _require(min(channels, default=0) > 0, owner, f"{side}_block_out_channels", channels, "widths")
            stages = len(channels)
            norms = ("norm_types", "act_fns") if side == "decoder" else ()
            for key in ("block_types", "layers_per_block", "qkv_multiscales", *norms):
                value = getattr(config, f"{side}_{key}")
                _require(len(value) == stages, owner, f"{side}_{key}", value, f"{stages} entries")
        for key, allowed in (
            ("encoder_block_types", _BLOCK_TYPES),
            ("decoder_block_types", _BLOCK_TYPES),
            ("decoder_norm_types", ("rms_norm",)),
            ("decoder_act_fns", _ACTIVATIONS),
        ):
            value = getattr(config, key)
            _require(set(value) <= set(allowed), owner, key, value, f"names from {allowed}")
        activation = config.decoder_conv_act_fn
        _require(
            activation in _ACTIVATIONS, owner, "decoder_conv_act_fn", activation, f"one of {_ACTIVATIONS}"
        )
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
            result[key] = [value] * len(stages)
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
    flow_shift: float = 1.0
    num_train_timesteps: int = 1000
    sigma_data: float = 0.5

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SamplerConfig:
        """Read a parsed ``scheduler_config.json``.

        Raises:
            CheckpointError: the scheduler class, or one of its settings, has no sampler here.
        """
        owner = "scheduler/scheduler_config.json"
        name = data.get("_class_name")
        _require(name in _SCHEDULERS, owner, "_class_name", name, f"one of {', '.join(_SCHEDULERS)}")
        kind = _SCHEDULERS[str(name)]
        for key, default, supported in _SCHEDULER_KEYS[kind]:
            value = data.get(key, default)
            _require(value == supported, owner, key, value, repr(supported))
        numbers = {key: value for key, value in data.items() if key != "kind"}
        if kind == "flow-euler" and "shift" in data:
            numbers["flow_shift"] = data["shift"]
        config = dataclasses.replace(_from_dict(cls, numbers, owner), kind=kind)
        _positive(config, owner, "flow_shift", "num_train_timesteps", "sigma_data")
        return config
