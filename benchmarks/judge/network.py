"""The judge's network as torch trains it; `sana_edge.evaluate.judge.detector` runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sana_edge.evaluate.judge.detector import CELLS
from sana_edge.training.art.backdrops import BACKGROUNDS
from sana_edge.training.art.catalogue import kinds
from sana_edge.training.art.colours import COLOURS
from sana_edge.training.art.scenes import Scene

IGNORED = -100


@dataclass(frozen=True)
class Maps:
    """`detector.Maps` of B pictures: (B, 12, 12), (B, kinds, 12, 12), and so on."""

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
