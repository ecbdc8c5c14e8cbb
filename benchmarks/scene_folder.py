"""Flat scenes of `sana_edge.training.scenes` as an imagefolder, some captions of other scenes if wished.

python benchmarks/scene_folder.py runs/mixed --count 600 --wrong 0.5
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from record import positive

from sana_edge.training.captions import caption
from sana_edge.training.layout import training_scene
from sana_edge.training.scenes import render


def write_scenes(
    folder: Path, count: int, side: int, *, captions: int = 2, wrong: float = 0.0, seed: str = ""
) -> None:
    """Pictures and metadata.jsonl, whose ``wrong`` says which captions tell of another scene."""
    rng = random.Random(f"scene folder {seed}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        scene = training_scene(rng)
        render(scene, side).save(folder / f"{number:05d}.png")
        foreign = [rng.random() < wrong for _ in range(captions)]
        texts = [caption(training_scene(rng) if other else scene, rng) for other in foreign]
        row = {"file_name": f"{number:05d}.png", "captions": texts, "wrong": foreign}
        rows.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="write flat scenes and captions as an imagefolder")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=positive, default=600)
    parser.add_argument("--side", type=positive, default=256)
    parser.add_argument("--captions", type=positive, default=4)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of captions of other scenes")
    parser.add_argument("--seed", default="", help="any text")
    args = parser.parse_args()
    write_scenes(args.folder, args.count, args.side, captions=args.captions, wrong=args.wrong, seed=args.seed)


if __name__ == "__main__":
    main()
