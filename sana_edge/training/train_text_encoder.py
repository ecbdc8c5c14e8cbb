"""Step 0: tokenizer and text encoder. `python -m sana_edge.training.train_text_encoder --minutes 4`

A small Gemma-2, trained as a language model on captions, mostly behind SANA's complex human instruction as
it will be used, then frozen. The instruction is the same for every row, so its keys and values are
computed once per step.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from sana_edge.prompt import CHI

from .captions import caption
from .layout import draw_scene
from .loop import Loop

INSTRUCTION = "\n".join(CHI)
CONFIG = Gemma2Config(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    query_pre_attn_scalar=32,
    max_position_embeddings=2048,
    attn_implementation="eager",
)


def captions(seed: int) -> Iterator[str]:
    """Endless captions of random scenes."""
    rng = random.Random(f"captions {seed}")
    while True:
        yield caption(draw_scene(rng), rng)


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of this domain's captions."""
    source = captions(0)
    return train_tokenizer(folder, [next(source) for _ in range(6000)], CONFIG.vocab_size)


def train_tokenizer(folder: Path, lines: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over lines and the instruction, ids as Gemma has them: pad 0, eos 1, bos 2, unk 3."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*lines, *(" " + line for line in lines), *[INSTRUCTION] * 300], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
    )
    fast.save_pretrained(folder)
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(
        description="train the tokenizer and text encoder of a small model of the shapes"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/text"))
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = make_tokenizer(args.folder / "tokenizer")
    model = Gemma2ForCausalLM(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    loop = Loop(model, [optimizer], args.folder, minutes=args.minutes, warmup=100)
    source = captions(1 + loop.step)
    prefix = tokenizer(INSTRUCTION, return_tensors="pt").input_ids[:, :-1].to(loop.accelerator.device)

    def rows(step: int) -> tuple[Tensor, DynamicCache | None]:
        """Captions as tokens (batch, L); every fourth batch stands alone, as negative prompts do."""
        behind = step % 4 != 3
        texts = [(" " if behind else "") + next(source) for _ in range(args.batch)]
        tokens = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not behind).input_ids
        if not behind:
            return tokens.to(prefix.device), None
        cache = model(prefix, use_cache=True).past_key_values
        cache.batch_repeat_interleave(args.batch)
        return tokens.to(prefix.device), cache

    def loss(step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        tokens, cache = rows(step)
        logits = model(tokens, past_key_values=cache, use_cache=cache is not None).logits
        value = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0)
        return value, {}

    loop.run(loss)


if __name__ == "__main__":
    main()
