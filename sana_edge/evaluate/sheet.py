"""Contact sheets: pictures of every category with their prompts and a mark for right or wrong."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from sana_edge.evaluate.judge.scores import Outcome, by_category, categories, overall

PICTURE = 208
GAP = 20
CAPTION = 82
HEAD = 104
BAND = 46
ROW = BAND + PICTURE + CAPTION
PAPER, INK, SOFT, RULE = (250, 249, 246), (38, 40, 52), (112, 116, 130), (224, 222, 214)
RIGHT, WRONG = (38, 146, 84), (206, 58, 58)
LONGEST = 400
"""Characters of a prompt that a caption looks at."""
AMPLIFIED = 8
"""Differences are shown so many times as strong."""

Pixels = NDArray[np.uint8]
Place = tuple[int, int]


@dataclass(frozen=True)
class Pair:
    """What two models drew for one prompt.

    likeness: in words. faults: what is wrong with each, empty if it is right, None where nobody judged.
    """

    text: str
    pictures: tuple[Pixels, Pixels]
    likeness: str
    faults: tuple[str | None, str | None] = (None, None)

    @property
    def difference(self) -> Pixels:
        """The absolute difference, AMPLIFIED."""
        a, b = (pixels.astype(np.int32) for pixels in self.pictures)
        shown: Pixels = (np.abs(a - b) * AMPLIFIED).clip(0, 255).astype(np.uint8)
        return shown


@dataclass(frozen=True)
class PairRow:
    """Pairs under a name at the left and a remark at the right."""

    name: str
    remark: str
    pairs: Sequence[Pair]


def sheet(
    title: str, note: str, outcomes: Sequence[Outcome], pictures: Mapping[str, Pixels], columns: int
) -> bytes:
    """A PNG with a row for each category: the outcomes whose prompts' text has a picture in `pictures`.

    title: the first line; the overall score is put behind it. note: the second line.
    """
    scores = categories(outcomes)
    rows = by_category([o for o in outcomes if o.prompt.text in pictures])
    page = _Page(columns, len(rows), f"{title}: {overall(scores).share:.2f} overall", note)
    for name, members in rows.items():
        page.band(name, f"{scores[name].right} of {scores[name].count} right")
        for column, outcome in enumerate(members[:columns]):
            page.tile(column, pictures[outcome.prompt.text], outcome.fault)
            page.caption(column, outcome.prompt.text, outcome.fault)
    return page.png()


def pair_sheet(title: str, note: str, rows: Sequence[PairRow]) -> bytes:
    """A PNG of pairs: the first picture, the second, and their difference, side by side."""
    page = _Page(3 * max(len(row.pairs) for row in rows), len(rows), title, note)
    for row in rows:
        page.band(row.name, row.remark)
        for i, pair in enumerate(row.pairs):
            page.tile(3 * i, pair.pictures[0], pair.faults[0])
            page.tile(3 * i + 1, pair.pictures[1], pair.faults[1])
            page.tile(3 * i + 2, pair.difference)
            page.caption(3 * i, pair.text, pair.faults[0] or "")
            page.caption(3 * i + 1, "", pair.faults[1] or "")
            page.caption(3 * i + 2, pair.likeness)
    return page.png()


class _Page:
    """Rows of tiles below a title and a note; a row begins with `band`."""

    def __init__(self, columns: int, rows: int, title: str, note: str) -> None:
        self.width = GAP + columns * (PICTURE + GAP)
        self.top = HEAD - ROW
        self.image = Image.new("RGB", (self.width, HEAD + rows * ROW), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.text((GAP, 22), title, fill=INK, font=_font(34))
        self.draw.text((GAP, 68), note, fill=SOFT, font=_font(17))

    def band(self, name: str, remark: str) -> None:
        """Begins the next row."""
        self.top += ROW
        self.draw.line((GAP, self.top, self.width - GAP, self.top), fill=RULE, width=2)
        self.draw.text((GAP, self.top + 10), name, fill=INK, font=_font(23))
        place = (self.width - GAP, self.top + 12)
        self.draw.text(place, remark, fill=SOFT, font=_font(20), anchor="ra")

    def tile(self, column: int, pixels: Pixels, fault: str | None = None) -> None:
        """A picture, framed and marked if there is a verdict: empty if nothing is wrong."""
        x, y = self._place(column)
        side = (PICTURE, PICTURE)
        resized = ImageOps.pad(Image.fromarray(pixels), side, Image.Resampling.LANCZOS, color=PAPER)
        self.image.paste(resized, (x, y))
        if fault is None:
            return
        colour = WRONG if fault else RIGHT
        self.draw.rectangle((x - 3, y - 3, x + PICTURE + 2, y + PICTURE + 2), outline=colour, width=3)
        _mark(self.draw, (x + PICTURE - 18, y + 18), not fault)

    def caption(self, column: int, text: str, fault: str = "") -> None:
        """Under a picture: what it is, and what is wrong with it."""
        x, y = self._place(column)
        lines = [(line, INK) for line in _wrapped(text, 2 if fault else 3)] if text else []
        lines += [(fault, WRONG)] if fault else []
        for k, (line, colour) in enumerate(lines):
            self.draw.text((x, y + PICTURE + 7 + 19 * k), line, fill=colour, font=_font(15))

    def png(self) -> bytes:
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()

    def _place(self, column: int) -> Place:
        return GAP + column * (PICTURE + GAP), self.top + BAND


def _mark(draw: ImageDraw.ImageDraw, centre: tuple[int, int], right: bool) -> None:
    """A tick or a cross on a disc."""
    x, y = centre
    draw.ellipse((x - 14, y - 14, x + 14, y + 14), fill=RIGHT if right else WRONG, outline=PAPER, width=2)
    if right:
        draw.line([(x - 7, y), (x - 2, y + 6), (x + 7, y - 6)], fill=PAPER, width=4, joint="curve")
    else:
        draw.line([(x - 5, y - 5), (x + 5, y + 5)], fill=PAPER, width=4)
        draw.line([(x - 5, y + 5), (x + 5, y - 5)], fill=PAPER, width=4)


def _wrapped(text: str, most: int) -> list[str]:
    """The text in at most so many lines as wide as a picture; dots at the end if words are left out."""
    font, lines = _font(15), [""]
    # no longer than a few lines, whatever was asked for
    for word in text[:LONGEST].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= PICTURE:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            while font.getlength(lines[-1] + " ...") > PICTURE:
                lines[-1] = lines[-1].rpartition(" ")[0]
            lines[-1] += " ..."
            return lines
    return lines


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType")
    return font
