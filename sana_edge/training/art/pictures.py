"""Training scenes drawn once and kept as raw pixels: `python -m sana_edge.training.art.pictures`

Scene number i is the same everywhere, so its captions are made anew at every use.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sana_edge.system.atomic import new_file

from .layout import held_out_scene, numbered_scene
from .scenes import render

SHARD = 1024
HELD_OUT = 512
"""Scenes in `held-out.npy`, which show held-out combinations."""


class Pictures:
    """All pictures of a folder, read through the page cache: `pictures[i]` is (side, side, 3) uint8."""

    def __init__(self, folder: Path) -> None:
        self.shards = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("pictures-*.npy"))]

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    def __getitem__(self, number: int) -> NDArray[np.uint8]:
        picture: NDArray[np.uint8] = self.shards[number // SHARD][number % SHARD]
        return picture


def main() -> None:
    parser = argparse.ArgumentParser(description="draw training scenes; goes on where it stopped")
    parser.add_argument("--folder", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--count", type=int, default=20 * SHARD)
    parser.add_argument("--side", type=int, default=256)
    args = parser.parse_args()

    wanted = {"held-out.npy": [held_out_scene(i) for i in range(HELD_OUT)]}
    shards = {f"pictures-{first:07d}.npy": first for first in range(0, args.count, SHARD)}
    for name, first in tqdm({**shards, "held-out.npy": 0}.items(), unit="shard"):
        path = args.folder / name
        if path.exists():
            continue
        scenes = wanted.get(name) or [numbered_scene(first + i) for i in range(SHARD)]
        pixels = np.stack([np.asarray(render(scene, args.side)) for scene in scenes])
        with new_file(path) as partial, open(partial, "wb") as file:
            np.save(file, pixels)


if __name__ == "__main__":
    main()
