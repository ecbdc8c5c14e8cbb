"""Tokenizer and text encoder: `python -m sana_edge.training.art.train_text_encoder --minutes 30`

A small Gemma-2 behind SANA's instruction, trained as a language model of captions and, at the same time, to
tell the facts of the scene from the mean of its last features: which kind in which colour stands where. A
language model alone keeps in its last features mostly what word comes next; a denoiser needs the facts.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from ..loop import Loop
from ..train_text_encoder import CONFIG as SMALL
from ..train_text_encoder import INSTRUCTION, train_tokenizer
from .backdrops import BACKGROUNDS
from .captions import caption
from .catalogue import kinds
from .colours import COLOURS
from .layout import SIZES, draw_scene, training_scene
from .scenes import Scene

CONFIG = Gemma2Config(**{**SMALL.to_dict(), "vocab_size": 2048})
SLOTS = 4
FORMS = ("one", "row", "column", "three", "four")
CLASSES = (*[1 + len(kinds())] * SLOTS, *[1 + len(COLOURS)] * SLOTS, len(BACKGROUNDS), len(FORMS), len(SIZES))
"""The classes of each fact; a slot's kind is 0 where nothing stands, its colour 0 for the kind's own."""


def facts(scene: Scene) -> list[int]:
    """The class of each of `CLASSES`: objects are counted from the top, then from the left."""
    things = sorted(scene.things, key=lambda t: (t.y > 0.4, t.x) if len(scene.things) > 2 else (t.y, t.x))
    form = FORMS[len(things) if len(things) > 2 else 0]
    if len(things) == 2:
        column = abs(things[0].y - things[1].y) > abs(things[0].x - things[1].x)
        form = "column" if column else "row"
        things = things if column else sorted(things, key=lambda t: t.x)
    names, shades = list(kinds()), ["", *COLOURS]
    shown = [1 + names.index(t.kind) for t in things] + [0] * (SLOTS - len(things))
    colours = [shades.index(t.colour) for t in things] + [0] * (SLOTS - len(things))
    size = list(SIZES).index(things[0].size)
    return [*shown, *colours, BACKGROUNDS.index(scene.background), FORMS.index(form), size]


class Reader(nn.Module):
    """The language model, and a head that tells the facts."""

    def __init__(self, config: Gemma2Config = CONFIG) -> None:
        super().__init__()
        self.language = Gemma2ForCausalLM(config)
        self.facts = nn.Linear(config.hidden_size, sum(CLASSES))

    def forward(self, tokens: Tensor, mask: Tensor, cache: DynamicCache | None) -> tuple[Tensor, Tensor]:
        """Logits of words (B, L, V) and of facts (B, sum of CLASSES); tokens and mask are (B, L)."""
        hidden = self.language.model(
            tokens, past_key_values=cache, use_cache=cache is not None
        ).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.language.lm_head(hidden), self.facts(mean)


def facts_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy in nats, summed over facts and meaned over rows; and the share of right facts."""
    parts = torch.split(logits, list(CLASSES), dim=1)
    right = torch.stack([p.argmax(1) == t for p, t in zip(parts, targets.T, strict=True)]).float().mean()
    losses = [F.cross_entropy(part, target) for part, target in zip(parts, targets.T, strict=True)]
    return torch.stack(losses).sum(), float(right)


def scenes(seed: int) -> Iterator[tuple[Scene, str]]:
    """Endless training scenes, each with a caption."""
    rng = random.Random(f"scenes {seed}")
    while True:
        scene = training_scene(rng)
        yield scene, caption(scene, rng)


def lines(count: int) -> list[str]:
    """What the tokenizer is trained on: captions, and all names and emoji often enough to be one word."""
    rng = random.Random("tokenizer")
    texts = [caption(draw_scene(rng), rng) for _ in range(count)]
    for kind in kinds().values():
        texts += [f"{kind.name} {kind.emoji} {kind.plural} {' '.join(kind.others)}"] * 10
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="train the tokenizer and text encoder of sana-tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    if (args.folder / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.folder / "tokenizer")
    else:
        tokenizer = train_tokenizer(args.folder / "tokenizer", lines(12000), CONFIG.vocab_size)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    loop = Loop(model, [optimizer], args.folder, minutes=args.minutes, precision="no", warmup=100)
    source = scenes(1 + loop.step)
    prefix = tokenizer(INSTRUCTION, return_tensors="pt").input_ids[:, :-1]

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        behind = step % 4 != 3  # every fourth batch stands alone, as negative prompts do
        drawn = [next(source) for _ in range(args.batch)]
        texts = [(" " if behind else "") + text for _, text in drawn]
        coded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not behind)
        tokens, mask = coded.input_ids, coded.attention_mask
        cache = None
        if behind:
            cache = model.language.model(prefix, use_cache=True).past_key_values
            cache.batch_repeat_interleave(args.batch)
        words, told = model(tokens, mask, cache)
        value = F.cross_entropy(words[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        facts_value, right = facts_loss(told, torch.tensor([facts(scene) for scene, _ in drawn]))
        return value + 0.3 * facts_value, {"words": float(value.detach()), "facts": right}

    loop.run(loss)


if __name__ == "__main__":
    main()
