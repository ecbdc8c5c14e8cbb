"""`python -m sana_edge.training.art` says how to fetch the art, checks it, and draws a sheet of scenes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from sana_edge.errors import SanaError
from sana_edge.system.atomic import new_file

from .catalogue import kinds
from .layout import numbered_scene
from .scenes import render
from .source import check, folder, hint

COLUMNS = 10


def sheet(count: int, side: int) -> Image.Image:
    """The first training scenes, side by side."""
    rows = -(-count // COLUMNS)
    image = Image.new("RGB", (COLUMNS * side, rows * side), "white")
    for i in range(count):
        image.paste(render(numbered_scene(i), side), (i % COLUMNS * side, i // COLUMNS * side))
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description="check the art that sana-tiny's scenes are composed from")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw a sheet of training scenes")
    args = parser.parse_args()
    try:
        faults = check()
    except SanaError as error:
        print(f"{error.message}\nfetch it with: {error.hint}", file=sys.stderr)
        return 1
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        print(f"fetch it anew with: {hint()}", file=sys.stderr)
        return 1
    print(f"{folder()}: all there, {len(kinds())} kinds in use")
    if args.sheet:
        with new_file(args.sheet) as partial:
            sheet(70, 200).save(partial, format="PNG")
    return 0


if __name__ == "__main__":
    sys.exit(main())
