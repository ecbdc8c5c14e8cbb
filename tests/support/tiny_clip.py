"""A CLIP and a LLaVA of a few kilobytes with random weights, for tests that load them from a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} answer:"
)


def tokenizer() -> PreTrainedTokenizerFast:
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokens.train_from_iterator(["a red house", "describe this picture"], trainer)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


def image_processor() -> CLIPImageProcessor:
    side = {"height": 32, "width": 32}
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side)


def write_clip(folder: Path) -> None:
    """A CLIP whose text ends after 16 tokens, and its processor."""
    torch.manual_seed(0)
    text = {"vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": 1, "pad_token_id": 0}
    shape = {name: VISION[name] for name in list(VISION)[:4]}
    config = CLIPConfig(text_config={**shape, **text}, vision_config=VISION, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor(), tokenizer()).save_pretrained(folder)


def write_llava(folder: Path) -> None:
    """A LLaVA of 40 thousand weights, large enough for attention to matter."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        initializer_range=0.5,
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor(),
        tokenizer(),
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
