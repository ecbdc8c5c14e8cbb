"""The model folder, in diffusers layout with fp16 weights: `python -m sana_edge.training.art.assemble`"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch

from sana_edge.nets.denoiser import Denoiser

from ..assemble import write_component, write_domain
from ..model_output import write_index
from ..state import ema_state
from ..train_autoencoder import CONFIG as AUTOENCODER
from ..train_denoiser import CONFIG as DENOISER
from ..train_denoiser import FLOW_SHIFT
from .captions import texts
from .latents import load, scale_of
from .train_text_encoder import Reader


def write_text(runs: Path, output: Path) -> None:
    """The language model without its heads, the tokenizer, and the words that captions have."""
    model = Reader()
    model.load_state_dict(ema_state(runs / "text"))
    model.language.model.half().save_pretrained(output / "text_encoder")
    shutil.copytree(runs / "text" / "tokenizer", output / "tokenizer", dirs_exist_ok=True)
    write_domain(output, texts(40000))


def main() -> None:
    parser = argparse.ArgumentParser(description="make a model folder from the training folders")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--output", type=Path, default=Path("runs/model"))
    parser.add_argument("--text-only", action="store_true", help="what `latents` needs")
    args = parser.parse_args()

    write_text(args.runs, args.output)
    if args.text_only:
        return
    scale = scale_of(load(args.runs / "latents")[0])
    autoencoder = dataclasses.replace(AUTOENCODER, scaling_factor=round(scale, 5))
    trained = (args.runs / "vae-decoder", args.runs / "vae")
    chosen = next(folder for folder in trained if (folder / "state.safetensors").exists())
    write_component(args.output / "vae", autoencoder, ema_state(chosen))
    with torch.device("meta"):
        denoiser = Denoiser(DENOISER)
    denoiser.load_state_dict(ema_state(args.runs / "dit"), assign=True)
    write_component(args.output / "transformer", DENOISER, denoiser.to_diffusers())
    write_index(args.output, FLOW_SHIFT)


if __name__ == "__main__":
    main()
