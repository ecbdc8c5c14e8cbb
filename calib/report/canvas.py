"""A page to draw on, and the charts of the report: drawn at twice the size, so that lines come out smooth."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

SCALE = 2

PAPER, INK, SOFT, RULE = (255, 255, 255), (32, 36, 48), (108, 114, 128), (222, 224, 230)
BLUE, ORANGE, RED, GREEN = (45, 103, 178), (222, 127, 33), (200, 45, 50), (38, 140, 84)

Colour = tuple[int, int, int]
Point = tuple[float, float]

# few decibels to many, all light enough for dark text
_RAMP: tuple[tuple[float, Colour], ...] = (
    (15, (240, 128, 110)),
    (25, (250, 196, 130)),
    (35, (250, 240, 170)),
    (45, (178, 222, 160)),
    (60, (120, 190, 190)),
)


class Canvas:
    """An RGB page; all coordinates and sizes are in pixels of the finished picture."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self._draw = ImageDraw.Draw(self._image)

    def text(self, at: Point, text: str, size: float = 15, fill: Colour = INK, anchor: str = "la") -> None:
        """``anchor`` as in Pillow: horizontal l, m or r, vertical a (top), m or s (baseline)."""
        self._draw.text(_scaled(at), text, fill=fill, font=_font(size), anchor=anchor)

    def line(self, points: Sequence[Point], fill: Colour = RULE, width: float = 1) -> None:
        """Straight pieces through all points."""
        scaled = [_scaled(point) for point in points]
        self._draw.line(scaled, fill=fill, width=round(width * SCALE), joint="curve")

    def dot(self, at: Point, radius: float, fill: Colour) -> None:
        """A disc."""
        x, y = at
        box = [*_scaled((x - radius, y - radius)), *_scaled((x + radius, y + radius))]
        self._draw.ellipse(box, fill=fill)

    def box(
        self, at: Point, size: Point, fill: Colour | None = None, outline: Colour | None = None,
        width: float = 1,
    ) -> None:  # fmt: skip
        """A rectangle with its upper left corner at ``at``."""
        corner = _scaled((at[0] + size[0], at[1] + size[1]))
        end = (corner[0] - 1, corner[1] - 1)
        self._draw.rectangle([*_scaled(at), *end], fill=fill, outline=outline, width=round(width * SCALE))

    def paste(self, image: Image.Image, at: Point, size: tuple[int, int]) -> None:
        """A picture in a given size."""
        scaled = image.resize((size[0] * SCALE, size[1] * SCALE), Image.Resampling.BICUBIC)
        self._image.paste(scaled, _scaled(at))

    def png(self) -> bytes:
        """The page as PNG."""
        page = self._image.resize((self.width, self.height), Image.Resampling.BOX)
        buffer = io.BytesIO()
        # a palette takes less than half of the bytes, in a package that may be small itself
        page.quantize(256).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def text_width(text: str, size: float) -> float:
    """Pixels that a line of text takes."""
    return _font(size).getlength(text) / SCALE


def wrapped(text: str, size: float, width: float, most: int) -> list[str]:
    """The text in at most so many lines; dots at the end if words are left out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            while " " in lines[-1] and text_width(lines[-1] + " ...", size) > width:
                lines[-1] = lines[-1].rpartition(" ")[0]
            lines[-1] += " ..."
            break
    return lines


def ramp(decibels: float) -> Colour:
    """The colour of an SQNR."""
    below, above = _RAMP[0], _RAMP[-1]
    if decibels <= below[0] or decibels >= above[0]:
        return (below if decibels <= below[0] else above)[1]
    for low, high in pairwise(_RAMP):
        if decibels <= high[0]:
            share = (decibels - low[0]) / (high[0] - low[0])
            r, g, b = (round(a + share * (z - a)) for a, z in zip(low[1], high[1], strict=True))
            return r, g, b
    return above[1]


def _scaled(point: Point) -> tuple[int, int]:
    return round(point[0] * SCALE), round(point[1] * SCALE)


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * SCALE)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType")
    return font
