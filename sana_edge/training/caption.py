"""Captions of an image-text-to-text model, written into the metadata. `python -m sana_edge.training.caption`

SANA's pictures have captions of several such models (arXiv 2410.10629, section 3.1): run it once for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sana_edge.errors import torch_extra
from sana_edge.store.pretrained import foreign, load_pair

from .command import add_model_options, start
from .imagefolder import LeftOut
from .metadata import captioned_by, captions
from .walk import Batch, walk

PROMPT = "Describe this picture in one or two sentences: what is in it, where, and how it looks."


class Captioner:
    """Any model of `AutoModelForImageTextToText` with its processor, from a local folder, greedy."""

    def __init__(
        self, folder: Path, *, prompt: str | None = None, tokens: int = 128, device: str | None = None
    ) -> None:
        """Load it; no code of the folder is run and nothing is downloaded.

        Args:
            prompt: what is asked of each picture; `PROMPT` where there is a chat template, else nothing.

        Raises:
            CheckpointError: the folder has no such model.
        """
        with torch_extra():
            from transformers import AutoModelForImageTextToText
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor, self.model = load_pair(AutoModelForImageTextToText, folder, self.device)
        self.folder, self.tokens = folder, tokens
        with foreign(f"{folder} cannot be asked"):
            tokenizer = self.processor.tokenizer
            # a decoder writes on at the right
            tokenizer.padding_side = "left"
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            self.text = self._text(prompt)

    @torch.inference_mode()
    def describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        """A caption of each picture, on one line; "" where the model says nothing."""
        with foreign(f"the model in {self.folder} fails"):
            return self._describe(pictures)

    def _describe(self, pictures: Sequence[Image.Image]) -> list[str]:
        texts = {} if self.text is None else {"text": [self.text] * len(pictures)}
        images = [[picture] for picture in pictures]
        inputs = self.processor(images=images, **texts, padding=True, return_tensors="pt").to(self.device)
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        ids = self.model.generate(**inputs, max_new_tokens=self.tokens, do_sample=False)
        asked = inputs.get("input_ids")
        if asked is not None and torch.equal(ids[:, : asked.shape[1]], asked):
            ids = ids[:, asked.shape[1] :]
        answers = self.processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(answer.split()) for answer in answers]

    def _text(self, prompt: str | None) -> str | None:
        if getattr(self.processor, "chat_template", None) is None:
            return prompt
        content = [{"type": "image"}, {"type": "text", "text": prompt or PROMPT}]
        message = [{"role": "user", "content": content}]
        text: str = self.processor.apply_chat_template(message, add_generation_prompt=True)
        return text


def write_captions(data: Path, captioner: Captioner, name: str, batch: int) -> tuple[int, LeftOut]:
    """Add a caption to every row that ``name`` has not captioned yet; how many, and what was left out."""
    left_out, written = LeftOut(), 0
    for part in walk(data, lambda row: name not in captioned_by(row), batch, left_out):
        for picture, caption in zip(part.names, captioner.describe(part.pictures), strict=True):
            written += bool(caption)
            left_out.empty += not caption
            _add(part, picture, caption, name)
    return written, left_out


def _add(part: Batch, picture: str, caption: str, name: str) -> None:
    row = part.metadata.rows[picture]
    texts = [*captions(row), *([caption] if caption else [])]
    part.metadata.update(picture, captions=texts, captioned_by=[*captioned_by(row), name])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_model_options(parser, "an image-text-to-text model")
    parser.add_argument("--prompt", help="what is asked of each picture (default: a sentence or two)")
    parser.add_argument(
        "--tokens", type=int, default=128, help="most tokens of a caption (default: %(default)s)"
    )
    parser.add_argument("--name", help="of the model in the metadata (default: its folder's)")


def run(arguments: argparse.Namespace) -> None:
    """Caption a folder."""
    name = arguments.name or arguments.model.resolve().name
    captioner = Captioner(
        arguments.model, prompt=arguments.prompt, tokens=arguments.tokens, device=arguments.device
    )
    count, left_out = write_captions(arguments.data, captioner, name, arguments.batch)
    for line in left_out.lines():
        print(line, file=sys.stderr)
    print(f"{count:,} captions by {name}")


def main() -> int:
    parser = argparse.ArgumentParser(description="write captions of a model into a folder's metadata.jsonl")
    add_options(parser)
    return start(parser, run)


if __name__ == "__main__":
    sys.exit(main())
