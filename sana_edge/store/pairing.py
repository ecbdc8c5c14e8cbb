"""Whether the parts of a model folder belong together: widths, latents, and the sampler of its denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sana_edge.config import LATENT_CELL, AutoencoderConfig, DenoiserConfig, SamplerConfig
from sana_edge.errors import CheckpointError
from sana_edge.store.folder import read_json
from sana_edge.store.tiny_autoencoder import (
    CLASSES,
    HINT,
    DecoderConfig,
    TinyAutoencoderConfig,
    decoder_config,
)
from sana_edge.system.json_values import shown

_HINT = "take both from one model, or choose another --base where it was converted"


def check_parts(denoiser: DenoiserConfig, autoencoder: DecoderConfig, text: Mapping[str, Any]) -> None:
    """See that a denoiser reads what its text encoder writes, and draws the latents that are decoded.

    Args:
        text: ``text_encoder/config.json``.

    Raises:
        CheckpointError: they are of different models; says which number differs.
    """
    width, caption = text.get("hidden_size"), denoiser.caption_channels
    if isinstance(width, int) and width != caption:
        raise CheckpointError(
            f"the denoiser reads texts of {caption} channels, the text encoder writes {width}: they are of"
            " different models",
            _HINT,
        )
    channels, latents = autoencoder.latent_channels, denoiser.in_channels
    if channels != latents:
        raise CheckpointError(
            f"the denoiser draws latents of {latents} channels, the autoencoder decodes {channels}: they are"
            " of different models",
            _HINT,
        )
    cell = autoencoder.spatial_compression
    if cell != LATENT_CELL:
        raise CheckpointError(
            f"the autoencoder's cells are {cell} pixels wide, SANA's are {LATENT_CELL}", _HINT
        )
    if denoiser.out_channels != latents:
        raise CheckpointError(
            f"the denoiser reads {latents} channels and predicts {denoiser.out_channels}: it is no SANA"
        )


def check_model(folder: Path) -> None:
    """`check_parts` of a model folder.

    Raises:
        CheckpointError: as `check_parts`, or a config.json is damaged.
    """
    check_parts(
        DenoiserConfig.from_dict(read_json(folder / "transformer" / "config.json")),
        decoder_config(read_json(folder / "vae" / "config.json")),
        read_json(folder / "text_encoder" / "config.json"),
    )


def check_decoder(folder: Path, decoder: Path) -> None:
    """See that another autoencoder decodes the latents of a model folder; a file's is seen when it is read.

    Raises:
        CheckpointError: it does not; says which number differs.
    """
    if decoder.is_dir():
        described = read_json(decoder / "config.json")
        if (kind := described.get("_class_name", CLASSES[0])) not in CLASSES:
            raise CheckpointError(
                f"the decoder {decoder} is a {kind if isinstance(kind, str) else shown(kind)}", HINT
            )
        in_place_of(decoder_config(described), folder, decoder)


def in_place_of(config: DecoderConfig, folder: Path, decoder: Path) -> DecoderConfig:
    """What another decoder's config is beside a model: the scale of its latents is the model's.

    A tiny one takes latents as samplers leave them.

    Raises:
        CheckpointError: it decodes other latents than the model's.
    """
    own = decoder_config(read_json(folder / "vae" / "config.json"))
    for name, what in (
        ("latent_channels", "channels"),
        ("spatial_compression", "pixels for a cell"),
    ):
        found, wanted = getattr(config, name), getattr(own, name)
        if found != wanted:
            raise CheckpointError(
                f"the decoder {decoder} has {found} {what}, the model's latents are of {wanted}",
                "give a decoder of the same latents",
            )
    if isinstance(config, TinyAutoencoderConfig):
        return config
    # that of the public models, where a tiny one has taken the place of theirs
    scale = own.scaling_factor if isinstance(own, AutoencoderConfig) else config.scaling_factor
    return dataclasses.replace(config, scaling_factor=scale)


def scheduler_of(denoiser: DenoiserConfig) -> dict[str, Any]:
    """The ``scheduler_config.json`` that suits a denoiser: SCM for Sprint, Flow-DPM-Solver++ for others.

    The shift is what diffusers' converter of NVlabs' checkpoints writes.
    """
    if denoiser.guidance_embeds:
        return {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 6.0 if denoiser.native_size == 4096 else 3.0,
    }


def read_sampler(folder: Path, denoiser: DenoiserConfig) -> tuple[SamplerConfig, tuple[str, ...]]:
    """The sampler of a model folder, or the right one where the folder's is of another kind of model.

    A Sprint denoiser is known by its guidance embedding; it predicts what only SCM's steps can use, and a
    denoiser without one predicts what they cannot.

    Returns:
        The sampler, and a note where it is not the folder's.

    Raises:
        CheckpointError: ``scheduler_config.json`` is damaged, or has no sampler here.
    """
    described = read_json(folder / "scheduler" / "scheduler_config.json")
    found = SamplerConfig.from_dict(described)
    if (found.kind == "scm") == denoiser.guidance_embeds:
        return found, ()
    right = scheduler_of(denoiser)
    kind = "a Sprint denoiser" if denoiser.guidance_embeds else "no Sprint denoiser"
    note = f"the folder's {described['_class_name']} does not suit its transformer/, {kind}:"
    return SamplerConfig.from_dict(right), (f"{note} {right['_class_name']} is used in its place",)
