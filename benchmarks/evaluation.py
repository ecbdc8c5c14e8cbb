"""Pictures made and judged prompt by prompt, with what a diary remembers of them."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from diary import Diary
from judge import judge
from numpy.typing import NDArray
from paired import Likeness
from PIL import Image
from prompts import COUNTS, Prompt
from scores import Outcome, judgement
from tqdm import tqdm

from sana_edge.image_metrics import psnr, ssim

PICTURES, CEILING = "pictures", "ceiling"
"""The runs: what models draw, and the true scenes."""
MODEL, INT8 = "model", "int8"
"""The sources of the first: the model that was asked for, and it in INT8."""
COLUMNS = 6
"""Prompts of each category on a contact sheet."""
WORST = 2
"""Pairs of the lowest PSNR that are kept."""

Pixels = NDArray[np.uint8]
Source = Callable[[int, Prompt], tuple[Pixels, dict[str, Any]]]
"""Makes the picture of a prompt, given with its number, and says how: pixels (H, H, 3) and JSON values."""


def evaluate(
    run: str, sources: Mapping[str, Source], chosen: Mapping[int, Prompt], diary: Diary
) -> dict[str, dict[int, Outcome]]:
    """Asks every source for the pictures that the diary does not have yet, and judges them.

    The sources take turns with each prompt. Returns all outcomes by source and number, in order.
    """
    done = recorded(diary, run)
    shown = on_sheet(chosen) if run == PICTURES else set()
    for number, prompt in tqdm(chosen.items(), desc=run, unit="prompt", disable=not sys.stderr.isatty()):
        if number in done:
            continue
        made = {name: source(number, prompt) for name, source in sources.items()}
        row: dict[str, Any] = {"run": run, "number": number}
        row["models"] = {
            name: {"made": how, **Outcome(prompt, judge(pixels)).row()}
            for name, (pixels, how) in made.items()
        }
        pictures = {name: pixels for name, (pixels, _) in made.items()}
        if INT8 in pictures:
            pair = pictures[INT8], pictures[MODEL]
            row["likeness"] = {"psnr": psnr(*pair), "ssim": ssim(*pair)}
        if number in shown or _is_low(row, done):
            row["pictures"] = {name: _packed(pixels) for name, pixels in pictures.items()}
        diary.add(row)
        done[number] = row
    return {
        name: {i: Outcome(prompt, judgement(done[i]["models"][name])) for i, prompt in chosen.items()}
        for name in sources
    }


def recorded(diary: Diary, run: str) -> dict[int, dict[str, Any]]:
    """The diary's rows of a run by the number of the prompt."""
    return {row["number"]: row for row in diary.rows if row["run"] == run}


def on_sheet(chosen: Mapping[int, Prompt], columns: int = COLUMNS) -> set[int]:
    """The prompts on the contact sheet: so many of each category, evenly spread, whatever the verdict."""
    shown: set[int] = set()
    for category in COUNTS:
        numbers = [i for i, p in chosen.items() if p.category == category]
        shown |= {numbers[k * len(numbers) // columns] for k in range(columns)} if numbers else set()
    return shown


def pictures(diary: Diary) -> dict[int, dict[str, Pixels]]:
    """The pictures that were kept, by number and source."""
    rows = recorded(diary, PICTURES)
    return {
        number: {name: _unpacked(text) for name, text in row["pictures"].items()}
        for number, row in rows.items()
        if "pictures" in row
    }


def likenesses(diary: Diary) -> dict[int, Likeness]:
    """How near the INT8 pictures are to the others, by number; empty where there are none."""
    rows = recorded(diary, PICTURES)
    return {number: Likeness(**row["likeness"]) for number, row in rows.items() if "likeness" in row}


def worst(found: Mapping[int, Likeness]) -> Sequence[int]:
    """The numbers of the lowest PSNR, lowest first."""
    return sorted(found, key=lambda number: found[number].psnr)[:WORST]


def _is_low(row: Mapping[str, Any], done: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether the row's PSNR is one of the lowest so far."""
    if "likeness" not in row:
        return False
    lowest = sorted(other["likeness"]["psnr"] for other in done.values())[:WORST]
    return len(lowest) < WORST or row["likeness"]["psnr"] < lowest[-1]


def _packed(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
