"""Step 2: latents of many training scenes. `python -m sana_edge.training.latents --vae runs/vae`

Scene number i is the same everywhere, so only its latent is stored; captions are made anew at every use.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.system.atomic import new_file

from .layout import training_scene
from .scenes import Scene, render
from .train_autoencoder import CONFIG, starting_state


def numbered_scene(number: int) -> Scene:
    """Training scene `number`, without held-out combinations."""
    return training_scene(random.Random(f"scene {number}"))


def load_latents(folder: Path) -> Tensor:
    """All latents stored so far, (N, 32, h, w) fp16 and unscaled, in the order of scene numbers."""
    return torch.cat([load_file(f)["latents"] for f in sorted(folder.glob("latents-*.safetensors"))])


def main() -> None:
    parser = argparse.ArgumentParser(description="encode training scenes; goes on where it stopped")
    parser.add_argument(
        "--vae", type=Path, default=Path("runs/vae"), help="training folder, or a model's vae/"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/latents"))
    parser.add_argument("--count", type=int, default=24576)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--shard", type=int, default=2048)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Autoencoder(CONFIG).eval().to(device)
    model.load_state_dict(starting_state(args.vae))
    args.folder.mkdir(parents=True, exist_ok=True)
    for first in tqdm(range(0, args.count, args.shard), unit="shard"):
        path = args.folder / f"latents-{first:07d}.safetensors"
        if path.exists():
            continue
        parts = []
        for start in range(first, first + args.shard, 32):
            pixels = np.stack([np.asarray(render(numbered_scene(start + i), args.side)) for i in range(32)])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                parts.append(model.encode(batch).half().cpu().contiguous())
        with new_file(path) as partial:
            save_file({"latents": torch.cat(parts)}, partial)


if __name__ == "__main__":
    main()
