"""Sizes of pictures: the ones a model was trained on for each aspect ratio, and what is asked for instead.

SANA is trained in buckets of aspect ratios. What is asked for is drawn in the nearest one, then resized and
cropped, as diffusers does by default (``use_resolution_binning``): another size than a bucket's looks worse.
"""

from __future__ import annotations

# (height, width) in units of 1/16 of the model's side; the second ones are of 2K and 4K only
_BUCKETS = (
    *((8, 32), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23), (11, 22), (11, 21)),
    *((12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17), (15, 16), (16, 16), (16, 15)),
    *((17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12), (21, 12), (22, 11), (23, 11), (24, 10)),
    *((25, 10), (27, 9), (32, 8)),
)
_LARGE = ((8, 31), (8, 30), (26, 9), (28, 9), (29, 8), (30, 8), (31, 8))
_SIDES = {512: _BUCKETS, 1024: _BUCKETS, 2048: (*_BUCKETS, *_LARGE), 4096: (*_BUCKETS, *_LARGE)}


def has_buckets(native: int) -> bool:
    """Whether a model of this side was trained on several aspect ratios."""
    return native in _SIDES


def bucket(width: int, height: int, native: int, cell: int = 32) -> tuple[int, int]:
    """The (width, height) in pixels to draw at, for a picture of any size by a model of side ``native``.

    The bucket whose ratio, rounded to two digits as the tables of diffusers' SanaPipeline have it, is nearest
    to height / width; for models without a table the next multiples of ``cell``.
    """
    if native not in _SIDES:
        return -(-width // cell) * cell, -(-height // cell) * cell
    by_ratio = sorted((round(h / w, 2), h, w) for h, w in _SIDES[native])
    _, h, w = min(by_ratio, key=lambda entry: abs(entry[0] - height / width))
    return w * native // 16, h * native // 16


def resized(drawn: tuple[int, int], asked: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a picture (width, height) becomes another: its size after scaling, and where the crop begins.

    Scaled until both sides reach what is asked, and cropped in the middle, as diffusers'
    ``resize_and_crop_tensor``.
    """
    factor = max(asked[1] / drawn[1], asked[0] / drawn[0])
    # in floating point the side that fits may come out a pixel short
    width, height = (max(int(side * factor), wanted) for side, wanted in zip(drawn, asked, strict=True))
    return (width, height), ((width - asked[0]) // 2, (height - asked[1]) // 2)
