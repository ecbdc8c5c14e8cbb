"""How many held-out prompts of the art's world a model gets right, in GenEval's six categories.

    python benchmarks/art_quality.py --model runs/model --clip runs/clip-model

makes one picture for each prompt of `art_prompts.py`, looks at it with `art_judge.py`, prints a table and
writes it as JSON with every verdict, and a contact sheet. Beside the score stand the judge's ceiling (true
scenes of the same prompts) and the shuffled control; with --clip the mean CLIP score of pictures and prompts.
With --judge-only it draws nothing and measures the judge alone, on all those true scenes and on blurred ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from art_judge import judge
from art_prompts import COUNTS, prompts
from numpy.typing import NDArray
from PIL import Image
from prompts import Prompt
from record import ended, header, positive, write_bytes, write_json
from scores import Outcome, categories, overall, summary, table
from sheet import sheet
from tqdm import tqdm

from sana_edge.training.art.scenes import render

RESULTS = Path(__file__).parent / "results"
COLUMNS = 6
BLUR = 4
Pixels = NDArray[np.uint8]


def chosen(limit: int | None) -> dict[int, Prompt]:
    """The prompts by number: the first `limit` of each category, or all."""
    found: dict[int, Prompt] = {}
    for category in COUNTS:
        found |= dict([(i, p) for i, p in enumerate(prompts()) if p.category == category][:limit])
    return found


def truths(numbers: Mapping[int, Prompt]) -> Iterator[Pixels]:
    """The prompts' scenes as they are drawn: what the judge's ceiling is."""
    for prompt in numbers.values():
        yield np.asarray(render(prompt.scene))  # type: ignore[arg-type]  # the art's own scenes


def drawn(options: argparse.Namespace, numbers: Mapping[int, Prompt]) -> Iterator[Pixels]:
    """What the model makes of each prompt, seeds counting up."""
    import torch

    from sana_edge import Sana

    torch.set_num_threads(options.threads)
    with Sana.load(options.model, int8=options.int8) as sana:
        for number, prompt in numbers.items():
            how = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed + number}
            yield sana.generate(prompt.text, **how).pixels


def judged(pictures: Iterator[Pixels], numbers: Mapping[int, Prompt]) -> tuple[list[Outcome], list[Pixels]]:
    """Every prompt's outcome and picture."""
    outcomes, kept = [], []
    shown = tqdm(numbers.values(), unit="prompt", disable=not sys.stderr.isatty())
    for prompt, pixels in zip(shown, pictures, strict=True):
        outcomes.append(Outcome(prompt, judge(pixels)))
        kept.append(pixels)
    return outcomes, kept


def clip_score(folder: Path, pictures: Sequence[Pixels], texts: Sequence[str]) -> float:
    """The mean of 100 cos of each picture and its prompt."""
    from sana_edge.training.score import Scorer

    scorer = Scorer(folder, device="cpu")
    found = [
        scorer.score([Image.fromarray(pixels)], [[text]])[0][0]
        for pixels, text in zip(pictures, texts, strict=True)
    ]
    return fmean(found)


def blurred(numbers: Mapping[int, Prompt]) -> Iterator[Pixels]:
    """The true scenes at a quarter of their sharpness, as a young autoencoder would show them."""
    for pixels in truths(numbers):
        image = Image.fromarray(pixels)
        small = image.resize((image.width // BLUR, image.height // BLUR), Image.Resampling.BOX)
        yield np.asarray(small.resize(image.size, Image.Resampling.BILINEAR))


def measure_judge(options: argparse.Namespace, given: Sequence[str]) -> None:
    """How many true scenes the judge finds right."""
    numbers = chosen(options.limit)
    sets = {"true scenes": truths(numbers), "true scenes, blurred": blurred(numbers)}
    found = {name: judged(pictures, numbers)[0] for name, pictures in sets.items()}
    data = {**header("benchmarks/art_quality.py", given), **{n: summary(o) for n, o in found.items()}}
    write_json(options.output, data)
    for name, outcomes in found.items():
        print(f"{name}\n{table(outcomes, outcomes)}")


def run(options: argparse.Namespace, given: Sequence[str]) -> None:
    """Makes, judges, prints and writes."""
    if options.judge_only:
        return measure_judge(options, given)
    numbers = chosen(options.limit)
    ceiling, true_pictures = judged(truths(numbers), numbers)
    outcomes, pictures = judged(drawn(options, numbers), numbers)
    data: dict[str, Any] = {
        **header("benchmarks/art_quality.py", given),
        "settings": {n: getattr(options, n) for n in ("steps", "guidance", "seed", "int8", "threads")},
        "ceiling": summary(ceiling),
        "model": summary(outcomes),
    }
    if options.clip:
        texts = [prompt.text for prompt in numbers.values()]
        sets = {"model": pictures, "true scenes": true_pictures}
        data["clip"] = {n: round(clip_score(options.clip, found, texts), 3) for n, found in sets.items()}
        print("CLIP score:", ", ".join(f"{name} {value:.2f}" for name, value in data["clip"].items()))
    write_json(options.output, data)
    print(table(outcomes, ceiling))
    shown = {}
    for category in categories(outcomes):
        rows = [i for i, outcome in enumerate(outcomes) if outcome.prompt.category == category]
        for k in range(min(COLUMNS, len(rows))):
            number = rows[k * len(rows) // min(COLUMNS, len(rows))]
            shown[outcomes[number].prompt.text] = pictures[number]
    note = f"{len(outcomes)} held-out prompts, {options.steps} steps, guidance {options.guidance}"
    write_bytes(options.sheet, sheet(Path(options.model).name, note, outcomes, shown, COLUMNS))
    print(f"overall {overall(categories(outcomes)).share:.3f}: {options.output}, {options.sheet}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="art_quality.py", description="Score a model on held-out prompts.")
    add = parser.add_argument
    add("--model", default="runs/model", help="bundled name or folder (default: %(default)s)")
    add("--int8", action="store_true")
    add("--judge-only", action="store_true", help="measure the judge alone")
    add("--clip", type=Path, metavar="DIR", help="folder of a CLIP, for the mean score of its own")
    add("--steps", type=positive, default=20, metavar="N")
    add("--guidance", type=float, default=4.5, metavar="F")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, counting up")
    add("--limit", type=positive, metavar="N", help="only the first N prompts of each category")
    add("--output", type=Path, default=RESULTS / "art_quality.json", metavar="PATH")
    add("--sheet", type=Path, default=RESULTS / "art_quality.png", metavar="PATH")
    add("--threads", type=positive, default=2, metavar="N", help="of torch")
    options = parser.parse_args(given)
    return ended(lambda: run(options, given))


if __name__ == "__main__":
    sys.exit(main())
