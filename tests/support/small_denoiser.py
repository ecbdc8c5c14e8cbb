"""A small INT8 denoiser with random weights, whose heads fit every backend's kernels."""

from __future__ import annotations

from sana_edge.config import DenoiserConfig
from sana_edge.nets.denoiser import Denoiser
from sana_edge.nets.quantize import quantize_denoiser

CONFIG = DenoiserConfig(
    in_channels=8,
    out_channels=8,
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=32,
    num_cross_attention_heads=2,
    cross_attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=40,
    sample_size=8,
)


def random_denoiser() -> Denoiser:
    """Its layers are INT8; gates are large enough for each to matter."""
    denoiser = Denoiser(CONFIG).requires_grad_(False).eval()
    for name, parameter in denoiser.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        parameter.normal_(std=0.5 if "table" in name else fan_in**-0.5)
    quantize_denoiser(denoiser)
    return denoiser
