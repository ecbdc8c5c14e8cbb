"""How many held-out prompts a model gets right, in GenEval's six categories.

    python benchmarks/quality.py --steps 20 --threads 2
    python benchmarks/quality.py --int8

makes one picture for each prompt of `prompts.py`, looks at it with `judge.py`, prints a table and writes it
as JSON with every verdict, and a PNG contact sheet. Beside the score stand the judge's ceiling (true scenes
of the same prompts) and the shuffled control. With --int8 the model draws every prompt also in INT8, from the
same seed: the scores are tested against each other, the pictures compared, and a second sheet shows pairs.
Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paired
from diary import Diary, digest
from evaluation import (
    CEILING,
    COLUMNS,
    INT8,
    MODEL,
    PICTURES,
    Pixels,
    Source,
    asking,
    choose,
    evaluate,
    likenesses,
    made,
    making,
    on_sheet,
    pictures,
    worst,
)
from prompts import Prompt, prompts
from record import ended, header, positive, write_bytes, write_json
from scores import Outcome, categories, overall, summary, table
from sheet import AMPLIFIED, Pair, PairRow, pair_sheet, sheet

from sana_edge import image_metrics
from sana_edge.errors import InvalidInput
from sana_edge.training import captions, layout, scenes

RESULTS = Path(__file__).parent / "results"
CODE = [
    *(Path(module.__file__ or "") for module in (captions, layout, scenes, image_metrics)),
    *(
        Path(__file__).with_name(f"{name}.py")
        for name in ("evaluation", "fitting", "judge", "prompts", "scores", "stamps")
    ),
]
"""What decides a verdict and how it is written down: an interrupted run does not go on after a change."""
PAIRS = 2
"""Pairs in each row of the second sheet."""
COMPARED = (INT8, MODEL)
"""What --int8 compares."""
Outcomes = Mapping[str, Mapping[int, Outcome]]
"""By source and number of the prompt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark: 0, 1 for an error, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    options = _options(given)
    return ended(lambda: _run(options, given), "interrupted: the same command goes on from here")


def _run(options: argparse.Namespace, given: Sequence[str]) -> None:
    chosen = choose(options.limit)
    with models(options) as (sources, files):
        run = {
            "sources": [*sources, files],
            "benchmark": digest(CODE),
            **{name: getattr(options, name) for name in ("steps", "guidance", "seed", "limit")},
        }
        with Diary(options.output, run) as diary:
            outcomes = evaluate(PICTURES, sources, chosen, diary, [COMPARED] if options.int8 else [])
            (ceiling,) = evaluate(CEILING, {CEILING: truth}, chosen, diary).values()
            report(options, given, diary, outcomes, list(ceiling.values()))
            diary.finish()


def report(
    options: argparse.Namespace,
    given: Sequence[str],
    diary: Diary,
    outcomes: Outcomes,
    ceiling: Sequence[Outcome],
) -> None:
    """Prints the table; writes the JSON and the contact sheets."""
    settings = {**made(diary, MODEL)[0], "seed": options.seed, "threads": options.threads}
    settings.pop("seconds")
    names = _names(diary, outcomes)
    best = {name: round(score.share, 4) for name, score in categories(ceiling).items()}
    data = {
        **header("benchmarks/quality.py", given),
        "settings": settings,
        "ceiling": {"overall": round(overall(categories(ceiling)).share, 4), "categories": best},
        "models": {
            names[key]: {**summary(list(found.values())), **making(diary, key)}
            for key, found in outcomes.items()
        },
    }
    note = f"{len(ceiling)} held-out prompts, {settings['steps']} steps, guidance {settings['guidance']}"
    if INT8 in outcomes:
        data["paired"] = _compare(diary, outcomes, names)
        title = f"{names[MODEL]}: float, INT8, and their difference x {AMPLIFIED}"
        rows = _rows(diary, outcomes, data["paired"])
        write_bytes(second_sheet(options), pair_sheet(title, note, rows))
    write_json(options.output, data)
    write_bytes(options.sheet, sheet(names[MODEL], note, *_shown(diary, outcomes[MODEL]), COLUMNS))
    print(_printed(outcomes, ceiling, data.get("paired")))


def second_sheet(options: argparse.Namespace) -> Path:
    """The PNG of pairs: `quality-int8.png` beside `quality.png`."""
    path: Path = options.sheet
    return path.with_name(f"{path.stem}-int8{path.suffix}")


def truth(number: int, prompt: Prompt) -> tuple[Pixels, dict[str, Any]]:
    """The source of the judge's ceiling: the prompt's scene as it is drawn."""
    return np.asarray(scenes.render(prompt.scene)), {}


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
            key: stack.enter_context(Sana.load(options.model, int8=int8)) for key, int8 in wanted.items()
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
    alike = {prompts()[number].text: like for number, like in likenesses(diary, COMPARED).items()}
    return {
        "float": names[MODEL],
        "int8": names[INT8],
        **paired.facts(first, second),
        **paired.likeness_facts(alike),
    }


def _rows(diary: Diary, outcomes: Outcomes, compared: Mapping[str, Any]) -> list[PairRow]:
    """The second sheet: pairs of every category, whatever the verdict, and those of the lowest PSNR."""
    kept, alike = pictures(diary), likenesses(diary, COMPARED)
    first, second = outcomes[MODEL], outcomes[INT8]

    def pairs(numbers: Iterable[int]) -> list[Pair]:
        return [Pair(first[i], second[i], (kept[i][MODEL], kept[i][INT8]), alike[i].text) for i in numbers]

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


def _printed(outcomes: Outcomes, ceiling: Sequence[Outcome], compared: Mapping[str, Any] | None) -> str:
    if compared is None:
        return table(list(outcomes[MODEL].values()), ceiling)
    both = (list(outcomes[key].values()) for key in (MODEL, INT8))
    return "\n".join(
        [paired.table(*both, ceiling), "", paired.verdict(compared), paired.likeness_text(compared)]
    )


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="quality.py", description="Score a model on held-out prompts.")
    add = parser.add_argument
    add("--model", default="sana-tiny", help="bundled name, folder or repository (default: %(default)s)")
    add("--int8", action="store_true", help="the same prompts in INT8 too, and what differs")
    add("--steps", type=int, default=20, metavar="N", help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, default=4.5, metavar="F", help="(default: %(default)s)")
    add("--limit", type=positive, metavar="N", help="only the first N prompts of each category")
    add("--seed", type=int, default=0, metavar="N", help="of the first prompt, counting up (default: 0)")
    add("--output", type=Path, default=RESULTS / "quality.json", metavar="PATH", help="(default: results/)")
    add(
        "--sheet",
        type=Path,
        default=RESULTS / "quality.png",
        metavar="PATH",
        help="of --int8's pairs: PATH with -int8 before its suffix (default: results/quality.png)",
    )
    add("--threads", type=positive, default=2, metavar="N", help="of torch (default: %(default)s)")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
