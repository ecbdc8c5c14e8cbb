"""Where the art lies on disk, and whether it is all there. No picture of it is part of this project."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sana_edge.errors import SanaError

from .catalogue import kinds

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
FOLDERS = ("lobehub-fluent-emoji-3d-1.1.0", "emojibase-data-17.0.0")
PICTURES = 3391
"""Pictures in the art, 256 x 256 RGBA."""


def folder() -> Path:
    """`SANA_EDGE_ART`, or `runs/art` of the working directory."""
    return Path(os.environ.get("SANA_EDGE_ART", "runs/art"))


def hint() -> str:
    """The commands that bring the art into its folder."""
    unpack = " && ".join(f"mkdir -p {f} && tar xzf {f}.tgz -C {f}" for f in FOLDERS)
    return f"mkdir -p {folder()} && cd {folder()} && npm pack {' '.join(PACKAGES)} && {unpack}"


def assets() -> Path:
    """The folder of pictures.

    Raises:
        SanaError: it is not there.
    """
    path = folder() / FOLDERS[0] / "package" / "assets"
    if not path.is_dir():
        raise SanaError(f"the art is not in {folder()}", hint())
    return path


def labels() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Label and tags of every emoji by its code, as emojibase has them.

    Raises:
        SanaError: the table is not there.
    """
    path = folder() / FOLDERS[1] / "package" / "en" / "data.json"
    if not path.is_file():
        raise SanaError(f"the labels of the art are not in {folder()}", hint())
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return {
        row["hexcode"].lower().removesuffix("-fe0f"): (row["label"], tuple(row.get("tags", ())))
        for row in rows
    }


@lru_cache(maxsize=512)
def picture(pictures: Path, code: str) -> Image.Image:
    """The art of one code, (256, 256) RGBA, cut to what is not transparent and made square again.

    Args:
        pictures: the folder of `assets`.

    Raises:
        SanaError: it is not there, or is no picture.
    """
    names = [pictures / f"{code}{end}.webp" for end in ("", "-fe0f")]
    path = next((p for p in names if p.is_file()), None)
    if path is None:
        raise SanaError(f"the art has no picture {code}.webp in {pictures}", hint())
    try:
        with Image.open(path) as file:
            image = file.convert("RGBA")
    except OSError as error:
        raise SanaError(f"{path} is damaged: {error}", hint()) from error
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox() or (0, 0, *image.size)
    side = max(box[2] - box[0], box[3] - box[1])
    x, y = (box[0] + box[2] - side) // 2, (box[1] + box[3] - side) // 2
    square: Image.Image = image.crop((x, y, x + side, y + side))
    return square.resize((256, 256), Image.Resampling.LANCZOS)


def check() -> list[str]:
    """What is missing or not as expected, in words; empty if all is well.

    Raises:
        SanaError: there is no art at all.
    """
    pictures = assets()
    found = [p for p in pictures.iterdir() if p.suffix == ".webp"]
    faults = [] if len(found) == PICTURES else [f"{len(found)} pictures, not {PICTURES}"]
    known = labels()
    for kind in kinds().values():
        try:
            picture(pictures, kind.code)
        except SanaError as error:
            faults.append(error.message)
        if kind.code not in known:
            faults.append(f"no label for {kind.code} ({kind.name})")
    return faults
