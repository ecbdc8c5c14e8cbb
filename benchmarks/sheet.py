"""A contact sheet: some pictures of every category with their prompts and a mark for right or wrong."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scores import Outcome, by_category, categories, overall

PICTURE = 208
GAP = 20
CAPTION = 82
HEAD = 104
BAND = 46
PAPER, INK, SOFT = (250, 249, 246), (38, 40, 52), (112, 116, 130)
RIGHT, WRONG = (38, 146, 84), (206, 58, 58)


def sheet(
    title: str, note: str, outcomes: Sequence[Outcome], pictures: dict[str, NDArray[np.uint8]], columns: int
) -> bytes:
    """A PNG with a row for each category: the outcomes whose prompts' text has a picture in `pictures`.

    title: the first line; the overall score is put behind it. note: the second line.
    """
    scores = categories(outcomes)
    rows = by_category([o for o in outcomes if o.prompt.text in pictures])
    width = GAP + columns * (PICTURE + GAP)
    page = Image.new("RGB", (width, HEAD + len(rows) * (BAND + PICTURE + CAPTION)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 22), f"{title}: {overall(scores).share:.2f} overall", fill=INK, font=_font(34))
    draw.text((GAP, 68), note, fill=SOFT, font=_font(17))
    for i, (name, members) in enumerate(rows.items()):
        top = HEAD + i * (BAND + PICTURE + CAPTION)
        draw.line((GAP, top, width - GAP, top), fill=(224, 222, 214), width=2)
        draw.text((GAP, top + 10), name, fill=INK, font=_font(23))
        score = f"{scores[name].right} of {scores[name].count} right"
        draw.text((width - GAP, top + 12), score, fill=SOFT, font=_font(20), anchor="ra")
        for j, outcome in enumerate(members[:columns]):
            place = (GAP + j * (PICTURE + GAP), top + BAND)
            _tile(page, draw, place, outcome, pictures[outcome.prompt.text])
    buffer = io.BytesIO()
    page.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _tile(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    outcome: Outcome,
    pixels: NDArray[np.uint8],
) -> None:
    x, y = place
    colour = WRONG if outcome.fault else RIGHT
    page.paste(Image.fromarray(pixels).resize((PICTURE, PICTURE), Image.Resampling.LANCZOS), place)
    draw.rectangle((x - 3, y - 3, x + PICTURE + 2, y + PICTURE + 2), outline=colour, width=3)
    _mark(draw, (x + PICTURE - 18, y + 18), not outcome.fault)
    lines = _wrapped(outcome.prompt.text, 3 if not outcome.fault else 2)
    for k, line in enumerate(lines):
        draw.text((x, y + PICTURE + 7 + 19 * k), line, fill=INK, font=_font(15))
    if outcome.fault:
        draw.text((x, y + PICTURE + 7 + 19 * len(lines)), outcome.fault, fill=WRONG, font=_font(15))


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
    for word in text.split():
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
