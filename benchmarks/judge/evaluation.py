"""Pictures made and judged prompt by prompt, with what a diary remembers of them."""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from harness.results import Diary, positive
from sana_edge.bench.results import digest
from sana_edge.evaluate import sheet
from sana_edge.evaluate.judge.prompts import COUNTS, Judgement, Prompt
from sana_edge.evaluate.judge.scores import Outcome, judgement
from sana_edge.evaluate.paired import Likeness
from sana_edge.image_metrics import psnr, ssim

PICTURES, CEILING = "pictures", "ceiling"
"""The runs: what models draw, and the true scenes."""
MODEL, INT8 = "model", "int8"
"""The sources of the first: the model that was asked for, and it in INT8."""
COLUMNS = 6
"""Prompts of each category on a contact sheet."""
WORST = 2
"""Pictures of the lowest PSNR that are kept, of each pair of sources."""

Pixels = NDArray[np.uint8]
Source = Callable[[int, Prompt], tuple[Pixels, dict[str, Any]]]
"""Makes the picture of a prompt, given with its number, and says how: pixels (H, H, 3) and JSON values."""
Pair = tuple[str, str]
"""The source of a picture, and that of what it is compared with."""
Outcomes = Mapping[str, Mapping[int, Outcome]]
"""By source and number of the prompt."""


@dataclass(frozen=True)
class World:
    """What a model draws: its held-out prompts, who judges its pictures, and how its scenes are drawn."""

    prompts: Callable[[], Sequence[Prompt]]
    judge: Callable[[Pixels], Judgement]
    render: Callable[[Any], Image.Image]

    def choose(self, limit: int | None) -> dict[int, Prompt]:
        """The prompts by number: the first `limit` of each category, or all."""
        chosen: dict[int, Prompt] = {}
        for category in COUNTS:
            members = [(i, p) for i, p in enumerate(self.prompts()) if p.category == category]
            chosen |= dict(members[:limit])
        return chosen

    def truth(self, number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
        """The source of the judge's ceiling: the prompt's scene as it is drawn."""
        return np.asarray(self.render(prompt.scene)), {}


def world(name: str) -> World:
    """ "shapes" or "art"."""
    if name == "art":
        from sana_edge.evaluate.judge import detector, scene_prompts
        from sana_edge.training.art import scenes as art_scenes

        return World(scene_prompts.prompts, detector.judge, art_scenes.render)
    from judge import shape_prompts, shapes
    from sana_edge.training import scenes

    return World(shape_prompts.prompts, shapes.judge, scenes.render)


def code() -> str:
    """Changes when what decides a verdict does: an interrupted run then begins anew."""
    import sana_edge.evaluate
    import sana_edge.training
    from sana_edge import image_metrics

    training, judging = (Path(room.__path__[0]) for room in (sana_edge.training, sana_edge.evaluate))
    scenes = (training / f"{name}.py" for name in ("captions", "layout", "scenes"))
    art = (training / "art").glob("*.py")
    own = [*Path(__file__).parent.glob("*"), *judging.rglob("*.py"), Path(image_metrics.__file__ or "")]
    return digest([*own, *scenes, *art])


def asking(sana: Any, *, steps: int, guidance: float, seed: int) -> Source:
    """The source that asks a loaded model; seed: of prompt 0, counting up."""
    names = ("model", "dtype", "backend", "size", "steps", "guidance", "sampler", "quantization")

    def source(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
        image = sana.generate(prompt.text, steps=steps, guidance=guidance, seed=seed + number)
        how = {name: image.metadata[name] for name in names if name in image.metadata}
        return image.pixels, {**how, "seconds": sum(image.timings.values())}

    return source


def evaluate(
    place: World,
    run: str,
    sources: Mapping[str, Source],
    chosen: Mapping[int, Prompt],
    diary: Diary,
    pairs: Sequence[Pair] = (),
) -> dict[str, dict[int, Outcome]]:
    """Asks every source for the pictures that the diary does not have yet, judges and compares them.

    The sources take turns with each prompt. Returns all outcomes by source and number, in order.
    """
    done = recorded(diary, run)
    shown = on_sheet(chosen) if run == PICTURES else set()
    for number, prompt in tqdm(chosen.items(), desc=run, unit="prompt", disable=not sys.stderr.isatty()):
        if number in done:
            continue
        answers = {name: source(number, prompt) for name, source in sources.items()}
        row: dict[str, Any] = {"run": run, "number": number}
        row["models"] = {
            name: {"made": how, **Outcome(prompt, place.judge(pixels)).row()}
            for name, (pixels, how) in answers.items()
        }
        drawn = {name: pixels for name, (pixels, _) in answers.items()}
        row["likeness"] = {_key(pair): _likeness(*(drawn[name] for name in pair)) for pair in pairs}
        low = {name for pair in pairs if _is_low(pair, row, done) for name in pair}
        row["pictures"] = {name: _packed(drawn[name]) for name in (drawn if number in shown else sorted(low))}
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
    return {
        number: {name: _unpacked(text) for name, text in row["pictures"].items()}
        for number, row in recorded(diary, PICTURES).items()
        if row["pictures"]
    }


def likenesses(diary: Diary, pair: Pair, run: str = PICTURES) -> dict[int, Likeness]:
    """How near the pictures of a pair are, by number; empty where they were not compared."""
    rows, key = recorded(diary, run), _key(pair)
    return {
        number: Likeness(**row["likeness"][key]) for number, row in rows.items() if key in row["likeness"]
    }


def worst(found: Mapping[int, Likeness]) -> Sequence[int]:
    """The numbers of the lowest PSNR, lowest first."""
    return sorted(found, key=lambda number: found[number].psnr)[:WORST]


def pairs_on_sheet(diary: Diary, outcomes: Outcomes, pair: Pair, numbers: Iterable[int]) -> list[sheet.Pair]:
    """What a source drew for prompts, the second of the pair first."""
    kept, alike, (name, reference) = pictures(diary), likenesses(diary, pair), pair
    first, second = outcomes[reference], outcomes[name]
    return [
        sheet.Pair(
            first[i].prompt.text,
            (kept[i][reference], kept[i][name]),
            alike[i].text,
            (first[i].fault, second[i].fault),
        )
        for i in numbers
    ]


def made(diary: Diary, key: str, run: str = PICTURES) -> list[dict[str, Any]]:
    """How a source made each of its pictures."""
    return [row["models"][key]["made"] for row in recorded(diary, run).values()]


def making(diary: Diary, key: str) -> dict[str, Any]:
    """What the JSON says of a source: its numbers' format, and how long it took."""
    rows = made(diary, key)
    formats = {name: rows[0][name] for name in ("dtype", "quantization") if name in rows[0]}
    return {**formats, "seconds_per_picture": round(statistics.fmean(row["seconds"] for row in rows), 3)}


def _likeness(picture: Pixels, reference: Pixels) -> dict[str, float]:
    return {"psnr": psnr(picture, reference), "ssim": ssim(picture, reference)}


def _key(pair: Pair) -> str:
    return " to ".join(pair)


def _is_low(pair: Pair, row: Mapping[str, Any], done: Mapping[int, Mapping[str, Any]]) -> bool:
    """Whether the row's PSNR is one of the pair's lowest so far."""
    key = _key(pair)
    lowest = sorted(other["likeness"][key]["psnr"] for other in done.values())[:WORST]
    return len(lowest) < WORST or row["likeness"][key]["psnr"] < lowest[-1]


def _packed(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _unpacked(text: str) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def add_options(parser: argparse.ArgumentParser, threads: str) -> None:
    """How prompts are drawn; ``threads``: whose."""
    add = parser.add_argument
    add("--steps", type=positive, default=20, metavar="N", help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, default=4.5, metavar="F", help="(default: %(default)s)")
    add("--limit", type=positive, metavar="N", help="only the first N prompts of each category")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, counting up (default: 0)")
    add("--threads", type=positive, default=2, metavar="N", help=f"of {threads} (default: %(default)s)")
