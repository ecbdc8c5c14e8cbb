"""Aspect-ratio buckets: the sizes that pictures of any shape are trained at; diffusers' tables."""

from __future__ import annotations

import math
from functools import lru_cache

from PIL import Image, ImageOps

Size = tuple[int, int]
"""Height and width in pixels."""

RESOLUTIONS = (256, 512, 1024, 2048, 4096)

# height and width in sixteenths of the resolution, about 256 of them in area
_CELLS = (
    (8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21), (12, 21),
    (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15), (17, 15),
    (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10), (25, 10),
    (27, 9), (32, 8),
)  # fmt: skip
# only the large resolutions have these
_LARGE_CELLS = ((8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8))


@lru_cache
def aspect_ratios(resolution: int) -> dict[float, Size]:
    """Height / width, rounded to two places, and size: ``ASPECT_RATIO_<resolution>_BIN`` of diffusers."""
    cells = sorted((*_CELLS, *(_LARGE_CELLS if resolution > 1024 else ())), key=lambda c: c[0] / c[1])
    unit = resolution // 16
    return {round(h / w, 2): (h * unit, w * unit) for h, w in cells}


@lru_cache
def buckets(resolution: int, multiple: int) -> dict[float, Size]:
    """`aspect_ratios` whose sides are multiples of the autoencoder's cell; at 256 px not all are."""
    found = aspect_ratios(resolution)
    return {ratio: size for ratio, size in found.items() if not any(side % multiple for side in size)}


def bucket(width: int, height: int, resolution: int, multiple: int) -> Size:
    """The size whose aspect ratio is nearest, by the absolute difference as in diffusers."""
    table = buckets(resolution, multiple)
    return table[min(table, key=lambda ratio: abs(ratio - height / width))]


def fit(image: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture, RGB: scaled until it covers ``size``, then cut; transparency turns white."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA", "LA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = (
        max(width, math.ceil(image.width * scale - 1e-6)),
        max(height, math.ceil(image.height * scale - 1e-6)),
    )
    image = image.convert("RGB").resize(covering, Image.Resampling.LANCZOS, reducing_gap=3.0)
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.crop((left, top, left + width, top + height))
