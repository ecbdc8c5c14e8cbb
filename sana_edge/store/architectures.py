"""The published networks in numbers: what the configs of the public models say, for whom none is at hand.

Denoisers: SANA (arXiv 2410.10629, table 6) and SANA-1.5 (arXiv 2501.18427). Text encoder: Gemma-2-2B.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.store.tiny_autoencoder import TinyAutoencoderConfig

_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

# by what their models' names have in them
DENOISERS = {
    "0.6b": DenoiserConfig(
        num_layers=28,
        num_attention_heads=36,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=1152,
    ),
    "1.6b": DenoiserConfig(),
    "4.8b": DenoiserConfig(num_layers=60),
}
# the autoencoder of all of them, and other decoders of its latents
DC_AE = AutoencoderConfig(
    encoder_block_types=_BLOCKS,
    decoder_block_types=_BLOCKS,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
# "dc-ae-lite-f32c32-sana-1.1" in NVlabs' dc_ae.py
DC_AE_LITE = replace(
    DC_AE,
    decoder_block_types=("ResBlock",) * 6,
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    decoder_conv_act_fn="silu",
    upsample_block_type="pixel_shuffle",
)
TAESANA = TinyAutoencoderConfig(
    latent_channels=32,
    decoder_block_out_channels=(256, 128, 64, 64, 64, 64),
    num_decoder_blocks=(3, 3, 3, 3, 3, 1),
)
GEMMA_2_2B: dict[str, Any] = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
