"""How far long work is: one kind of function that is called, and what shows it on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sana_edge.errors import Cancelled, one_line

# what is being done, how much of it is done, and how much there is; 0 and 0 where that is not known
Progress = Callable[[str, int, int], None]

# seconds between lines where stderr is no terminal
INTERVAL = 5.0


def unseen(name: str, done: int, count: int) -> None:
    """Progress that nobody looks at."""


def both(first: Progress, second: Progress) -> Progress:
    """Progress that two look at."""

    def tell(name: str, done: int, count: int) -> None:
        first(name, done, count)
        second(name, done, count)

    return tell


def watched(on_progress: Progress | None, cancel: threading.Event | None, what: str) -> Progress:
    """Progress of ``what`` that raises `Cancelled`, on the working thread, once ``cancel`` is set."""

    def check(name: str, done: int, count: int) -> None:
        if cancel is not None and cancel.is_set():
            raise Cancelled(f"{what} was cancelled")

    return check if on_progress is None else both(check, on_progress)


@contextmanager
def bar(quiet: bool = False, unit: str = "it") -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, elsewhere a line every few seconds.

    Each new name starts it again. The unit "B" is bytes.
    """
    if quiet or sys.stderr is None or sys.stderr.closed:
        yield unseen
    elif sys.stderr.isatty():
        with _bar(unit) as shown:
            yield shown
    else:
        yield _lines(unit)


@contextmanager
def _bar(unit: str) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(unit=unit, unit_scale=unit == "B", leave=False) as shown:
        current = ""

        def show(name: str, done: int, count: int) -> None:
            nonlocal current
            if name != current:
                current = name
                # first, as the reset draws the bar
                shown.set_description(one_line(name), refresh=False)
                shown.reset(total=count or None)
                # what an earlier run did is no measure of speed
                shown.initial = shown.n = max(done - 1, 0)
            shown.total = count or None
            shown.update(done - shown.n)
            if done == count:
                shown.refresh()

        yield show


def _lines(unit: str) -> Progress:
    last = time.monotonic()

    def show(name: str, done: int, count: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < INTERVAL:
            return
        last = now
        amounts = f"{done / 1e6:.0f} of {count / 1e6:.0f} MB" if unit == "B" else f"{done} of {count}"
        # which may be what a folder is called
        print(one_line(f"{name or unit}: {amounts}" if count else name), file=sys.stderr, flush=True)

    return show
