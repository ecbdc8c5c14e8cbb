"""How far long work is: one kind of function that is called, and one bar that shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# what is being done, how much of it is done, and how much there is; 0 and 0 where that is not known
Progress = Callable[[str, int, int], None]


def unseen(name: str, done: int, count: int) -> None:
    """Progress that nobody looks at."""


@contextmanager
def bar(quiet: bool = False, unit: str = "it") -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal; each new name starts it again."""
    from tqdm import tqdm

    with tqdm(disable=quiet or not sys.stderr.isatty(), unit=unit, leave=False) as shown:
        current = ""

        def show(name: str, done: int, count: int) -> None:
            nonlocal current
            if name != current:
                current = name
                # first, as the reset draws the bar
                shown.set_description(name, refresh=False)
                shown.reset(total=count or None)
                # what an earlier run did is no measure of speed
                shown.initial = shown.n = max(done - 1, 0)
            shown.total = count or None
            shown.update(done - shown.n)

        yield show
