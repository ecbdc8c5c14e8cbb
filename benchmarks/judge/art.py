"""The judge of the art's world: a small detector of objects by their centres (Zhou et al. 2019).

It shares nothing with the model that it judges: no weights, no latents, no text. `train_art_detector.py`
trains it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sana_edge.evaluate.judge.prompts import Detection, Judgement, check_picture
from sana_edge.training.art.backdrops import BACKGROUNDS
from sana_edge.training.art.catalogue import kinds
from sana_edge.training.art.colours import COLOURS
from sana_edge.training.art.scenes import Scene

SIDE = 96
"""Pixels a side of what the network sees."""
CELLS = 12
"""Cells a side of its grid."""
IGNORED = -100
WEIGHTS = Path(__file__).with_name("art_detector.safetensors")
CENTRE, KIND = 0.4, 0.5
"""The least probability of a centre, and of its kind, of an object that counts."""
APART = 1.5 / CELLS
"""Centres nearer than this, in shares of the side, are one object."""


@dataclass(frozen=True)
class Maps:
    """What the network says of B pictures, per cell of the grid unless said otherwise.

    centre: (B, 12, 12) logits that an object's centre lies in the cell. kind: (B, kinds, 12, 12) logits.
    colour: (B, 1 + colours, 12, 12) logits, 0 the kind's own. place: (B, 3, 12, 12) the centre's offset
    from the cell's in cells, x and y, and the radius in shares of the side. background: (B, backgrounds).
    """

    centre: Tensor
    kind: Tensor
    colour: Tensor
    place: Tensor
    background: Tensor


class Residual(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class Detector(nn.Module):
    """Pictures (B, 3, 96, 96) in [-1, 1] to `Maps`."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()

        def down(before: int, after: int) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(after), nn.ReLU()]

        self.stem = nn.Sequential(*down(3, 32), *down(32, 64), *down(64, width))
        self.trunk = nn.Sequential(*(Residual(width, dilation) for dilation in (1, 2, 3, 1)))
        self.parts = (1, len(kinds()), 1 + len(COLOURS), 3)
        self.head = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, sum(self.parts), 1))
        self.background = nn.Linear(width, len(BACKGROUNDS))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, pixels: Tensor) -> Maps:
        hidden = self.trunk(self.stem(pixels.contiguous(memory_format=torch.channels_last)))
        centre, kind, colour, place = self.head(hidden).split(self.parts, dim=1)
        return Maps(centre[:, 0], kind, colour, place, self.background(hidden.mean((2, 3))))


def targets(scene: Scene) -> dict[str, Tensor]:
    """What `Maps` should be of a scene, per cell: classes (IGNORED where no centre is) and place."""
    names, shades = list(kinds()), ["", *COLOURS]
    kind, colour = (torch.full((CELLS, CELLS), IGNORED) for _ in range(2))
    place = torch.zeros(3, CELLS, CELLS)
    for thing in scene.things:
        column, row = (min(max(int(v * CELLS), 0), CELLS - 1) for v in (thing.x, thing.y))
        kind[row, column] = names.index(thing.kind)
        colour[row, column] = shades.index(thing.colour)
        offset = (thing.x * CELLS - column - 0.5, thing.y * CELLS - row - 0.5, thing.radius)
        place[:, row, column] = torch.tensor(offset)
    background = torch.tensor(BACKGROUNDS.index(scene.background))
    return {"kind": kind, "colour": colour, "place": place, "background": background}


def detector_loss(maps: Maps, want: dict[str, Tensor]) -> tuple[Tensor, float]:
    """The loss in nats, and the share of right kinds at the centres."""
    here = want["kind"] != IGNORED
    weight = torch.where(here, 12.0, 1.0)
    # cells next to a centre may say either
    near = F.max_pool2d(here.float()[:, None], 3, stride=1, padding=1)[:, 0] > 0
    weight = torch.where(near & ~here, 0.1, weight)
    centre = F.binary_cross_entropy_with_logits(maps.centre, here.float(), weight)
    kind = F.cross_entropy(maps.kind, want["kind"], ignore_index=IGNORED, label_smoothing=0.02)
    colour = F.cross_entropy(maps.colour, want["colour"], ignore_index=IGNORED)
    place = ((maps.place - want["place"]).abs() * here[:, None]).sum() / here.sum()
    background = F.cross_entropy(maps.background, want["background"])
    right = float((maps.kind.argmax(1) == want["kind"])[here].float().mean())
    return 4 * centre + kind + colour + place + 0.3 * background, right


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
    check_picture(pixels, SIDE)
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
