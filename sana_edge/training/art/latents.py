"""What the denoiser trains on: `python -m sana_edge.training.art.latents --vae runs/vae --text runs/model`

Latents of the stored pictures, and features of several captions of each, both computed once.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sana_edge.nets.autoencoder import Autoencoder
from sana_edge.nets.text_encoder import TextEncoder, TextFeatures
from sana_edge.system.atomic import new_file

from ..train_autoencoder import CONFIG, starting_state
from .captions import caption
from .layout import numbered_scene
from .pictures import SHARD, Pictures
from .train_autoencoder import as_pixels

CAPTIONS = 6
"""Captions of each picture."""
ROWS = 64


@dataclass(frozen=True)
class Captions:
    """Features of CAPTIONS captions of each of N pictures, one after the other.

    features: (tokens, C) fp16. starts: (N * CAPTIONS + 1,) where each caption begins.
    """

    features: Tensor
    starts: Tensor

    def batch(self, rows: list[int], dropped: list[bool]) -> TextFeatures:
        """Features of captions by their row; of a dropped one the first token alone."""
        parts = [self.features[self.starts[row] : self.starts[row + 1]] for row in rows]
        parts = [part[:1] if drop else part for part, drop in zip(parts, dropped, strict=True)]
        lengths = torch.tensor([len(part) for part in parts])
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).float()
        return TextFeatures(padded, torch.arange(padded.shape[1]) < lengths[:, None])


def texts_of(number: int) -> list[str]:
    """The CAPTIONS captions of picture `number`, the same every time."""
    rng = random.Random(f"captions of {number}")
    scene = numbered_scene(number)
    return [caption(scene, rng) for _ in range(CAPTIONS)]


def load(folder: Path) -> tuple[Tensor, Captions]:
    """Latents (N, 32, h, w) fp16, unscaled, and captions of all shards so far."""
    shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    starts, total = [torch.zeros(1, dtype=torch.long)], 0
    for shard in shards:
        starts.append(shard["lengths"].long().cumsum(0) + total)
        total = int(starts[-1][-1])
    captions = Captions(torch.cat([s["features"] for s in shards]), torch.cat(starts))
    return torch.cat([s["latents"] for s in shards]), captions


def scale_of(latents: Tensor) -> float:
    """The scaling factor that gives latents a standard deviation of one."""
    return 1 / float(latents.float().std())


@torch.inference_mode()
def encode_pictures(model: Autoencoder, pictures: Pictures, numbers: range) -> Tensor:
    """(len(numbers), 32, h, w) fp16."""
    parts = []
    for start in range(numbers.start, numbers.stop, 16):
        batch = [torch.from_numpy(pictures[i].copy()) for i in range(start, min(start + 16, numbers.stop))]
        parts.append(model.encode(as_pixels(torch.stack(batch).numpy())).half().contiguous())
    return torch.cat(parts)


def encode_captions(encoder: TextEncoder, numbers: range) -> tuple[Tensor, Tensor]:
    """Features (tokens, C) fp16 of all captions of the pictures, and each caption's length."""
    texts = [text for number in numbers for text in texts_of(number)]
    features, lengths = [], []
    for start in range(0, len(texts), ROWS):
        found = encoder.encode(texts[start : start + ROWS])
        features.append(found.embeddings[found.mask].half())
        lengths.append(found.mask.sum(1))
    return torch.cat(features), torch.cat(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(description="encode pictures and captions; goes on where it stopped")
    parser.add_argument("--vae", type=Path, default=Path("runs/vae"), help="training folder, or a vae/")
    parser.add_argument("--text", type=Path, default=Path("runs/model"), help="folder with text_encoder/")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--folder", type=Path, default=Path("runs/latents"))
    args = parser.parse_args()

    model = Autoencoder(CONFIG).eval()
    model.load_state_dict(starting_state(args.vae))
    encoder = TextEncoder.load(args.text, dtype=torch.float32, device="cpu")
    pictures = Pictures(args.pictures)
    for first in tqdm(range(0, len(pictures), SHARD), unit="shard"):
        path = args.folder / f"shard-{first:07d}.safetensors"
        if path.exists():
            continue
        numbers = range(first, min(first + SHARD, len(pictures)))
        features, lengths = encode_captions(encoder, numbers)
        latents = encode_pictures(model, pictures, numbers)
        with new_file(path) as partial:
            save_file({"latents": latents, "features": features, "lengths": lengths}, partial)


if __name__ == "__main__":
    main()
