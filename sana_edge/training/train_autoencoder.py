"""Step 1: the autoencoder. `python -m sana_edge.training.train_autoencoder --folder runs/vae --minutes 21`

Crops of scenes first, whole scenes for the last third. The decoder sees latents with noise of random
strength on them, and the latents are kept short: so the latent space is smooth, and easy for the denoiser
to model. With `--decoder-of runs/vae` the decoder alone goes on: latents, and so a denoiser trained on
them, stay as they are.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from sana_edge.config import AutoencoderConfig
from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.store.weights import load_state

from .layout import draw_scene
from .loop import Loop
from .scenes import render
from .state import ema_state

CONFIG = AutoencoderConfig.from_dict(
    {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_types": ["ResBlock"] * 5 + ["EfficientViTBlock"],
        "decoder_block_types": ["ResBlock"] * 5 + ["EfficientViTBlock"],
        "encoder_block_out_channels": [16, 16, 32, 64, 128, 256],
        "decoder_block_out_channels": [16, 32, 64, 128, 128, 256],
        "encoder_layers_per_block": [0, 1, 1, 1, 1, 1],
        "decoder_layers_per_block": [0, 1, 1, 1, 1, 1],
        "encoder_qkv_multiscales": [[], [], [], [], [], []],
        "decoder_qkv_multiscales": [[], [], [], [], [], []],
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu",
        "scaling_factor": 1.0,
    }
)


class Crops(IterableDataset[Tensor]):
    """Endless crops of rendered scenes, (3, crop, crop) uint8; two of each scene."""

    def __init__(self, side: int, crop: int, seed: int) -> None:
        self.side, self.crop, self.seed = side, crop, seed

    def __iter__(self) -> Iterator[Tensor]:
        rng = random.Random(f"crops {self.seed}")
        while True:
            pixels = np.asarray(render(draw_scene(rng), self.side))
            for _ in range(1 if self.crop == self.side else 2):
                y, x = (rng.randint(0, self.side - self.crop) for _ in range(2))
                part = pixels[y : y + self.crop, x : x + self.crop]
                yield torch.from_numpy(part.transpose(2, 0, 1).copy())


def batches(side: int, crop: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches (size, 3, crop, crop) in [-1, 1]."""
    for batch in DataLoader(Crops(side, crop, seed), batch_size=size, num_workers=1, prefetch_factor=4):
        yield (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 L2 + half the L1 of the gradients, which keeps edges sharp."""
    error = output.float() - target
    gradient = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * gradient


def starting_state(folder: Path) -> dict[str, Tensor]:
    """The weights of a training folder, or of a component folder in diffusers layout, in fp32."""
    if (folder / "config.json").exists():
        return {name: tensor.float() for name, tensor in load_state(folder).items()}
    return ema_state(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="train the autoencoder of a small model of the shapes")
    parser.add_argument("--folder", type=Path, default=Path("runs/vae"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument(
        "--noise", type=float, default=0.35, help="largest deviation of the noise on the latents"
    )
    parser.add_argument(
        "--decoder-of", type=Path, help="training folder, or a model's vae/, whose decoder to train further"
    )
    parser.add_argument(
        "--whole-from", type=float, default=0.7, help="share of the time after which crops end"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    model = Autoencoder(CONFIG)
    if args.decoder_of:
        model.load_state_dict(starting_state(args.decoder_of))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("decoder."))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    loop = Loop(model, [optimizer], args.folder, minutes=args.minutes, warmup=200, decay_from=0.2)
    torch.manual_seed(loop.step)
    crops = batches(args.side, args.crop, args.batch, loop.step)
    whole: Iterator[Tensor] | None = None

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        nonlocal whole
        if progress >= args.whole_from and whole is None:
            whole = batches(args.side, args.side, max(1, args.batch // 4), loop.step)
        pixels = next(whole or crops).to(loop.accelerator.device)
        latent = model.encode(pixels).float()
        level = args.noise * torch.rand(latent.shape[0], 1, 1, 1, device=latent.device)
        output = model.decode(latent + level * torch.randn_like(latent))
        total = (
            reconstruction_loss(output, pixels) + 0.02 * F.relu(latent.square().mean((0, 2, 3)) - 1).mean()
        )
        figures = {}
        if step % 50 == 49:
            error = (output.detach().float().clamp(-1, 1) - pixels).square().mean((1, 2, 3)) / 4
            figures = {"psnr": float(-10 * error.log10().mean()), "std": float(latent.detach().std())}
        return total, figures

    loop.run(loss)


if __name__ == "__main__":
    main()
