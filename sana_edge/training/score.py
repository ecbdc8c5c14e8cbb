"""CLIP scores of captions, written beside them, and the choice they weigh (arXiv 2410.10629, section 3.1).

`python -m sana_edge.training.score --data DIR --model CLIP`. A picture's scores are computed once, and again
only where its captions or the CLIP are others.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F

from sana_edge.errors import CheckpointError, torch_extra
from sana_edge.store.pretrained import foreign, load_pair
from sana_edge.store.weights import weight_files

from .command import add_model_options, start
from .imagefolder import LeftOut, checksum
from .metadata import Row, captions
from .walk import walk


def probabilities(scores: Sequence[float], tau: float) -> list[float]:
    """P(i) = exp(c_i / tau) / sum_j exp(c_j / tau)."""
    best = max(scores)
    weights = [math.exp((score - best) / tau) for score in scores]
    return [weight / sum(weights) for weight in weights]


class Scorer:
    """A CLIP, or another model with a tower for text and one for pictures, from a local folder.

    Attributes:
        limit: tokens of a text that it reads.
        cut: texts so far that were longer.
    """

    def __init__(self, folder: Path, *, device: str | None = None) -> None:
        """Load it; errors are those of `load_pair`."""
        with torch_extra():
            from transformers import AutoModel
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.folder = folder
        self.processor, self.model = load_pair(AutoModel, folder, self.device)
        config = self.model.config
        with foreign(f"{folder} is no CLIP"):
            self.limit = int(config.text_config.max_position_embeddings)
            # SigLIP has only seen texts padded to their full length
            self.padding: Any = "max_length" if "siglip" in config.model_type else True
        self.checksum = "".join(checksum(file) for file in weight_files(folder))
        self.cut = 0

    @torch.inference_mode()
    def score(self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """100 cos of each picture and each of its own texts; texts longer than `limit` are cut.

        Raises:
            CheckpointError: the model fails, or gives no numbers.
        """
        with foreign(f"the model in {self.folder} fails"):
            found = self._score(pictures, texts)
        if not all(math.isfinite(score) for own in found for score in own):
            raise CheckpointError(f"the scores of {self.folder} are not finite", "download the model again")
        return found

    def _score(self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        flat = [text for own in texts for text in own]
        lengths = [len(ids) for ids in self.processor.tokenizer(flat, verbose=False).input_ids]
        self.cut += sum(length > self.limit for length in lengths)
        inputs = self.processor(
            text=flat,
            images=list(pictures),
            padding=self.padding,
            truncation=True,
            max_length=self.limit,
            return_tensors="pt",
        ).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        found = self.model(**inputs)
        image, text = (F.normalize(e.float(), dim=-1) for e in (found.image_embeds, found.text_embeds))
        owners = [number for number, own in enumerate(texts) for _ in own]
        scores = iter((100 * (image[owners] * text).sum(-1)).tolist())
        return [[next(scores) for _ in own] for own in texts]

    def key(self, row: Row) -> str:
        """What a row's scores depend on, but for the picture."""
        text = "\0".join([self.checksum, *captions(row)])
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def write_scores(data: Path, scorer: Scorer, batch: int) -> tuple[int, LeftOut]:
    """Score the captions of every row that has no scores of this CLIP; how many rows, and what was left out.

    An empty caption has the score null.
    """
    left_out, count = LeftOut(), 0

    def lacks(row: Row) -> bool:
        return any(text.strip() for text in captions(row)) and row.get("clip_key") != scorer.key(row)

    for part in walk(data, lacks, batch, left_out):
        filled = [[text for text in captions(row) if text.strip()] for row in part.rows]
        for name, row, scores in zip(part.names, part.rows, scorer.score(part.pictures, filled), strict=True):
            found = iter(scores)
            kept = [round(next(found), 4) if text.strip() else None for text in captions(row)]
            part.metadata.update(name, captions=captions(row), clip_scores=kept, clip_key=scorer.key(row))
            count += 1
    return count, left_out


def run(arguments: argparse.Namespace) -> None:
    """Score a folder."""
    scorer = Scorer(arguments.model, device=arguments.device)
    count, left_out = write_scores(arguments.data, scorer, arguments.batch)
    for line in left_out.lines():
        print(line, file=sys.stderr)
    if scorer.cut:
        print(
            f"{scorer.cut:,} captions are longer than the CLIP's {scorer.limit} tokens: cut", file=sys.stderr
        )
    print(f"scored the captions of {count:,} pictures")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="write CLIP scores of captions into a folder's metadata.jsonl"
    )
    add_model_options(parser, "a CLIP")
    return start(parser, run)


if __name__ == "__main__":
    sys.exit(main())
