"""Configs as diffusers writes them, defaults included, and values that no SANA model has."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaTransformer2DModel,
    SCMScheduler,
)

from sana_edge.config import AutoencoderConfig, DenoiserConfig, SamplerConfig
from sana_edge.errors import CheckpointError

AUTOENCODER = {
    "encoder_block_types": "ResBlock",
    "decoder_block_types": ["ResBlock", "EfficientViTBlock"],
    "encoder_block_out_channels": [8, 16],
    "decoder_block_out_channels": [8, 16],
    "encoder_layers_per_block": [1, 2],
    "decoder_layers_per_block": [2, 1],
    "encoder_qkv_multiscales": [[], []],
    "decoder_qkv_multiscales": [[], [5]],
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": ["silu", "relu"],
}


def defaults(cls: type) -> dict[str, Any]:
    parameters = inspect.signature(cls.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def test_denoiser_defaults_are_those_of_diffusers() -> None:
    assert DenoiserConfig.from_dict({}) == DenoiserConfig.from_dict(defaults(SanaTransformer2DModel))
    ignored = {"dropout", "norm_elementwise_affine"}
    assert (
        set(DenoiserConfig().to_dict()) - {"_class_name"} == set(defaults(SanaTransformer2DModel)) - ignored
    )


def test_autoencoder_defaults_are_those_of_diffusers() -> None:
    assert AutoencoderConfig.from_dict({}) == AutoencoderConfig.from_dict(defaults(AutoencoderDC))
    assert set(AutoencoderConfig().to_dict()) - {"_class_name"} == set(defaults(AutoencoderDC))


@pytest.mark.parametrize(
    ("settings", "dim", "ffn_dim", "native_size"),
    [
        ({"num_attention_heads": 36, "num_layers": 28, "cross_attention_dim": 1152}, 1152, 2880, 1024),
        ({"sample_size": 128, "interpolation_scale": 2}, 2240, 5600, 4096),
    ],
    ids=["0.6b", "1.6b-4k"],
)
def test_denoiser_sizes(settings: dict[str, Any], dim: int, ffn_dim: int, native_size: int) -> None:
    config = DenoiserConfig.from_dict({"_class_name": "SanaTransformer2DModel", **settings})
    assert (config.dim, config.ffn_dim, config.native_size) == (dim, ffn_dim, native_size)
    assert DenoiserConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_out_channels_default_to_in_channels() -> None:
    assert DenoiserConfig.from_dict({"in_channels": 16, "out_channels": None}).out_channels == 16


def test_autoencoder_repeats_single_names() -> None:
    config = AutoencoderConfig.from_dict(AUTOENCODER)
    assert config.encoder_block_types == ("ResBlock", "ResBlock")
    assert config.decoder_norm_types == ("rms_norm", "rms_norm")
    assert config.decoder_act_fns == ("silu", "relu")
    assert config.decoder_qkv_multiscales == ((), (5,))
    assert config.spatial_compression == 2
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert AutoencoderConfig().spatial_compression == 32


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", "28"),
        ("num_layers", True),
        ("num_layers", 0),
        ("num_layers", 2.5),
        ("num_layers", 257),
        ("norm_eps", float("nan")),
        ("mlp_ratio", None),
        ("guidance_embeds", 1),
        ("cross_attention_dim", 1152),
        ("num_cross_attention_heads", None),
        ("qk_norm", "layer_norm"),
        ("patch_size", 2),
        ("norm_elementwise_affine", True),
        ("interpolation_scale", 0.0),
    ],
)
def test_wrong_denoiser_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"transformer/config\.json: {key} is {value!r}, expected "):
        DenoiserConfig.from_dict({key: value})


def test_a_feed_forward_of_no_channels() -> None:
    narrow = {"num_attention_heads": 1, "attention_head_dim": 32, "cross_attention_dim": 32}
    with pytest.raises(CheckpointError, match=r"mlp_ratio is 0\.01, expected a number from 0\.031"):
        DenoiserConfig.from_dict({**narrow, "mlp_ratio": 0.01})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_block_types", ["ResBlock"]),
        ("decoder_block_types", ["ResBlock", "Transformer"]),
        ("encoder_block_out_channels", []),
        ("decoder_block_out_channels", [8, -1]),
        ("decoder_layers_per_block", [1]),
        ("decoder_layers_per_block", 3),
        ("encoder_qkv_multiscales", [[5], "5"]),
        ("decoder_norm_types", "batch_norm"),
        ("decoder_act_fns", ["silu"]),
        ("decoder_conv_act_fn", "gelu"),
        ("scaling_factor", 0),
    ],
)
def test_wrong_autoencoder_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"vae/config\.json: {key} is "):
        AutoencoderConfig.from_dict({**AUTOENCODER, key: value})


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (
            DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
            SamplerConfig("flow-dpm", flow_shift=3.0),
        ),
        (FlowMatchEulerDiscreteScheduler(shift=4.0), SamplerConfig("flow-euler", flow_shift=4.0)),
        (SCMScheduler(sigma_data=0.25), SamplerConfig("scm", sigma_data=0.25)),
    ],
    ids=["flow-dpm", "flow-euler", "scm"],
)
def test_schedulers(tmp_path: Path, scheduler: Any, expected: SamplerConfig) -> None:
    scheduler.save_pretrained(tmp_path)
    assert SamplerConfig.from_dict(json.loads((tmp_path / "scheduler_config.json").read_text())) == expected


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("DDIMScheduler", "_class_name", "DDIMScheduler"),
        ("DPMSolverMultistepScheduler", "prediction_type", "epsilon"),
        ("DPMSolverMultistepScheduler", "solver_order", 3),
        ("DPMSolverMultistepScheduler", "flow_shift", 0.0),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True),
        ("SCMScheduler", "prediction_type", "epsilon"),
    ],
)
def test_schedulers_that_are_not_implemented(name: str, key: str, value: Any) -> None:
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if name.startswith("DPM") else {}
    with pytest.raises(CheckpointError, match=rf"scheduler_config\.json: {key} is {value!r}, expected "):
        SamplerConfig.from_dict({"_class_name": name, **flow, key: value})
