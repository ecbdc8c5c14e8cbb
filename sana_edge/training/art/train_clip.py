"""A small CLIP (Radford et al. 2021): `python -m sana_edge.training.art.train_clip --minutes 40`

The real `CLIPModel` of transformers, trained from nothing on stored pictures and their captions, so that
whatever scores captions with a CLIP can run here. Its tokenizer is the text encoder's, its folder what
`CLIPModel.from_pretrained` and `CLIPProcessor.from_pretrained` read.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from ..loop import Loop
from ..state import ema_state
from .captions import caption
from .layout import numbered_scene
from .pictures import Pictures

SIDE = 96
TOKENS = 48
MEAN = STD = (0.5, 0.5, 0.5)


def config(vocabulary: int) -> CLIPConfig:
    """A vision transformer of 12-pixel patches and a text transformer, 3 layers of 128 each."""
    layers = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**layers, "vocab_size": vocabulary, "max_position_embeddings": TOKENS}
    ends = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    vision = {**layers, "image_size": SIDE, "patch_size": 12}
    return CLIPConfig(text_config={**text, **ends}, vision_config=vision, projection_dim=128)


def clip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The text encoder's tokenizer, with an end of text behind each text, which is what CLIP reads."""
    from tokenizers import processors

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    tokenizer.model_max_length = TOKENS
    return tokenizer


def processor(tokenizer: PreTrainedTokenizerFast) -> CLIPProcessor:
    """What makes the model's input of pictures and texts."""
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    return CLIPProcessor(CLIPImageProcessor(**sizes, image_mean=MEAN, image_std=STD), tokenizer)


def small(pictures: Pictures, number: int) -> NDArray[np.uint8]:
    """Picture `number` at the side that the model sees, (SIDE, SIDE, 3) uint8."""
    return np.asarray(Image.fromarray(pictures[number]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def main() -> None:
    parser = argparse.ArgumentParser(description="train a small CLIP on stored pictures")
    parser.add_argument("--folder", type=Path, default=Path("runs/clip"))
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/text/tokenizer"))
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/clip-model"))
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(args.tokenizer)
    model = CLIPModel(config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.98), weight_decay=0.1)
    loop = Loop(model, [optimizer], args.folder, minutes=args.minutes, precision="no", ema_decay=0.998)
    torch.manual_seed(loop.step)
    rng = random.Random(f"clip {loop.step}")
    pictures = Pictures(args.pictures)

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        numbers = rng.sample(range(len(pictures)), args.batch)
        batch = torch.from_numpy(np.stack([small(pictures, i) for i in numbers])).permute(0, 3, 1, 2)
        texts = [caption(numbered_scene(i), rng) for i in numbers]
        coded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True)
        output = model(
            input_ids=coded.input_ids,
            attention_mask=coded.attention_mask,
            pixel_values=batch.float() / 127.5 - 1,
        )
        own = torch.arange(args.batch)
        value = (
            F.cross_entropy(output.logits_per_image, own) + F.cross_entropy(output.logits_per_text, own)
        ) / 2
        return value, {"right": float((output.logits_per_image.argmax(1) == own).float().mean())}

    loop.run(loss)
    model.load_state_dict(ema_state(args.folder))
    model.save_pretrained(args.output)
    processor(tokenizer).save_pretrained(args.output)


if __name__ == "__main__":
    main()
