"""Tiny pipelines with random weights, written by diffusers' own classes, imported when asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sana_edge.prompt import CHI

if TYPE_CHECKING:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Model, PreTrainedTokenizerFast

WIDTH = 64
CAPTION_WIDTH = 32
CAPTIONS = ("a red house left of a yellow star", "two blue fish above a green tree", "a cat on a mat")


def write_pipeline(folder: Path) -> Path:
    """A SanaPipeline, native size 128 px, fp32 weights."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    with _seeded(1):
        pipeline = SanaPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            vae=tiny_autoencoder(),
            transformer=tiny_denoiser(),
            scheduler=DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
            ),
        )
    pipeline.save_pretrained(folder)
    return folder


def write_sprint_pipeline(folder: Path) -> Path:
    """A SanaSprintPipeline (qk-norm, guidance embedding, SCM), otherwise as `write_pipeline`."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    with _seeded(2):
        pipeline = SanaSprintPipeline(
            tokenizer=tiny_tokenizer(),
            text_encoder=tiny_text_encoder(),
            vae=tiny_autoencoder(),
            transformer=tiny_denoiser(qk_norm="rms_norm_across_heads", guidance_embeds=True),
            scheduler=SCMScheduler(),
        )
    pipeline.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with Gemma's special ids; like the public one it is stored with left padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["\n".join(CHI), *CAPTIONS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )


def tiny_text_encoder() -> Gemma2Model:
    """Sliding window shorter than the instruction, and weights large enough for attention to matter."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=640,
        hidden_size=CAPTION_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=48,
        initializer_range=0.3,
    )
    return Gemma2Model(config)


def tiny_autoencoder() -> AutoencoderDC:
    from diffusers import AutoencoderDC

    types = ("ResBlock",) * 5 + ("EfficientViTBlock",)
    channels = (8, 8, 16, 16, 32, 32)
    layers = (0, 1, 1, 1, 1, 1)
    scales: tuple[tuple[int, ...], ...] = ((),) * 5 + ((5,),)
    return AutoencoderDC(
        attention_head_dim=16,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    )


def tiny_denoiser(qk_norm: str | None = None, guidance_embeds: bool = False) -> SanaTransformer2DModel:
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=CAPTION_WIDTH,
        sample_size=4,
        interpolation_scale=None,
        qk_norm=qk_norm,
        guidance_embeds=guidance_embeds,
    )


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
