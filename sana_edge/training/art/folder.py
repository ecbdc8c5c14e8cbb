"""Scenes as an imagefolder: `python -m sana_edge.training.art.folder --output runs/scenes --count 2000`

PNG pictures and a metadata.jsonl with several captions each, which is what `sana_edge.training` trains any
model on. With --wrong, a share of the captions tell of another scene: a CLIP-score sampler should find them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tqdm import tqdm

from sana_edge.system.atomic import new_file

from ..metadata import NAME
from .captions import caption
from .layout import numbered_scene
from .scenes import render


def row(number: int, captions: int, wrong: float) -> tuple[list[str], list[bool]]:
    """The captions of scene `number`, and which of them are of another scene; the same every time."""
    rng = random.Random(f"folder {number}")
    foreign = [rng.random() < wrong for _ in range(captions)]
    scenes = [numbered_scene(rng.randrange(10**6) if other else number) for other in foreign]
    return [caption(scene, rng) for scene in scenes], foreign


def main() -> None:
    parser = argparse.ArgumentParser(description="write scenes and captions as an imagefolder")
    parser.add_argument("--output", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of captions of other scenes")
    args = parser.parse_args()

    lines = []
    for number in tqdm(range(args.first, args.first + args.count), unit="picture"):
        path = args.output / f"{number:07d}.png"
        if not path.exists():
            with new_file(path) as partial:
                render(numbered_scene(number), args.side).save(partial, format="PNG")
        captions, foreign = row(number, args.captions, args.wrong)
        lines.append(json.dumps({"file_name": path.name, "captions": captions, "wrong": foreign}))
    with new_file(args.output / NAME) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
