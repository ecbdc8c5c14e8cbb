"""Trains the judge's network: `python benchmarks/train_art_detector.py --minutes 40`

Its scenes show all combinations, the held-out ones too: a judge that has never seen a white crab would call
it by another colour. They are drawn once and kept. Pictures are blurred, made noisy and shifted in colour at
random, because the judge has to look at pictures of an autoencoder trained for minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import needs

needs("torch", "accelerate", "safetensors", "tqdm")

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from judge.network import Detector, detector_loss, targets
from sana_edge.evaluate.judge.detector import SIDE, WEIGHTS
from sana_edge.system.atomic import new_file
from sana_edge.training.art.layout import draw_scene, extra_of
from sana_edge.training.art.scenes import Scene, render
from sana_edge.training.loop import Loop
from sana_edge.training.state import ema_state


def judged_scene(number: int) -> Scene:
    """Scene `number` of the judge's training, of all that can be drawn."""
    return draw_scene(random.Random(f"judge {number}"), extra_of(number))


def small(count: int, kept: Path) -> NDArray[np.uint8]:
    """The first scenes at SIDE, (count, SIDE, SIDE, 3) uint8; made once and kept."""
    before = np.load(kept) if kept.exists() else np.empty((0, SIDE, SIDE, 3), dtype=np.uint8)
    if len(before) < count:
        pixels = np.empty((count, SIDE, SIDE, 3), dtype=np.uint8)
        pixels[: len(before)] = before
        for i in tqdm(range(len(before), count), unit="scene"):
            pixels[i] = np.asarray(render(judged_scene(i)).resize((SIDE, SIDE), Image.Resampling.BOX))
        with new_file(kept) as partial, open(partial, "wb") as file:
            np.save(file, pixels)
        return pixels
    stored: NDArray[np.uint8] = before[:count]
    return stored


def spoilt(pixels: Tensor) -> Tensor:
    """A batch (B, 3, SIDE, SIDE) in [-1, 1]: two of three blurred, all noisy and a little off in colour."""
    if torch.rand(()) < 0.67:
        less = int(torch.randint(30, SIDE, ()))
        pixels = F.interpolate(pixels, size=(less, less), mode="area")
        pixels = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear")
    count = len(pixels)
    shift = 0.05 * torch.randn(count, 3, 1, 1)
    contrast = 1 + 0.1 * torch.randn(count, 1, 1, 1)
    noise = 0.06 * torch.rand(count, 1, 1, 1) * torch.randn_like(pixels)
    return (pixels * contrast + shift + noise).clamp(-1, 1)


def main() -> None:
    args = _options(sys.argv[1:])

    torch.manual_seed(0)
    model = Detector()
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, weight_decay=0.05)
    loop = Loop(model, [optimizer], args.folder, minutes=args.minutes, precision="no", ema_decay=0.995)
    torch.manual_seed(loop.step)
    pixels = small(args.count, args.folder / "scenes.npy")
    wanted = [targets(judged_scene(i)) for i in range(len(pixels))]

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        numbers = torch.randint(len(pixels), (args.batch,)).tolist()
        batch = torch.from_numpy(pixels[numbers]).permute(0, 3, 1, 2).float() / 127.5 - 1
        want = {name: torch.stack([wanted[i][name] for i in numbers]) for name in wanted[0]}
        value, right = detector_loss(model(spoilt(batch)), want)
        return value, {"kinds": right}

    loop.run(loss)
    state = {k: v.half() if v.is_floating_point() else v for k, v in ema_state(args.folder).items()}
    with new_file(args.output) as partial:
        save_file(state, partial)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train the detector that judges pictures of sana-tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/detector"))
    parser.add_argument("--count", type=int, default=20480, help="scenes")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    return parser.parse_args(given)


if __name__ == "__main__":
    main()
