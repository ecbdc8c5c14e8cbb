"""How many held-out prompts a model gets right, in GenEval's six categories.

    python benchmarks/quality.py --steps 20 --threads 2
    python benchmarks/quality.py --int8
    python benchmarks/quality.py --model runs/model --clip runs/clip-model
    python benchmarks/quality.py --world shapes --model runs/shapes

makes one picture for each prompt of a world, looks at it with the world's judge, prints a table and writes it
as JSON with every verdict, and a PNG contact sheet. Beside the score stand the judge's ceiling (true scenes
of the same prompts) and the shuffled control; with --clip the mean CLIP score of pictures and prompts. With
--int8 the model draws every prompt also in INT8, from the same seed: the scores are tested against each
other, the pictures compared, and a second sheet shows pairs. With --judge-only nothing is drawn: the judge
alone is measured, on the true scenes and on blurred ones. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import RESULTS, needs

needs("torch", "transformers", "tqdm")

import numpy as np
from PIL import Image

from harness import quality_tables
from harness.results import Diary, ended
from judge.evaluation import (
    CEILING,
    COLUMNS,
    INT8,
    MODEL,
    PICTURES,
    Outcomes,
    Pixels,
    Source,
    World,
    add_options,
    asking,
    code,
    evaluate,
    likenesses,
    made,
    making,
    on_sheet,
    pairs_on_sheet,
    pictures,
    world,
    worst,
)
from sana_edge.bench.results import digest, header, write_json
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.evaluate import paired
from sana_edge.evaluate.judge.prompts import Prompt
from sana_edge.evaluate.judge.scores import Outcome, Score, categories, overall, summary
from sana_edge.evaluate.sheet import AMPLIFIED, Pair, PairRow, pair_sheet, sheet
from sana_edge.system.atomic import write_bytes

PAIRS = 2
"""Pairs in each row of the second sheet."""
COMPARED = (INT8, MODEL)
"""What --int8 compares."""
BLUR = 4
"""A blurred scene has this share of the sharpness, as a young autoencoder would show it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    run = _judge_only if options.judge_only else _run
    return ended(lambda: run(options, given), "interrupted: the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    place = world(options.world)
    chosen = place.choose(options.limit)
    with models(options) as (sources, files):
        run = {
            "sources": [*sources, files],
            "benchmark": code(),
            **{name: getattr(options, name) for name in ("steps", "guidance", "seed", "limit", "world")},
            "clip": str(options.clip),
        }
        truth = {CEILING: place.truth}
        if options.clip:
            sources, truth = (_scored(found, options.clip) for found in (sources, truth))
        with Diary(options.output, run) as diary:
            compared = [COMPARED] if options.int8 else []
            outcomes = evaluate(place, PICTURES, sources, chosen, diary, compared)
            best = evaluate(place, CEILING, truth, chosen, diary) if _drawable(place, chosen) else {}
            report(options, given, diary, outcomes, [*best.get(CEILING, {}).values()])
            diary.finish()


def _judge_only(options: argparse.Namespace, given: Sequence[str]) -> None:
    """How many true scenes the judge finds right."""
    place = world(options.world)
    sources = {"true scenes": place.truth, "true scenes, blurred": _blurred(place)}
    run = {"sources": [*sources], "benchmark": code(), "limit": options.limit, "world": options.world}
    with Diary(options.output, run) as diary:
        outcomes = evaluate(place, CEILING, sources, place.choose(options.limit), diary)
        found = {name: summary(list(of.values())) for name, of in outcomes.items()}
        write_json(options.output, {**header("benchmarks/quality.py", given), **found})
        diary.finish()
    for name, numbers in found.items():
        scores = {**numbers["categories"], "overall": numbers["overall"]}
        print(f"{name}:", ", ".join(f"{title} {score['score']:.3f}" for title, score in scores.items()))


def _drawable(place: World, chosen: Mapping[int, Prompt]) -> bool:
    """Whether true scenes can be drawn: sana-tiny's need the art."""
    try:
        place.render(next(iter(chosen.values())).scene)
    except SanaError as error:
        print(f"no ceiling of the judge: {error.message}", file=sys.stderr)
        return False
    return True


def _blurred(place: World) -> Source:
    def source(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
        image = place.render(prompt.scene)
        small = image.resize((image.width // BLUR, image.height // BLUR), Image.Resampling.BOX)
        return np.asarray(small.resize(image.size, Image.Resampling.BILINEAR)), {}

    return source


def _scored(sources: Mapping[str, Source], folder: Path) -> dict[str, Source]:
    """Each also says 100 cos of its picture and the prompt, by a CLIP."""
    from sana_edge.training.score import Scorer

    scorer = Scorer(folder, device="cpu")

    def scored(source: Source) -> Source:
        def call(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
            pixels, how = source(number, prompt)
            return pixels, {**how, "clip": scorer.score([Image.fromarray(pixels)], [[prompt.text]])[0][0]}

        return call

    return {name: scored(source) for name, source in sources.items()}


def report(
    options: argparse.Namespace,
    given: Sequence[str],
    diary: Diary,
    outcomes: Outcomes,
    ceiling: Sequence[Outcome],
) -> None:
    """Prints the table; writes the JSON and the contact sheets."""
    settings = {**made(diary, MODEL)[0], "seed": options.seed, "threads": options.threads}
    settings = {name: value for name, value in settings.items() if name not in ("seconds", "clip")}
    names = _names(diary, outcomes)
    best = categories(ceiling)
    data = {
        **header("benchmarks/quality.py", given),
        "settings": settings,
        "ceiling": _ceiling(best) if best else None,
        "models": {
            names[key]: {**summary(list(found.values())), **making(diary, key)}
            for key, found in outcomes.items()
        },
    }
    if options.clip:
        clip = {names[key]: made(diary, key) for key in outcomes}
        clip |= {CEILING: made(diary, CEILING, CEILING)} if best else {}
        data["clip"] = {name: round(fmean(how["clip"] for how in of), 3) for name, of in clip.items()}
        print("CLIP score:", ", ".join(f"{name} {value:.2f}" for name, value in data["clip"].items()))
    note = (
        f"{len(outcomes[MODEL])} held-out prompts, {settings['steps']} steps, guidance {settings['guidance']}"
    )
    if INT8 in outcomes:
        data["paired"] = _compare(diary, outcomes, names)
        title = f"{names[MODEL]}: float, INT8, and their difference x {AMPLIFIED}"
        rows = _rows(diary, outcomes, data["paired"])
        write_bytes(second_sheet(options), pair_sheet(title, note, rows))
    write_json(options.output, data)
    write_bytes(options.sheet, sheet(names[MODEL], note, *_shown(diary, outcomes[MODEL]), COLUMNS))
    print(quality_tables.quality(data).text())


def _ceiling(best: Mapping[str, Score]) -> dict[str, Any]:
    shares = {name: round(score.share, 4) for name, score in best.items()}
    return {"overall": round(overall(best).share, 4), "categories": shares}


def second_sheet(options: argparse.Namespace) -> Path:
    """The PNG of pairs: `quality-int8.png` beside `quality.png`."""
    path: Path = options.sheet
    return path.with_name(f"{path.stem}-int8{path.suffix}")


@contextmanager
def models(options: argparse.Namespace) -> Iterator[tuple[dict[str, Source], str]]:
    """The sources that ask the model, in INT8 too where the options say so, and a digest of their files."""
    import torch

    from sana_edge import Sana
    from sana_edge.store import hub
    from sana_edge.store.package import is_package

    torch.set_num_threads(options.threads)
    wanted = {MODEL: False, INT8: True} if options.int8 else {MODEL: False}
    folders = {key: hub.resolve(options.model, int8=int8).path for key, int8 in wanted.items()}
    if options.int8 and is_package(folders[MODEL]):
        raise InvalidInput(f"{options.model} is INT8 already", "give the float model: it is asked in both")
    with ExitStack() as stack:
        loaded = {
            key: stack.enter_context(Sana.load(options.model, int8=int8, prompt_cache=False))
            for key, int8 in wanted.items()
        }
        how = {name: getattr(options, name) for name in ("steps", "guidance", "seed")}
        sources = {key: asking(sana, **how) for key, sana in loaded.items()}
        yield sources, digest(path for folder in folders.values() for path in folder.rglob("*"))


def _names(diary: Diary, keys: Iterable[str]) -> dict[str, str]:
    """What the results call each source."""
    names = {key: str(made(diary, key)[0]["model"]) for key in keys}
    if names.get(INT8) == names[MODEL]:
        names[INT8] += "-int8"
    return names


def _compare(diary: Diary, outcomes: Outcomes, names: Mapping[str, str]) -> dict[str, Any]:
    """What the JSON says of the pairs."""
    first, second = (list(outcomes[key].values()) for key in (MODEL, INT8))
    prompts = {number: outcome.prompt.text for number, outcome in outcomes[MODEL].items()}
    alike = {prompts[number]: like for number, like in likenesses(diary, COMPARED).items()}
    return {
        "float": names[MODEL],
        "int8": names[INT8],
        **paired.facts(first, second),
        **paired.likeness_facts(alike),
    }


def _rows(diary: Diary, outcomes: Outcomes, compared: Mapping[str, Any]) -> list[PairRow]:
    """The second sheet: pairs of every category, whatever the verdict, and those of the lowest PSNR."""
    alike, first = likenesses(diary, COMPARED), outcomes[MODEL]

    def pairs(numbers: Iterable[int]) -> list[Pair]:
        return pairs_on_sheet(diary, outcomes, COMPARED, numbers)

    rows = []
    for name, found in compared["categories"].items():
        members = {i: outcome.prompt for i, outcome in first.items() if outcome.prompt.category == name}
        remark = f"{found['only_float']} right only as float, {found['only_int8']} only as INT8"
        rows.append(PairRow(name, f"{remark}, of {len(members)}", pairs(sorted(on_sheet(members, PAIRS)))))
    remark = f"mean {compared['psnr']['mean']} dB, median {compared['psnr']['median']} dB"
    return [*rows, PairRow(f"worst PSNR of all {len(alike)}", remark, pairs(worst(alike)))]


def _shown(diary: Diary, outcomes: Mapping[int, Outcome]) -> tuple[list[Outcome], dict[str, Pixels]]:
    """All outcomes, and the contact sheet's pictures by the text of their prompts."""
    kept = pictures(diary)
    numbers = on_sheet({i: outcome.prompt for i, outcome in outcomes.items()})
    return list(outcomes.values()), {outcomes[i].prompt.text: kept[i][MODEL] for i in numbers}


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality.py", description="Score a model on held-out prompts.")
    add = parser.add_argument
    add("--world", choices=("shapes", "art"), default="art", help="whose prompts (default: %(default)s)")
    add("--model", default="sana-tiny", help="bundled name, folder or repository (default: %(default)s)")
    add("--int8", action="store_true", help="the same prompts in INT8 too, and what differs")
    add("--clip", type=Path, metavar="DIR", help="folder of a CLIP, for the mean of its scores")
    add("--judge-only", action="store_true", help="measure the judge alone")
    add("--output", type=Path, metavar="PATH", help="(default: results/quality.json, quality-shapes.json)")
    pairs = "of --int8's pairs: PATH with -int8 before its suffix (default: beside the output)"
    add("--sheet", type=Path, metavar="PATH", help=pairs)
    add_options(parser, "torch")
    options = parser.parse_args(given)
    name = "quality" if options.world == "art" else f"quality-{options.world}"
    options.output = options.output or RESULTS / f"{name}.json"
    options.sheet = options.sheet or options.output.with_suffix(".png")
    return options


if __name__ == "__main__":
    sys.exit(main())
