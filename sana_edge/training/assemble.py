"""Step 4: the model folder, in diffusers layout with fp16 weights. `python -m sana_edge.training.assemble`"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM

from sana_edge.config import AutoencoderConfig, DenoiserConfig
from sana_edge.nets.denoiser import Denoiser
from sana_edge.store import domain, weights
from sana_edge.system.atomic import write_json

from . import train_autoencoder, train_denoiser, train_text_encoder
from .latents import load_latents
from .model_output import write_index
from .state import ema_state
from .train_text_encoder import captions

SIDE = 256
"""Pixels a side of all pictures in training."""


def write_component(
    folder: Path, config: AutoencoderConfig | DenoiserConfig, state: dict[str, Tensor]
) -> None:
    """`config.json` and fp16 weights of a diffusers model."""
    write_json(folder / "config.json", config.to_dict())
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    weights.save_state(half, folder / "diffusion_pytorch_model.safetensors")


def write_domain(model: Path, texts: Iterable[str]) -> None:
    """`sana_edge.store.domain`: the words of the captions of a training at SIDE x SIDE."""
    words = sorted({word for text in texts for word in domain.words_of(text)})
    write_json(model / domain.FILE, {"words": words, "sizes": [[SIDE, SIDE]]})


def write_text_encoder(runs: Path, output: Path) -> None:
    """The language model without its head, and the tokenizer."""
    model = Gemma2ForCausalLM(train_text_encoder.CONFIG)
    model.load_state_dict(ema_state(runs / "text"))
    model.model.half().save_pretrained(output / "text_encoder")
    shutil.copytree(runs / "text" / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    write_domain(output, islice(captions(0), 40000))


def main() -> None:
    parser = argparse.ArgumentParser(description="make a model folder from the training folders")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("runs/model"))
    parser.add_argument("--base", type=Path, help="model folder with the parts that were not trained here")
    parser.add_argument("--text-only", action="store_true", help="what the denoiser's training needs")
    args = parser.parse_args()

    if args.base and not (args.runs / "text").exists():
        for part in ("text_encoder", "tokenizer"):
            shutil.copytree(args.base / part, args.output / part, dirs_exist_ok=True)
    else:
        write_text_encoder(args.runs, args.output)
    if args.text_only:
        return
    scale = 1 / float(load_latents(args.runs / "latents").float().std())
    autoencoder = dataclasses.replace(train_autoencoder.CONFIG, scaling_factor=round(scale, 5))
    trained = [args.runs / "vae-decoder", args.runs / "vae", *([args.base / "vae"] if args.base else [])]
    chosen = next((folder for folder in trained if folder.exists()), args.runs / "vae")
    write_component(args.output / "vae", autoencoder, train_autoencoder.starting_state(chosen))
    with torch.device("meta"):
        denoiser = Denoiser(train_denoiser.CONFIG)
    denoiser.load_state_dict(ema_state(args.runs / "dit"), assign=True)
    write_component(args.output / "transformer", train_denoiser.CONFIG, denoiser.to_diffusers())
    write_index(args.output, train_denoiser.FLOW_SHIFT)


if __name__ == "__main__":
    main()
