"""How many held-out prompts a model gets right, in GenEval's six categories.

    python benchmarks/quality.py --steps 20 --threads 2

makes one picture for each prompt of `prompts.py`, looks at it with `judge.py`, prints a table and writes it
as JSON with every verdict, and a PNG contact sheet. Beside the score stand the judge's ceiling (true scenes
of the same prompts) and the shuffled control. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diary import Diary
from judge import judge
from numpy.typing import NDArray
from PIL import Image
from prompts import COUNTS, Prompt, prompts
from record import header, write_bytes, write_json
from scores import Outcome, categories, judgement, overall, summary, table
from sheet import sheet
from tqdm import tqdm

from sana_edge.errors import SanaError
from sana_edge.training import captions, layout, scenes

RESULTS = Path(__file__).parent / "results"
CODE = [
    *(Path(module.__file__ or "") for module in (captions, layout, scenes)),
    *(Path(__file__).with_name(f"{name}.py") for name in ("fitting", "judge", "prompts", "scores", "stamps")),
]
"""What decides a verdict: an interrupted run does not go on after a change."""
COLUMNS = 6
Pixels = NDArray[np.uint8]
Source = Callable[[int, Prompt], tuple[Pixels, dict[str, Any]]]
"""Makes the picture of a prompt, given with its number, and says how: pixels (H, H, 3) and JSON values."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    try:
        _run(options, given)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    except (SanaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, SanaError) and error.hint:
            print(f"hint:  {error.hint}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    chosen = choose(options.limit)
    with model(options) as (source, files):
        run = {
            "source": files,
            "benchmark": _digest(CODE),
            **{name: getattr(options, name) for name in ("steps", "guidance", "seed")},
        }
        with Diary(options.output, run) as diary:
            outcomes = evaluate("model", source, chosen, diary)
            ceiling = evaluate("ceiling", truth, chosen, diary)
            report(options, given, diary, outcomes, ceiling)
            diary.finish()


def report(
    options: argparse.Namespace,
    given: Sequence[str],
    diary: Diary,
    outcomes: Sequence[Outcome],
    ceiling: Sequence[Outcome],
) -> None:
    """Prints the table; writes the JSON and the contact sheet."""
    made = [row["made"] for row in diary.rows if row["run"] == "model"]
    seconds = sum(entry["seconds"] for entry in made) / len(made)
    settings = {name: value for name, value in made[0].items() if name != "seconds"}
    best = {name: round(score.share, 4) for name, score in categories(ceiling).items()}
    numbers = {**summary(outcomes), "seconds_per_picture": round(seconds, 3)}
    data = {
        **header("benchmarks/quality.py", given),
        "settings": {**settings, "seed": options.seed, "threads": options.threads},
        "ceiling": {"overall": round(overall(categories(ceiling)).share, 4), "categories": best},
        "models": {settings["model"]: numbers},
    }
    write_json(options.output, data)
    note = f"{len(outcomes)} held-out prompts, {settings['steps']} steps, guidance {settings['guidance']}"
    write_bytes(options.sheet, sheet(settings["model"], note, outcomes, _kept(diary, outcomes), COLUMNS))
    print(table(outcomes, ceiling))


def choose(limit: int | None) -> dict[int, Prompt]:
    """The prompts by number: the first `limit` of each category, or all."""
    chosen: dict[int, Prompt] = {}
    for category in COUNTS:
        members = [(i, p) for i, p in enumerate(prompts()) if p.category == category]
        chosen |= dict(members[:limit])
    return chosen


def evaluate(run: str, source: Source, chosen: dict[int, Prompt], diary: Diary) -> list[Outcome]:
    """Makes and judges the pictures that the diary does not have yet, and returns all outcomes in order."""
    done = {row["number"]: row for row in diary.rows if row["run"] == run}
    shown = on_sheet(chosen) if run == "model" else set()
    for number, prompt in tqdm(chosen.items(), desc=run, unit="picture", disable=not sys.stderr.isatty()):
        if number in done:
            continue
        pixels, made = source(number, prompt)
        row = {"run": run, "number": number, "made": made, **Outcome(prompt, judge(pixels)).row()}
        if number in shown:
            row["picture"] = _packed(pixels)
        diary.add(row)
        done[number] = row
    return [Outcome(prompt, judgement(done[number])) for number, prompt in chosen.items()]


def on_sheet(chosen: dict[int, Prompt]) -> set[int]:
    """The prompts on the contact sheet: COLUMNS of each category, evenly spread, whatever the verdict."""
    shown: set[int] = set()
    for category in COUNTS:
        numbers = [i for i, p in chosen.items() if p.category == category]
        shown |= {numbers[k * len(numbers) // COLUMNS] for k in range(COLUMNS)} if numbers else set()
    return shown


def truth(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
    """The source of the judge's ceiling: the prompt's scene as it is drawn."""
    return np.asarray(scenes.render(prompt.scene)), {}


@contextmanager
def model(options: argparse.Namespace) -> Iterator[tuple[Source, str]]:
    """The source that asks the model, and a digest of its files."""
    import torch

    from sana_edge import Sana, hub

    torch.set_num_threads(options.threads)
    folder = hub.resolve(options.model).path
    with Sana.load(options.model) as sana:

        def source(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
            image = sana.generate(
                prompt.text, steps=options.steps, guidance=options.guidance, seed=options.seed + number
            )
            names = ("model", "dtype", "size", "steps", "guidance", "sampler")
            made = {name: image.metadata[name] for name in names}
            return image.pixels, {**made, "seconds": sum(image.timings.values())}

        yield source, _digest(path for path in folder.rglob("*") if path.is_file())


def _digest(paths: Iterable[Path]) -> str:
    """Changes when a file is written again, without reading models of gigabytes."""
    known = hashlib.sha256()
    for path in sorted(paths):
        stat = path.stat()
        known.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return known.hexdigest()


def _packed(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _kept(diary: Diary, outcomes: Sequence[Outcome]) -> dict[str, Pixels]:
    """The contact sheet's pictures by the text of their prompts."""
    pictures = {}
    known = prompts()
    for row in diary.rows:
        if "picture" in row:
            data = io.BytesIO(base64.b64decode(row["picture"]))
            pictures[known[row["number"]].text] = np.asarray(Image.open(data).convert("RGB"))
    wanted = {outcome.prompt.text for outcome in outcomes}
    return {text: pixels for text, pixels in pictures.items() if text in wanted}


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality.py", description="Score a model on held-out prompts.")
    add = parser.add_argument
    add("--model", default="sana-tiny", help="bundled name, folder or repository (default: %(default)s)")
    add("--steps", type=int, default=20, metavar="N", help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, default=4.5, metavar="F", help="(default: %(default)s)")
    add("--limit", type=_positive, metavar="N", help="only the first N prompts of each category")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, counting up (default: 0)")
    add("--output", type=Path, default=RESULTS / "quality.json", metavar="PATH", help="(default: results/)")
    add("--sheet", type=Path, default=RESULTS / "quality.png", metavar="PATH", help="(default: results/)")
    add("--threads", type=_positive, default=2, metavar="N", help="of torch (default: %(default)s)")
    return parser.parse_args(given)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


if __name__ == "__main__":
    sys.exit(main())
