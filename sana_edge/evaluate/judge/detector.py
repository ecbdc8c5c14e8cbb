"""The judge of sana-tiny's pictures: a small detector of objects by their centres (Zhou et al. 2019).

It shares nothing with the model that it judges: no weights, no latents, no text. The network and its training
are in `benchmarks/judge/network.py` and `benchmarks/train_art_detector.py`; here it runs in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from sana_edge.evaluate.judge.prompts import Detection, Judgement, check_picture
from sana_edge.training.art.backdrops import BACKGROUNDS
from sana_edge.training.art.catalogue import kinds
from sana_edge.training.art.colours import COLOURS

SIDE = 96
"""Pixels a side of what the network sees."""
CELLS = 12
"""Cells a side of its grid."""
WEIGHTS = Path(__file__).with_name("detector.safetensors")
CENTRE, KIND = 0.4, 0.5
"""The least probability of a centre, and of its kind, of an object that counts."""
APART = 1.5 / CELLS
"""Centres nearer than this, in shares of the side, are one object."""

Array = NDArray[Any]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Maps:
    """What the network says of a picture, per cell of the grid unless said otherwise, fp32.

    centre: (12, 12) logits that an object's centre lies in the cell. kind: (kinds, 12, 12) logits.
    colour: (1 + colours, 12, 12) logits, 0 the kind's own. place: (3, 12, 12) the centre's offset from the
    cell's in cells, x and y, and the radius in shares of the side. background: (backgrounds,) logits.
    """

    centre: Array
    kind: Array
    colour: Array
    place: Array
    background: Array


def judge(pixels: NDArray[np.uint8]) -> Judgement:
    """Says what is in a picture, the surest object first; a colour is "" for the kind's own.

    pixels: (H, H, 3) uint8 RGB, at least 96 pixels a side.
    Raises: ValueError for another shape or type.
    """
    check_picture(pixels, SIDE)
    small = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BOX)
    return decode(maps(_weights(), np.asarray(small)))


@lru_cache(maxsize=1)
def _weights() -> Weights:
    return {name: value.astype(np.float32) for name, value in load_file(WEIGHTS).items()}


def maps(weights: Weights, small: NDArray[np.uint8]) -> Maps:
    """The network's answer to a picture (SIDE, SIDE, 3)."""
    x: Array = small.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
    for i in (0, 3, 6):
        x = _conv(x, weights[f"stem.{i}.weight"], stride=2)
        x = np.maximum(_norm(x, weights, f"stem.{i + 1}"), 0)
    for block, dilation in enumerate((1, 2, 3, 1)):
        name = f"trunk.{block}.body"
        inner = np.maximum(_norm(x, weights, f"{name}.0"), 0)
        inner = _conv(inner, weights[f"{name}.2.weight"], dilation=dilation)
        inner = np.maximum(_norm(inner, weights, f"{name}.3"), 0)
        x = x + _conv(inner, weights[f"{name}.5.weight"]) + weights[f"{name}.5.bias"][:, None, None]
    background = weights["background.weight"] @ x.mean((1, 2)) + weights["background.bias"]
    x = np.maximum(_norm(x, weights, "head.0"), 0)
    head = np.tensordot(weights["head.2.weight"][..., 0, 0], x, 1) + weights["head.2.bias"][:, None, None]
    centre, kind, colour, place = np.split(head, np.cumsum((1, len(kinds()), 1 + len(COLOURS))))
    return Maps(centre[0], kind, colour, place, background)


def _conv(x: Array, weight: Array, stride: int = 1, dilation: int = 1) -> Array:
    """A 3x3 convolution of (C, H, W), padded by zeros to its own size, or half of that."""
    reach = 2 * dilation + 1
    padded = np.pad(x, ((0, 0), (dilation, dilation), (dilation, dilation)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (reach, reach), (1, 2))
    taken = windows[:, ::stride, ::stride, ::dilation, ::dilation]
    result: Array = np.tensordot(weight, taken, ((1, 2, 3), (0, 3, 4)))
    return result


def _norm(x: Array, weights: Weights, name: str) -> Array:
    """A batch norm by its running statistics."""
    scale = weights[f"{name}.weight"] / np.sqrt(weights[f"{name}.running_var"] + 1e-5)
    shift = weights[f"{name}.bias"] - scale * weights[f"{name}.running_mean"]
    result: Array = x * scale[:, None, None] + shift[:, None, None]
    return result


def decode(found: Maps) -> Judgement:
    """The objects at the peaks of the centres' map."""
    centre = 1 / (1 + np.exp(-found.centre))
    around = np.lib.stride_tricks.sliding_window_view(np.pad(centre, 1), (3, 3)).max((2, 3))
    chances = np.exp(found.kind - found.kind.max(0))
    surest = 1 / chances.sum(0)
    names, shades = list(kinds()), ["", *COLOURS]
    objects = []
    for row, column in np.argwhere((centre == around) & (centre > CENTRE) & (surest > KIND)).tolist():
        dx, dy, radius = found.place[:, row, column].tolist()
        x, y = (column + 0.5 + dx) / CELLS, (row + 0.5 + dy) / CELLS
        objects.append(
            Detection(
                names[int(found.kind[:, row, column].argmax())],
                shades[int(found.colour[:, row, column].argmax())],
                x,
                y,
                (x - radius, y - radius, x + radius, y + radius),
                float(centre[row, column] * surest[row, column]),
            )
        )
    kept: list[Detection] = []
    for d in sorted(objects, key=lambda d: -d.score):
        if all((d.x - o.x) ** 2 + (d.y - o.y) ** 2 > APART**2 for o in kept):
            kept.append(d)
    return Judgement(BACKGROUNDS[int(found.background.argmax())], tuple(kept))
