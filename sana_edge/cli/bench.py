"""``sana-edge bench``: its options, its progress and what it writes."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from sana_edge.cli.arguments import new_file, size
from sana_edge.errors import InvalidInput, SanaError
from sana_edge.progress import bar
from sana_edge.system.atomic import check_writable

HELP = "measure float against INT8 on each backend that runs here"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add = parser.add_argument
    models = "names or folders, float, INT8 or exported; forms that are missing are made (default: sana-tiny)"
    add("models", nargs="*", metavar="MODEL", help=models)
    sizes = "in pixels, one number for a square (default: the model's native size)"
    add("--size", nargs="+", type=side, metavar="WxH", action="extend", help=sizes)
    add("--steps", type=int, metavar="N", help="denoising steps (default: 20, or 2 for Sprint models)")
    backends = (
        "of all, torch, onnxruntime, openvino, tensorrt, with commas (default: %(default)s that run here)"
    )
    add("--backends", default="all", metavar="A,B", help=backends)
    add("--against", choices=("diffusers",), help="also diffusers, on the same weights and noise")
    shapes = "instead of a model, or beside it: 0.6b, 1.6b, sprint, sprint-1.6b; several with commas"
    add("--random-weights", metavar="SHAPES", help=f"{shapes}. Nothing is downloaded")
    add("--json", type=new_file, metavar="FILE", help="write all numbers")
    add("--html", type=new_file, metavar="FILE", help="write a page with plots, in one file")
    add("--repeat", type=int, default=3, metavar="N", help="turns of all contenders (default: %(default)s)")
    counted = "that compute on a CPU (default: OMP_NUM_THREADS or the cores, within a container's quota)"
    add("--threads", type=int, metavar="N", help=counted)
    place = "where forms of models that are missing are made and kept (default: bench in the user's cache)"
    add("--scratch", type=Path, metavar="DIR", help=place)
    add("--worker", metavar="ORDER", help=argparse.SUPPRESS)


def side(text: str) -> tuple[int, int]:
    """`size` of several, after which a model would be taken for one."""
    try:
        return size(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; models stand before it") from None


def run(arguments: argparse.Namespace) -> None:
    """Measure; print tables and the sentence, and write what was asked for after each process."""
    if arguments.worker is not None:
        from sana_edge.bench import worker

        worker.main(arguments.worker)
        return
    from sana_edge.bench.measure import Asked
    from sana_edge.bench.session import Session

    _check(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        asked = Asked(
            backends=_words(arguments.backends),
            sizes=arguments.size or [None],
            steps=arguments.steps,
            repeat=arguments.repeat,
            threads=arguments.threads,
            against=arguments.against,
        )
        session = Session.prepare(
            arguments.models,
            _words(arguments.random_weights or ""),
            asked,
            scratch=arguments.scratch or _scratch(Path(temporary)),
            arguments=arguments.words,
            progress=not arguments.quiet,
        )
        interrupted = False
        try:
            with bar(arguments.quiet, "run") as progress:
                session.measure(progress, arguments.json, arguments.html)
        except KeyboardInterrupt:
            interrupted = True
        except SanaError:
            # what was measured is not lost with the file that could not be written
            print(session.text())
            raise
        # once more, with what the end knows
        session.write(arguments.json, arguments.html, ended=not interrupted)
        print(session.text())
        kept = session.kept()
        if kept and not arguments.quiet:
            print(f"note:  {kept}", file=sys.stderr)
    if interrupted:
        raise KeyboardInterrupt
    session.check()


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _check(arguments: argparse.Namespace) -> None:
    """See what is wrong before anything is loaded."""
    from sana_edge.system.threads import check_threads

    check_threads(arguments.threads)
    if not 1 <= arguments.repeat <= 1000:
        raise InvalidInput(f"repeat is {arguments.repeat}", "choose a whole number from 1 to 1000")
    if arguments.json is not None and arguments.json == arguments.html:
        raise InvalidInput(f"--json and --html are one file, {arguments.json}", "give each its own")
    for path in (arguments.json, arguments.html):
        if path is not None:
            # folders above are made with the first of it that is written
            there = next(folder for folder in path.absolute().parents if folder.exists())
            check_writable(path if os.path.isdir(path) else there / path.name)
    if not _words(arguments.backends):
        raise InvalidInput("no backends", "leave out --backends for all that run here")


def _scratch(temporary: Path) -> Path:
    """A folder that stays, where the user has a home."""
    from sana_edge.store.cache import user_cache

    cache = user_cache()
    return temporary if cache is None else cache / "bench"
