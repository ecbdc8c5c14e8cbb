"""A small CLIP of the real class, trained from nothing on an imagefolder with true captions.

python benchmarks/small_clip.py runs/true --tokenizer sana_edge/models/sana-tiny/tokenizer --output runs/clip
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel

from sana_edge.training.art.train_clip import SIDE, clip_tokenizer, config, processor
from sana_edge.training.imagefolder import LeftOut, open_picture, read_entries
from sana_edge.training.loop import Loop, ema_state


def main() -> None:
    parser = argparse.ArgumentParser(description="train a small CLIP on an imagefolder")
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="that knows the words")
    parser.add_argument("--output", type=Path, required=True, help="gets the model, and the state in state/")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(args.tokenizer)
    model, rng = CLIPModel(config(len(tokenizer))), random.Random(0)
    inputs = processor(tokenizer)
    entries = read_entries(args.data, "train", LeftOut())
    pixels = [_pixels(inputs, entry.path) for entry in entries]
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.98), weight_decay=0.1)
    state = args.output / "state"
    loop = Loop(model, [optimizer], state, minutes=args.minutes, precision="no", ema_decay=0.99)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        chosen = rng.sample(range(len(entries)), args.batch)
        texts = [rng.choice(entries[i].captions) for i in chosen]
        coded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        output = model(
            input_ids=coded.input_ids,
            attention_mask=coded.attention_mask,
            pixel_values=torch.stack([pixels[i] for i in chosen]).float(),
        )
        own = torch.arange(args.batch)
        logits = output.logits_per_image
        value = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return value, {"right": float((logits.argmax(1) == own).float().mean())}

    loop.run(loss)
    model.load_state_dict(ema_state(state))
    model.save_pretrained(args.output)
    inputs.save_pretrained(args.output)


def _pixels(inputs: object, path: Path) -> Tensor:
    """A picture as the model sees it, (3, SIDE, SIDE) fp16."""
    picture = open_picture(path).convert("RGB").resize((SIDE, SIDE))
    found: Tensor = inputs.image_processor(picture, return_tensors="pt").pixel_values[0].half()  # type: ignore[attr-defined]
    return found


if __name__ == "__main__":
    main()
