"""``sana-edge generate --prompts``: a file of prompts, and how far it is, for people and for programs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from sana_edge.cli.output import NAME
from sana_edge.errors import InvalidInput
from sana_edge.progress import INTERVAL
from sana_edge.request.loading import LoadOptions
from sana_edge.series.entries import MOST, read_content, read_file
from sana_edge.series.painter import Local, Painter, check_batch
from sana_edge.series.pictures import NAME as NAMES
from sana_edge.series.pictures import Settings
from sana_edge.series.series import Drawn, Series


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what many pictures take beside the options of one, which hold for each."""
    add = parser.add_argument_group("many pictures").add_argument
    kinds = "one prompt a line (.txt, or - for stdin), objects of options (.jsonl) or a table with a header"
    goes = "(.csv), drawn into the folder --output; resumed if it was stopped (default: a single prompt)"
    add("--prompts", metavar="FILE", help=f"{kinds} {goes}")
    names = "of the files: {index}, {seed}, {line} and {prompt} are filled in"
    add("--name", default=NAMES, metavar="NAME", help=f"{names} (default: %(default)s)")
    wild = "where __animal__ in a prompt finds animal.txt (default: nowhere)"
    add("--wildcards", type=Path, metavar="DIR", help=wild)
    every = "draw each of {red|blue} and __animal__, and not a random one by the picture's seed"
    add("--combinations", action="store_true", help=every)
    # what lines may call it
    add("--count", type=int, dest="images", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--literal", action="store_true", help="braces and __names__ in prompts are text")
    add("--skip-bad", action="store_true", help="pass over bad lines, and not refuse the file")
    retries = "draw what failed again at the end, so often (default: %(default)s)"
    add("--retries", type=int, default=0, metavar="N", help=retries)
    batch = "pictures that go through the denoiser at once, or auto for the fastest here; more than 1"
    more = "change pixels by roundings (default: %(default)s)"
    add("--batch", type=_batch, default=1, metavar="N|auto", help=f"{batch} {more}")
    ray = "on the workers of a Ray cluster: its address, auto for the one that is running, or local for one"
    alone = "that is started; without it this process draws"
    add("--ray", nargs="?", const="auto", metavar="ADDRESS", help=f"{ray} {alone}")
    workers = "of --ray (default: one for each GPU, or one)"
    add("--workers", type=int, metavar="N", help=workers)


def _batch(text: str) -> int | None:
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of pictures, nor auto")
    return None if text == "auto" else int(text)


def run(
    arguments: argparse.Namespace,
    options: dict[str, Any],
    load: Callable[[], AbstractContextManager[Any]],
    load_options: LoadOptions,
    fastest: Callable[[], str],
) -> None:
    """Draw a file of prompts.

    Args:
        options: of each picture, for what its line leaves open.
        load: loads the model here.
        load_options, fastest: how workers on this machine do, and what.

    Raises:
        SanaError: a line is bad, the folder is not to be drawn into, or pictures have failed.
    """
    _check(arguments)
    settings = Settings(
        options=options,
        images=arguments.images,
        combinations=arguments.combinations,
        literal=arguments.literal,
        wildcards=arguments.wildcards,
        name=arguments.name,
        quality=arguments.quality,
        folder=Path() if arguments.prompts == "-" else Path(arguments.prompts).parent,
    )
    series = Series(
        _lines(arguments.prompts),
        Path(arguments.output),
        settings,
        seed=arguments.seed,
        skip_bad=arguments.skip_bad,
    )
    with series:
        for bad in series.bad:
            note(arguments, f"passed over {bad}")
        with _painter(arguments, load, load_options, fastest) as painter, _Shown(arguments, series) as shown:
            drawing = series.draw(
                painter, force=arguments.force, retries=arguments.retries, on_progress=shown.step
            )
            for drawn in drawing:
                shown.picture(drawn)
        if (failures := series.failures) is not None:
            raise failures


def check_single(arguments: argparse.Namespace) -> None:
    """Refuse what only `run` obeys."""
    names = ("name", "wildcards", "combinations", "literal", "skip_bad", "retries", "batch", "ray", "workers")
    for name in names:
        if getattr(arguments, name) != arguments.parser.get_default(name):
            arguments.parser.error(f"--{name.replace('_', '-')} is for --prompts")


def _check(arguments: argparse.Namespace) -> None:
    # that of --from is nobody's
    if arguments.text is not None or (arguments.prompt is not None and arguments.made is None):
        arguments.parser.error("there are a prompt and --prompts: give either")
    if arguments.output in (NAME, "-"):
        arguments.parser.error("--prompts needs --output, the folder of the pictures")
    if arguments.variations is not None:
        found = "--variations are of one picture, and there are --prompts"
        raise InvalidInput(found, "give --images, or a line's own variation")
    if arguments.workers is not None and (arguments.ray is None or arguments.workers < 1):
        found = f"--workers is {arguments.workers}"
        raise InvalidInput(found, "choose a number from 1, with --ray local, auto or an address")
    if not 0 <= arguments.retries <= 100:
        raise InvalidInput(f"--retries is {arguments.retries}", "choose a number from 0 to 100")
    check_batch(arguments.batch)


def _lines(prompts: str) -> Iterator[Any]:
    if prompts != "-":
        return read_file(Path(prompts))
    content = sys.stdin.buffer.read(MOST + 1)
    if len(content) > MOST:
        raise InvalidInput(f"stdin has more than {MOST} bytes", "give its parts one after another")
    return read_content(content)


@contextmanager
def _painter(
    arguments: argparse.Namespace,
    load: Callable[[], AbstractContextManager[Any]],
    options: LoadOptions,
    fastest: Callable[[], str],
) -> Iterator[Painter]:
    if arguments.ray is None:
        with load() as sana:
            yield Local(sana, arguments.batch, arguments.quality)
        return
    from sana_edge.series.cluster import Cluster

    with Cluster(
        fastest() if arguments.ray == "local" else arguments.model,
        options,
        address=arguments.ray,
        workers=arguments.workers,
        batch=arguments.batch,
        quality=arguments.quality,
    ) as cluster:
        yield cluster


def note(arguments: argparse.Namespace, text: str) -> None:
    """Print a note on stderr."""
    _note(arguments, f"note:  {text}")


def _note(arguments: argparse.Namespace, text: str) -> None:
    from tqdm import tqdm

    if not arguments.quiet:
        tqdm.write(text, file=sys.stderr)


class _Shown:
    """Each picture's path, or JSON line, on stdout; on stderr a bar, or a line every few seconds."""

    def __init__(self, arguments: argparse.Namespace, series: Series) -> None:
        self._arguments, self._series = arguments, series
        self._bar: Any = None
        self._began = self._said = time.monotonic()
        # what was drawn or has failed; with --retries a picture may be both, in turn
        self._seen: set[str] = set()
        self._notes: set[str] = set()

    def __enter__(self) -> _Shown:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if kind is not None and not self._seen and not issubclass(kind, KeyboardInterrupt):
            # it never began, and the error says why
            return
        series, failed = self._series, len(self._series.failed)
        counts = {"drawn": len(self._seen) - failed, "kept": series.kept, "failed": failed}
        counts["left"] = len(series.pictures) - series.kept - len(self._seen)
        if self._arguments.json and kind is None:
            self._print(json.dumps({"event": "end", **counts, "bad": len(series.bad)}))
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "drawn")
        on = "; the same command goes on" if counts["left"] or failed else ""
        _note(self._arguments, f"{said}, of {len(series.pictures)} in {series.folder}{on}")

    def step(self, name: str, done: int, count: int) -> None:
        """Take the progress of a picture."""
        if self._bar is None and not self._arguments.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, unit="picture", leave=False)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{name} {done}/{count}")

    def picture(self, drawn: Drawn) -> None:
        """Take a picture that is on the disk, or has failed."""
        self._seen.add(str(drawn.path))
        if self._arguments.json:
            self._print(json.dumps(self._event(drawn)))
        elif not drawn.error:
            self._print(str(drawn.path))
        if drawn.error:
            _note(self._arguments, f"failed: {drawn.path} (line {drawn.line}): {drawn.error}")
        for line in drawn.notes:
            if line not in self._notes:
                note(self._arguments, line)
            self._notes.add(line)
        if self._bar is not None:
            self._bar.update(len(self._seen) - self._bar.n)
        elif time.monotonic() - self._said >= INTERVAL:
            self._said = time.monotonic()
            left = f"{self._left:.0f} s left"
            _note(self._arguments, f"pictures: {len(self._seen)} of {self._total}, {left}")

    @property
    def _total(self) -> int:
        return len(self._series.pictures) - self._series.kept

    @property
    def _left(self) -> float:
        """Seconds, by the pace so far."""
        each = (time.monotonic() - self._began) / max(len(self._seen), 1)
        return each * (self._total - len(self._seen))

    def _event(self, drawn: Drawn) -> dict[str, Any]:
        event = {"event": "failed" if drawn.error else "picture", "path": str(drawn.path)}
        where = {"index": drawn.index, "line": drawn.line, "done": len(self._seen), "total": self._total}
        found: dict[str, Any] = {"error": drawn.error, "hint": drawn.hint, **drawn.options}
        if not drawn.error:
            seconds = {stage: round(value, 3) for stage, value in drawn.timings.items()}
            found = {**drawn.metadata, "timings": seconds, "notes": drawn.notes}
        return {**event, **where, "seconds_left": round(self._left, 1), **found}

    def _print(self, line: str) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
