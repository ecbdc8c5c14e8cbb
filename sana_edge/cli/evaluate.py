"""``sana-edge evaluate``: its options, its progress and what it prints."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sana_edge
from sana_edge.cli.arguments import add_load_options, add_revision, new_file, size
from sana_edge.cli.fastest import fastest
from sana_edge.errors import InvalidInput
from sana_edge.progress import Progress, bar
from sana_edge.request.loading import LoadOptions
from sana_edge.request.request import SAMPLERS, Request
from sana_edge.system.threads import check_threads

if TYPE_CHECKING:
    from sana_edge.evaluate.metrics import MetricOptions
    from sana_edge.evaluate.pictures import Source
    from sana_edge.evaluate.prompts import PromptSet
    from sana_edge.pipeline import Sana

HELP = "measure a model's pictures, and what INT8 or another model costs"

_DRAWING = ("seed", "steps", "guidance", "size", "sampler")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a name from `models list`, a folder, also an exported one, or a repository",
    )
    add("--against", metavar="MODEL2", help="compare with this model (default: none, or INT8 by --int8)")
    sets = (
        "text with one prompt a line, JSON, CSV or TSV; geneval, its 553; sana-tiny, 553 not in its training"
    )
    add("--prompts", required=True, metavar="FILE|geneval|sana-tiny", help=sets)
    add("--limit", type=int, metavar="N", help="only N prompts, of each category alike (default: all)")
    _add_metric_options(parser)
    add("--steps", type=int, metavar="N", help="denoising steps (default: 20, or 2 for Sprint models)")
    add("--guidance", type=float, metavar="F", help="how strictly to follow the prompt (default: 4.5)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first prompt, counting up (default: %(default)s)",
    )
    add("--size", type=size, metavar="WxH", help="in pixels (default: the model's native size)")
    add("--sampler", choices=SAMPLERS, help="(default: what the model was made for)")
    add_load_options(parser, int8="draw every prompt in INT8 too, from the same seed, and compare")
    place = "the folder of the pictures and results; what is there is not drawn again"
    add("--output", type=Path, metavar="DIR", help=f"{place} (default: MODEL-evaluation)")
    add("--json", type=new_file, metavar="FILE", help="write the results there as well")
    add("--force", action="store_true", help="draw anew what an evaluation left in DIR")
    add("--offline", action="store_true", help="never use the network")
    add_revision(parser)


def _add_metric_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    names = "judge (of sana-tiny's prompts), clip, imagereward, fid, psnr, with commas between them"
    suit = "all that suit, imagereward with --imagereward-python"
    add("--metrics", metavar="NAMES", help=f"{names} (default: {suit})")
    clip = "a CLIP's folder, or a repository, which is downloaded (default: the usual one where it is cached)"
    add("--clip", metavar="NAME|DIR", help=clip)
    add("--reference", type=Path, metavar="DIR", help="pictures that FID compares with (default: no FID)")
    inception = "the weights of FID's network (default: where torch keeps downloads)"
    add("--inception", type=Path, metavar="FILE", help=inception)
    python = "of an environment with image-reward (default: this one)"
    add("--imagereward-python", metavar="PYTHON", help=python)


def run(arguments: argparse.Namespace) -> None:
    """Print the tables and, last, what it cost in a sentence."""
    options = {name: getattr(arguments, name) for name in _DRAWING}
    # what is wrong shows here, before anything is loaded
    prompts = _prompts(arguments)
    _check(options, len(prompts.texts), arguments.limit)
    check_threads(arguments.threads)
    chosen = _metric_options(arguments)

    from sana_edge.evaluate.draw import sources
    from sana_edge.evaluate.run import Evaluation
    from sana_edge.system.atomic import check_writable, write_json

    if arguments.json is not None:
        check_writable(arguments.json)
    found = sources(
        arguments.model,
        int8=bool(arguments.int8),
        against=arguments.against,
        offline=arguments.offline,
        revision=arguments.revision,
        progress=not arguments.quiet,
    )
    evaluation = Evaluation(
        prompts,
        found,
        arguments.output or Path(f"{found[0].label}-evaluation"),
        {**options, "size": list(arguments.size) if arguments.size else None},
        {name: getattr(arguments, name) for name in ("dtype", "backend", "device")},
        chosen,
        arguments.limit,
        arguments.force,
    )
    say = _say(arguments.quiet)
    for note in prompts.notes:
        say(note)
    try:
        with bar(arguments.quiet, "picture") as progress:
            report = evaluation.run(_loader(arguments, say, progress), tell=progress, say=say)
    except KeyboardInterrupt:
        say("what is drawn is kept: the same command goes on from there")
        raise
    print(report.text())
    if arguments.json is not None:
        write_json(arguments.json, evaluation.facts(report))
    say(f"pictures and results: {evaluation.folder}")


def _prompts(arguments: argparse.Namespace) -> PromptSet:
    from sana_edge.evaluate.prompts import SETS, PromptSet, named

    given: str = arguments.prompts
    if given.lower() in SETS:
        return named(given.lower())
    from sana_edge.calib.prompts import bundled_sets, load_prompts
    from sana_edge.evaluate import prompt_files

    if given.lower().endswith(prompt_files.KINDS):
        return prompt_files.read(Path(os.path.expanduser(given)))
    if given not in bundled_sets() and not os.path.lexists(os.path.expanduser(given)):
        close = difflib.get_close_matches(given.lower(), SETS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise InvalidInput(f"no prompt file {given}", f"{meant}give a file of prompts, {' or '.join(SETS)}")
    found = load_prompts(given)
    return PromptSet(found.name, found.prompts, notes=found.notes)


def _check(options: dict[str, Any], count: int, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise InvalidInput(f"limit is {limit}", "choose 1 or more, or leave it out for all prompts")
    # of the last prompt
    seed = options["seed"] + (count - 1 if options["seed"] >= 0 else 0)
    Request("a prompt", **{**options, "seed": seed})


def _metric_options(arguments: argparse.Namespace) -> MetricOptions:
    from sana_edge.evaluate.metrics import MetricOptions, parse_metrics

    return MetricOptions(
        metrics=None if arguments.metrics is None else parse_metrics(arguments.metrics),
        clip=arguments.clip,
        reference=arguments.reference,
        inception=arguments.inception,
        python=arguments.imagereward_python,
        offline=arguments.offline,
        progress=not arguments.quiet,
    )


def _loader(
    arguments: argparse.Namespace, say: Callable[[str], None], progress: Progress
) -> Callable[[Source], Sana]:
    """Loads as `generate` does, so that the same pictures are judged."""
    names = {field.name for field in dataclasses.fields(LoadOptions)}
    options = {name: value for name, value in vars(arguments).items() if name in names and value is not None}

    def load(source: Source) -> Sana:
        chosen: dict[str, Any] = {**options, "int8": source.int8, "progress": not arguments.quiet}
        # hundreds of prompts, once each
        chosen["prompt_cache"] = False
        model = fastest(source.model, LoadOptions(**chosen), say, progress)
        return sana_edge.Sana.load(model, **chosen)

    return load


def _say(quiet: bool) -> Callable[[str], None]:
    def say(line: str) -> None:
        if not quiet:
            from tqdm import tqdm

            tqdm.write(f"note:  {line}", file=sys.stderr)

    return say
