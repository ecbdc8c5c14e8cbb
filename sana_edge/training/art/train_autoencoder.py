"""The autoencoder: `python -m sana_edge.training.art.train_autoencoder --start MODEL/vae --minutes 90`

As `training.train_autoencoder`, on stored pictures: crops first, whole pictures for the last share of the
time. `--decoder-of FOLDER` trains the decoder alone, so that latents, and a denoiser of them, stay the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sana_edge.nets.autoencoder import Autoencoder

from ..loop import Loop
from ..train_autoencoder import CONFIG, reconstruction_loss, starting_state
from .pictures import Pictures

TRIES = 3


def as_pixels(batch: NDArray[np.uint8]) -> Tensor:
    """(B, H, W, 3) uint8 as (B, 3, H, W) float in [-1, 1], channels last in memory."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(pictures: Pictures, crop: int, size: int, generator: np.random.Generator) -> Tensor:
    """A batch (size, 3, crop, crop) in [-1, 1], each from another picture: the liveliest of TRIES crops."""
    parts = []
    for number in generator.integers(len(pictures), size=size):
        whole = pictures[int(number)]
        corners = generator.integers(whole.shape[0] - crop + 1, size=(TRIES, 2))
        tried = [whole[y : y + crop, x : x + crop] for y, x in corners]
        parts.append(max(tried, key=liveliness))
    return as_pixels(np.stack(parts))


def liveliness(pixels: NDArray[np.uint8]) -> float:
    """The mean difference of pixels four apart: backgrounds have little of it."""
    coarse = pixels[::4, ::4].astype(np.int16)
    return float(np.abs(np.diff(coarse, axis=0)).mean() + np.abs(np.diff(coarse, axis=1)).mean())


@torch.inference_mode()
def held_out_psnr(model: Autoencoder, folder: Path, count: int) -> float:
    """The mean PSNR in dB of the first `count` held-out pictures; 8 bit values, peak 255."""
    pictures = np.load(folder / "held-out.npy", mmap_mode="r")[:count]
    values = []
    for start in range(0, count, 8):
        pixels = as_pixels(pictures[start : start + 8].copy())
        output = ((model.decode(model.encode(pixels)).clamp(-1, 1) + 1) * 127.5).round()
        error = (output - (pixels + 1) * 127.5).square().mean((1, 2, 3)).clamp_min(1e-9)
        values.append(10 * (255**2 / error).log10())
    return float(torch.cat(values).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="train the autoencoder of sana-tiny on stored pictures")
    parser.add_argument("--folder", type=Path, default=Path("runs/vae"))
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--start", type=Path, help="training folder, or a model's vae/, to begin with")
    parser.add_argument("--decoder-of", type=Path, help="the same, to train its decoder alone")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--noise", type=float, default=0.25, help="largest deviation of the latents' noise")
    parser.add_argument("--whole-from", type=float, default=0.7)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Autoencoder(CONFIG)
    if args.decoder_of or args.start:
        model.load_state_dict(starting_state(args.decoder_of or args.start))
    if args.decoder_of:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder."))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    loop = Loop(
        model, [optimizer], args.folder, minutes=args.minutes, precision="no", warmup=100, decay_from=0.3
    )
    torch.manual_seed(loop.step)
    generator = np.random.default_rng(loop.step)
    pictures = Pictures(args.pictures)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        side = pictures[0].shape[0]
        whole = progress >= args.whole_from
        crop, size = (
            (side, max(1, args.batch * args.crop**2 // side**2)) if whole else (args.crop, args.batch)
        )
        pixels = crops(pictures, crop, size, generator)
        with torch.set_grad_enabled(not args.decoder_of):
            latent = model.encode(pixels)
        level = args.noise * torch.rand(latent.shape[0], 1, 1, 1)
        output = model.decode(latent + level * torch.randn_like(latent))
        total = reconstruction_loss(output, pixels)
        total = total + 0.02 * F.relu(latent.square().mean((0, 2, 3)) - 1).mean()
        figures = {}
        if step % 50 == 49:
            error = (output.detach().clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
            figures = {"psnr": float(-10 * error.log10().mean()), "std": float(latent.detach().std())}
        return total, figures

    loop.run(loss)
    model.load_state_dict(loop.ema)
    print(f"held-out PSNR {held_out_psnr(model.eval(), args.pictures, 128):.2f} dB")


if __name__ == "__main__":
    main()
