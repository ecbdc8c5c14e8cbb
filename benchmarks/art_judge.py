"""The judge of pictures of the art's world: what stands where, in which colour, by the network of
`art_detector.py`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from art_detector import CELLS, SIDE, Detector
from judge import Detection, Judgement
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from sana_edge.training.art.backdrops import BACKGROUNDS
from sana_edge.training.art.catalogue import kinds
from sana_edge.training.art.colours import COLOURS

WEIGHTS = Path(__file__).with_name("art_detector.safetensors")
CENTRE, KIND = 0.4, 0.5
"""The least probability of a centre, and of its kind, of an object that counts."""
APART = 1.5 / CELLS
"""Centres nearer than this, in shares of the side, are one object."""


@lru_cache(maxsize=1)
def detector() -> Detector:
    """The trained network."""
    model = Detector()
    model.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()}
    )
    return model.eval()


def judge(pixels: NDArray[np.uint8]) -> Judgement:
    """Says what is in a picture, the surest object first; a colour is "" for the kind's own.

    pixels: (H, H, 3) uint8 RGB, at least 96 pixels a side.
    Raises: ValueError for another shape or type.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.shape[0] != pixels.shape[1] or len(pixels) < SIDE:
        raise ValueError(f"a picture must be (H, H, 3) with H >= {SIDE}, got {pixels.shape}")
    if pixels.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8, got {pixels.dtype}")
    return decode(detector(), np.asarray(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)))


@torch.inference_mode()
def decode(model: Detector, small: NDArray[np.uint8]) -> Judgement:
    """The judgement of a picture (SIDE, SIDE, 3), by `model`."""
    maps = model(torch.from_numpy(small.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1)
    centre = maps.centre[0].sigmoid()
    peaks = centre == F.max_pool2d(centre[None], 3, stride=1, padding=1)[0]
    chances = maps.kind[0].softmax(0).max(0)
    names, shades = list(kinds()), ["", *COLOURS]
    found = []
    for row, column in (peaks & (centre > CENTRE) & (chances.values > KIND)).nonzero().tolist():
        dx, dy, radius = maps.place[0, :, row, column].tolist()
        x, y = (column + 0.5 + dx) / CELLS, (row + 0.5 + dy) / CELLS
        found.append(
            Detection(
                names[int(chances.indices[row, column])],
                shades[int(maps.colour[0, :, row, column].argmax())],
                x,
                y,
                (x - radius, y - radius, x + radius, y + radius),
                float(centre[row, column] * chances.values[row, column]),
            )
        )
    found.sort(key=lambda d: -d.score)
    kept: list[Detection] = []
    for d in found:
        if all((d.x - o.x) ** 2 + (d.y - o.y) ** 2 > APART**2 for o in kept):
            kept.append(d)
    return Judgement(BACKGROUNDS[int(maps.background[0].argmax())], tuple(kept))
